"""Sweeps: grids of runs for scaling studies, planned as a whole, started here or as Slurm jobs, gone on with later."""
