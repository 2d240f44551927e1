"""How the model is laid over processes; the model itself knows nothing of it."""
