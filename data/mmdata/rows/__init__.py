"""From a corpus to packed rows and batches of them."""
