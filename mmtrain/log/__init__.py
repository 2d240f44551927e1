"""What a run says: metrics, console, wandb and plots."""
