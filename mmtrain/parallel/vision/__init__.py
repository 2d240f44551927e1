"""The work of a model's eyes, shared out over ranks."""
