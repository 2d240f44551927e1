"""A corpus on disk: Megatron `.bin/.idx` files, their manifest and their held-out part."""
