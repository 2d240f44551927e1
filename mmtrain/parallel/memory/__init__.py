"""Prediction of a device's peak memory from a run's options: arithmetic alone, before anything is started."""
