"""Token mixers: what lets the tokens of a document see each other, one file a kind, and their registry."""
