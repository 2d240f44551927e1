"""A corpus on disk: its formats, its manifest, its held-out part, and the check of its tokens.

`open_corpus` (in `open`) finds the format of a path; each format is a file with a `CorpusFormat` in it.
"""
