"""Points made from known laws."""

import numpy as np

from mmtrain.scaling.paper import PFLOP_S_DAY, TABLE_2
from mmtrain.scaling.points import Point

# Besiroglu et al. 2024 (arXiv 2404.10102), table of the refit.
REFIT = {"E": 1.8172, "A": 482.01, "alpha": 0.3478, "B": 2085.43, "beta": 0.3658}


def point(**given):
    fields = {"architecture": "hybrid", "run": "r", "parameters": 1e8, "activated": None, "experts": 0, "tokens": 1e9}
    fields |= {"flops": None, "loss": 3.0, "group": None, "learning_rate": 3e-4, "batch_tokens": 4e6, "final": True}
    fields |= given
    fields["activated"] = fields["activated"] or fields["parameters"]
    fields["flops"] = fields["flops"] or 6 * fields["activated"] * fields["tokens"]
    return Point(**fields)


def refit_loss(size, tokens, law=REFIT):
    return law["E"] + law["A"] / size ** law["alpha"] + law["B"] / tokens ** law["beta"]


def surface_points(sizes, computes, noise=0.0, seed=0, **given):
    """IsoFLOP groups from L(N, D) at C = 6 N D: a run a size and compute."""
    noisy = np.random.default_rng(seed)
    points = []
    for compute in computes:
        for size in sizes(compute) if callable(sizes) else sizes:
            tokens = compute / 6 / size
            loss = refit_loss(size, tokens) * np.exp(noise * noisy.standard_normal())
            run = f"{given.get('architecture', 'hybrid')}-{size:.3g}-{compute:.3g}"
            points.append(point(run=run, parameters=size, tokens=tokens, loss=loss, group=f"{compute:.2g}", **given))
    return points


def curve_points(sizes, tokens, noise=0.0, seed=0, steps=24, **given):
    """A training curve a size, at a constant learning rate: the loss on the way is that of a shorter run."""
    noisy = np.random.default_rng(seed)
    points = []
    for size in sizes:
        for seen in np.geomspace(tokens / 300, tokens, steps):
            loss = refit_loss(size, seen) * np.exp(noise * noisy.standard_normal())
            final = bool(seen == tokens)
            points.append(point(run=f"{size:.3g}", parameters=size, tokens=seen, loss=loss, final=final, **given))
    return points


def paper_points(architecture, noise=0.0, seed=0, days=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)):
    """IsoFLOP groups whose minima lie on the laws of Table 2."""
    noisy, row, points = np.random.default_rng(seed), TABLE_2[architecture], []
    for day in days:
        flops = day * PFLOP_S_DAY
        for off in (-1.1, -0.7, -0.35, 0.0, 0.35, 0.7, 1.1):
            size, tokens = row.parameters.at(flops) * np.exp(off), row.tokens.at(flops) * np.exp(-off)
            loss = (row.loss.at(flops) + 0.05 * off**2) * np.exp(noise * noisy.standard_normal())
            named = {"architecture": architecture, "run": f"{day} {off}", "group": str(day)}
            points.append(point(parameters=size, tokens=tokens, flops=flops, loss=loss, **named))
    return points
