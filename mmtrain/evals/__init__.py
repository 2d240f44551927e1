"""Evaluations that run inside training, under its layout."""
