"""Decoding from a trained model."""
