"""Metrics, console, wandb and plots of a run; all are made from plain records."""
