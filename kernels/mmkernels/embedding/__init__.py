"""Gradient of an embedding, added to a sum row by row. See README.md beside this file."""

from mmkernels.embedding.api import add_embedding_grad

__all__ = ["add_embedding_grad"]
