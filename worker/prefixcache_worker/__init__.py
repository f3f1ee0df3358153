"""A model worker on the shared pool: loads any Hugging Face decoder, batches, reuses, streams.

`Model` runs the network on paged keys and values, `Engine` schedules requests over it, and
`prefixcache worker` is the process around both.
"""
