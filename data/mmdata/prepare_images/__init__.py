"""From records with images to a corpus folder.

One file a step: records (files to records) -> shapes (records to samples) -> encode (samples to tokens, with the sizes
of their images) -> shard (one process's share) -> merge -> pipeline, which runs them all.
"""
