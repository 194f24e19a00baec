"""`convoy bulk`: stored images by the million, classified by Ray Data on one machine or many.

`settings` is what it is told, `job` what is to be done and what of it is there, `work` how one part of
it is done (which needs no Ray), `run` who does which part. Model, decoder and files are the service's.
"""
