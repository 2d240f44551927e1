"""Evaluation of one checkpoint, offline: what is asked for, its units, and what comes of them."""
