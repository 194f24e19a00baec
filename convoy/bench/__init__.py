"""`convoy bench`: load for a server, and what became of it.

`settings` is what it is told, `payloads` what it sends, `http2` how, `load` when and from how many
processes, `report` what is made of the answers, `run` which loads are tried. Any server of the Open
Inference Protocol will do; of the service's code nothing is needed.
"""
