"""What serving a model takes of each device, reckoned before any is asked for."""
