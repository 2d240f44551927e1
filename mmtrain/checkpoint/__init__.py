"""Checkpoints, and the folder of a run that holds them."""
