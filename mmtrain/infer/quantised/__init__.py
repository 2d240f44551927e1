"""Models with weights in int8, made for inference from floating-point ones (docs/inference.md)."""
