"""Evaluations: needles inside training, under its layout; and a checkpoint on long text, offline."""
