"""From records with images to a corpus folder.

One file a step: collect (paths to files) -> records (files to records) -> shapes (records to samples, by a template) ->
encode (samples to tokens, with the sizes of their images) -> shard (one process's share) -> merge -> summary; pipeline
runs them all. record_tokenizer trains a tokenizer, image_token finds the images' token in it.
"""
