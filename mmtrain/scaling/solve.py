"""Robust least squares of many starts or resamples at once: damped Gauss-Newton steps on Huber's loss.

The laws are sums of powers, fitted in the log: log L_i = log sum_k exp(F_ki . theta). All starts of a grid, or all
resamples of a bootstrap, are one batch of numpy products, which takes seconds where a library's solver, called for one
after another, takes minutes; scipy is needed by nothing.

Shapes: S starts or resamples, n points, K terms of the sum, p coefficients.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DELTA = 1e-3
"""Where Huber's loss turns linear, in log loss (Hoffmann et al. 2022, section 3.3)."""

CHUNK = 256  # starts that run together: 256 x 245 points x 25 products are 13 MB
STEPS = 400
TOLERANCE = 1e-13  # of the objective, from one accepted step to the next


class Solution(NamedTuple):
    """Coefficients where the descent ended.

    Attributes:
        theta_Sp: coefficients of every start.
        objective_S: Huber's loss summed over the points.
    """

    theta_Sp: Array
    objective_S: Array


def huber(residual: Array, delta: float) -> Array:
    """Return Huber's loss, element by element: r^2/2 up to delta, then delta (|r| - delta/2)."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def log_sum(terms_Kn_p: Array, theta_Sp: Array) -> tuple[Array, Array]:
    """Return the law's logarithm [S, n] and its derivative by each coefficient [S, n, p]."""
    exponents_SKn = np.einsum("knp,sp->skn", terms_Kn_p, theta_Sp, optimize=True)
    top_Sn = exponents_SKn.max(axis=1)
    shares_SKn = np.exp(exponents_SKn - top_Sn[:, None])
    total_Sn = shares_SKn.sum(axis=1)
    shares_SKn /= total_Sn[:, None]
    return top_Sn + np.log(total_Sn), np.einsum("skn,knp->snp", shares_SKn, terms_Kn_p, optimize=True)


def solve(terms_Kn_p: Array, log_loss_n: Array, starts_Sp: Array, weights_Sn: Array, delta: float = DELTA) -> Solution:
    """Minimise the sum over points of weight times Huber's loss of the residual of log loss, from every start.

    A sum, not a mean: the minimum is the same, but a library's tolerance on the objective is not (Besiroglu et al.
    2024, section 3.3). Where `delta` is far below the residuals, this is the least sum of absolute residuals, and the
    descent goes there by way of larger deltas.

    Args:
        terms_Kn_p: features of each term at each point.
        log_loss_n: what is fitted.
        starts_Sp: first coefficients.
        weights_Sn: weight of each point for each start, 1 or how often a resample drew it; [1, n] for all.
        delta: where the loss turns linear.
    """
    weights_Sn = np.broadcast_to(weights_Sn, (len(starts_Sp), len(log_loss_n)))
    parts = []
    for first in range(0, len(starts_Sp), CHUNK):
        here = slice(first, first + CHUNK)
        theta_Sp, width = starts_Sp[here], max(delta, DELTA)
        while width > delta:
            theta_Sp = _descend(terms_Kn_p, log_loss_n, theta_Sp, weights_Sn[here], width).theta_Sp
            width = max(delta, width / 4)
        parts.append(_descend(terms_Kn_p, log_loss_n, theta_Sp, weights_Sn[here], delta))
    return Solution(np.concatenate([part.theta_Sp for part in parts]), np.concatenate([p.objective_S for p in parts]))


def _descend(terms: Array, log_loss_n: Array, theta_Sp: Array, weights_Sn: Array, delta: float) -> Solution:
    """Step until no start gains: each has a damping of its own, and a step that gains nothing is not taken."""
    value_Sn, slope_Snp = log_sum(terms, theta_Sp)
    best_S = (weights_Sn * huber(value_Sn - log_loss_n, delta)).sum(axis=1)
    damping_S, active = np.full(len(theta_Sp), 1e-3), np.ones(len(theta_Sp), bool)
    theta_Sp = theta_Sp.copy()
    for _ in range(STEPS):
        rows = np.flatnonzero(active)
        if not len(rows):
            break
        residual = value_Sn[rows] - log_loss_n
        step = _step(residual, slope_Snp[rows], weights_Sn[rows], damping_S[rows], delta)
        trial = theta_Sp[rows] + step
        with np.errstate(over="ignore", invalid="ignore"):
            value, slope = log_sum(terms, trial)
            objective = (weights_Sn[rows] * huber(value - log_loss_n, delta)).sum(axis=1)
        better = np.isfinite(objective) & (objective < best_S[rows])
        gained = np.where(better, best_S[rows] - objective, 0.0)
        small = better & (gained <= TOLERANCE * best_S[rows])
        taken = rows[better]
        theta_Sp[taken], best_S[taken] = trial[better], objective[better]
        value_Sn[taken], slope_Snp[taken] = value[better], slope[better]
        damping_S[rows] = np.where(better, damping_S[rows] / 5, damping_S[rows] * 6)
        active[rows] = ~small & (damping_S[rows] < 1e12)
    return Solution(theta_Sp, best_S)


def _step(residual_Sn: Array, slope_Snp: Array, weights_Sn: Array, damping_S: Array, delta: float) -> Array:
    """Return the step of each start: squares weighted by delta/|r| beyond delta bound Huber's loss from above."""
    weights_Sn = weights_Sn * (delta / np.maximum(np.abs(residual_Sn), delta))
    weighted_Snp = slope_Snp * weights_Sn[..., None]
    gram_Spp = weighted_Snp.transpose(0, 2, 1) @ slope_Snp
    scale_Sp = np.einsum("spp->sp", gram_Spp)
    diagonal = np.arange(gram_Spp.shape[1])
    gram_Spp[:, diagonal, diagonal] += damping_S[:, None] * scale_Sp + 1e-15 * scale_Sp.max(axis=1)[:, None] + 1e-300
    return -np.linalg.solve(gram_Spp, np.einsum("snp,sn->sp", weighted_Snp, residual_Sn)[..., None])[..., 0]
