"""What a run leaves on disk to go on from: checkpoints and the run's folder."""
