"""Options that need less memory: what each would save, and which of them make a phase fit a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mmtrain.errors import ConfigError
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.memory.predict import CONTEXT_GIB, FRAGMENTS, GIB, MemoryPrediction, margin_bytes, predict
from mmtrain.parallel.memory.workload import Workload

ERROR = 0.05
"""Relative error of a prediction that is allowed for: a run is refused only if it could not fit with so much less."""
HOST_OPTIMIZER = "optim=cpu_offload"
DENSE_CHUNK, EXPERT_CHUNK = 16384, 65536
"""Tokens and rows of a chunk of the feed-forward that are proposed: products of this size are as fast as larger ones,
and the sum of the weights' gradients over chunks, of all of a rank's experts in each, costs little. Ours."""

HEAD_GROUPS = 4
"""Groups of heads of lightning layers that are proposed: three quarters of what groups save at most. Ours."""


@dataclass(frozen=True)
class Saving:
    """Options, as they are written on the command line, and the prediction with them."""

    options: str
    prediction: MemoryPrediction


def cannot_fit(prediction: MemoryPrediction, device_bytes: float) -> bool:
    """Whether a device is too small, whatever the prediction's error and the margin."""
    return prediction.peak > most_with_error(device_bytes)


def may_not_fit(prediction: MemoryPrediction, device_bytes: float, world: int) -> bool:
    """Whether prediction and margin together are more than a device has."""
    return prediction.peak > most_with_margin(device_bytes, world)


def most_with_margin(device_bytes: float, world: int) -> float:
    """Bytes of the largest peak that fits a device with its margin (:func:`may_not_fit`)."""
    return (device_bytes - margin_bytes(0.0, world)) / (1 + FRAGMENTS)


def most_with_error(device_bytes: float) -> float:
    """Bytes of the largest predicted peak that a device may hold all the same (:func:`cannot_fit`)."""
    return (device_bytes - CONTEXT_GIB * GIB) / (1 - ERROR)


def savings(work: Workload) -> list[Saving]:
    """Predict every single option that changes the workload and needs less memory, the one that saves most first."""
    found = [Saving(options, predict(changed)) for options, changed in _changes(work)]
    before = predict(work).peak
    return sorted((one for one in found if one.prediction.peak < before), key=lambda one: one.prediction.peak)


def what_fits(work: Workload, device_bytes: float) -> Saving | None:
    """Return the options that make a phase fit with its margin, as few as can be; None where none do.

    They are tried one on top of the other, in the order of `_changes`, and those that are not needed are left out
    again: first an optimizer in host memory, which costs most, then the others from the last to the first.
    """
    chosen, here = [], work
    while may_not_fit(predict(here), device_bytes, work.layout.world):
        options, here = next(_helpful(here), (None, here))
        if options is None:
            return None
        chosen.append(options)
    for option in sorted(chosen[:-1], key=lambda text: (text != HOST_OPTIMIZER, -chosen.index(text))):
        fewer = [one for one in chosen if one != option]
        tried = _apply(work, fewer)
        if tried is not None and not may_not_fit(predict(tried), device_bytes, work.layout.world):
            chosen, here = fewer, tried
    last = {text.partition("=")[0]: text for text in chosen}  # cp=4 after cp=2
    return Saving(" ".join(last.values()), predict(here))


def _helpful(work: Workload) -> Iterator[tuple[str, Workload]]:
    before = predict(work).peak
    return ((options, changed) for options, changed in _changes(work) if predict(changed).peak < 0.99 * before)


def _apply(work: Workload, options: list[str]) -> Workload | None:
    for wanted in options:
        found = dict(_changes(work)).get(wanted)
        if found is None:
            return None
        work = found
    return work


def _changes(work: Workload) -> Iterator[tuple[str, Workload]]:
    """Yield single changes that can run, from what costs least time to what costs most or needs more processes."""
    parallel, layout = work.parallel, work.layout
    wanted: list[dict[str, Any]] = []
    if work.ffn_chunk is None:  # with recomputation the dense feed-forward takes no longer for it
        wanted.append({"ffn_chunk_tokens": EXPERT_CHUNK if work.model.num_experts else DENSE_CHUNK})
    wanted.append({"activation_checkpoint": "block"})
    if parallel.micro_batch_rows > 1:
        wanted.append({"micro_batch_rows": max(parallel.micro_batch_rows // 2, 1)})
    wanted.append({"sync_every_micro_batch": True})
    if not parallel.reshards:
        wanted.append({"reshard_after_forward": True})
    if parallel.recomputes:
        wanted.append({"offload_block_inputs": True})
    if parallel.lightning_head_groups == 1:
        wanted.append({"lightning_head_groups": HEAD_GROUPS})
    for options in wanted:
        if (changed := _with(work, options)) is not None:
            yield changed
    if not work.host_optimizer:
        yield HOST_OPTIMIZER, replace(work, host_optimizer=True)
    for axis in ("cp", "ep", "tp"):
        if (changed := _with(work, {axis: 2 * getattr(layout, axis)})) is not None:
            yield changed


def _with(work: Workload, options: dict[str, Any]) -> tuple[str, Workload] | None:
    """The workload under other options of the layout; None where they change nothing or cannot run."""
    if all(getattr(work.parallel, name) == value for name, value in options.items()):
        return None
    parallel = replace(work.parallel, **options)
    try:
        layout = plan_layout(work.layout.world, parallel, work.model, [work.seq_len])
    except ConfigError:
        return None
    rows = work.micro_batches * work.parallel.micro_batch_rows * work.layout.dp
    if rows % (layout.dp * parallel.micro_batch_rows):
        return None
    text = " ".join(f"parallel.{name}={str(value).lower()}" for name, value in options.items())
    micro_batches = rows // (layout.dp * parallel.micro_batch_rows)
    return text, replace(work, parallel=parallel, layout=layout, micro_batches=micro_batches)
