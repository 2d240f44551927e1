"""The kernels on one GPU beside their peers and their floors; `run.py` measures the whole table."""
