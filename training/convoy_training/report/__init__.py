"""Draws the HTML report of a training run.

Public names: `page.render`, `record.Record`, `record.Layer`.
Callers: `pipeline` alone. It imports the package only when it draws a report, because the package needs Jinja.
`record` holds what a report shows. `sections`, `quality`, `gallery` and `origins` put it into words, `charts`
and `pictures` draw it, and page.html.jinja and style.css lay it out.
"""
