"""A model laid over processes that all hold the same tokens, as inference wants it: no token is cut off or sent."""
