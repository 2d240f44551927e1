"""Parallelism: a model laid over processes, of which the model itself knows nothing."""
