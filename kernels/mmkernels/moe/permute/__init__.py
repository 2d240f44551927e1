"""Tokens to rows sorted by expert and back, with both gradients. README.md beside this file has the memory traffic."""
