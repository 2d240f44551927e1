"""Scaling laws: fitted to the points of a sweep, beside those of the paper."""

from mmtrain.scaling.fit import ArchitectureFit, FitOptions
from mmtrain.scaling.points import POINTS_NAME, Point, read_points, write_points
from mmtrain.scaling.sweep import SweepFit, fit_sweep

__all__ = [
    "POINTS_NAME",
    "ArchitectureFit",
    "FitOptions",
    "Point",
    "SweepFit",
    "fit_sweep",
    "read_points",
    "write_points",
]
