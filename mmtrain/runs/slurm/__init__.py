"""Runs as Slurm jobs: what is checked and written before one is submitted, and what a job decides while it runs."""
