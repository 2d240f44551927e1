"""From a corpus to packed rows of equal length, and to batches of rows."""
