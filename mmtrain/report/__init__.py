"""Runs as a page: what was recorded, read, thinned out and put into one HTML file that needs nothing else."""
