"""Which axes the processes form, decided and checked by arithmetic alone: no device and no process group is touched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import nsmallest
from itertools import product

from mmtrain.config import ModelConfig, ParallelConfig
from mmtrain.config.checks import require
from mmtrain.errors import ConfigError
from mmtrain.model.mixers.registry import LIGHTNING, check_layer_pattern, mixer_spec

AXES = ("pp", "cp", "tp", "ep", "etp")  # those that a user sets and the search for a layout that works may change
ROW_ALIGNMENT = 8  # bf16 elements in the 16 bytes that rows of a grouped product are aligned to

BUCKET_ELEMENTS = 2**25
"""Most elements of all ranks' parts of the weights that are gathered or reduced at once (`weight_buckets`), 128 MiB of
fp32. Ours: enough for NVLink's rate, and buffers of two buckets are small beside a model."""

MOST_GRAPH_TOKENS = 2**16
"""Tokens of a micro-batch up to which ``cuda_graphs=auto`` records: the kernels of longer ones outlast their launches
by far, and graphs keep more of softmax layers than recomputation does. Ours."""


@dataclass(frozen=True)
class Layout:
    """Sizes of all axes: world = pp*dp*cp*tp = pp*edp*ep*etp (MiniMax-01 section 3, eqs. 15 and 16).

    Attributes:
        dp: data parallelism of everything but the routed experts.
        edp: data parallelism of the routed experts.
    """

    pp: int
    dp: int
    cp: int
    tp: int
    edp: int
    ep: int
    etp: int

    @property
    def world(self) -> int:
        """All processes."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def replicas(self) -> int:
        """Ranks that hold the same part of the dense parameters, and shard it among them."""
        return self.dp * self.cp

    @property
    def only_replicas(self) -> bool:
        """Whether no parameter is split: every rank could hold all of the model."""
        return self.replicas == self.edp == self.world

    def __str__(self) -> str:
        dense = f"PP{self.pp} x DP{self.dp} x CP{self.cp} x TP{self.tp}"
        return f"{dense} | PP{self.pp} x EDP{self.edp} x EP{self.ep} x ETP{self.etp}"


def plan_layout(world: int, parallel: ParallelConfig, model: ModelConfig, seq_lens: Sequence[int] = ()) -> Layout:
    """Size all axes for `world` processes, or refuse with the layouts nearest to the one asked for.

    Args:
        world: number of processes.
        parallel: options of the layout; ``cp=auto`` is 1 here.
        model: a validated model.
        seq_lens: lengths of sequence that the run's phases train on.

    Raises:
        ConfigError: a layer of an unknown kind; or the first option that cannot work, the arithmetic, and up to three
            sets of overrides that do.
    """
    parallel = replace(parallel, cp=parallel.cp_size)
    parallel.validate()
    check_layer_pattern(model)
    require(parallel.pp_chunks <= model.num_layers, "parallel.pp_chunks", parallel.pp_chunks,
             f"more chunks than model.num_layers={model.num_layers}",
             f"give parallel.pp_chunks={model.num_layers} or less")  # fmt: skip
    _check_contrastive(parallel, model)
    job = _Job(world, parallel, model, tuple(seq_lens))
    if refused := next(_problems(job), None):
        axis, problem = refused
        raise ConfigError(f"parallel.{axis}", getattr(parallel, axis), problem, _advice(job))
    held = model.num_experts // parallel.ep
    groups = parallel.token_groups
    fits = isinstance(groups, str) or held == 0 or groups <= held or groups % held == 0
    require(fits, "parallel.token_groups", groups, f"more than the {held} experts of a rank (model.num_experts "
             f"{model.num_experts} / ep {parallel.ep}), and no multiple",
             f"give parallel.token_groups={held} or {2 * held}, or auto")  # fmt: skip
    require(parallel.exchange != "direct" or model.capacity_factor is not None, "parallel.exchange", "direct",
             "without model.capacity_factor rows have no fixed slots",
             "give parallel.exchange=auto or a model.capacity_factor")  # fmt: skip
    pp, cp, tp, ep, etp = parallel.pp, parallel.cp, parallel.tp, parallel.ep, parallel.etp
    dp, edp = world // (pp * cp * tp), world // (pp * ep * etp)
    layout = Layout(pp=pp, dp=dp, cp=cp, tp=tp, edp=edp, ep=ep, etp=etp)
    _check_head_groups(parallel, model, tp)
    require(parallel.cuda_graphs is not True or model.vision is None, "parallel.cuda_graphs", True,
             "a model with eyes is not recorded: rows have as many images as they have",
             "give parallel.cuda_graphs=auto")  # fmt: skip
    require(parallel.cuda_graphs is not True or records_graphs(layout, parallel), "parallel.cuda_graphs", True,
             f"{layout} with reshard_after_forward={parallel.reshard_after_forward} and sync_every_micro_batch="
             f"{parallel.sync_every_micro_batch} has communication inside of a pass, which is not recorded",
             "give parallel.cuda_graphs=auto; or data parallelism alone, with both options false")  # fmt: skip
    return layout


def _check_contrastive(parallel: ParallelConfig, model: ModelConfig) -> None:
    """Refuse layouts in which ranks share rows or weights of a model with a contrastive loss.

    Raises:
        ConfigError: the first axis but data parallelism.
    """
    if model.vision is None or model.vision.contrastive is None:
        return
    for axis in AXES:
        size = getattr(parallel, axis)
        require(size == 1, f"parallel.{axis}", size, "a model with model.vision.contrastive is trained by data "
                "parallelism alone", f"give parallel.{axis}=1")  # fmt: skip


def _check_head_groups(parallel: ParallelConfig, model: ModelConfig, tp: int) -> None:
    """Refuse groups of heads that a rank of tp cannot make (ConfigError)."""
    if LIGHTNING.letter not in model.layer_pattern:
        return
    heads, groups = model.num_heads // tp, parallel.lightning_head_groups
    divisors = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
    require(heads % groups == 0, "parallel.lightning_head_groups", groups,
            f"does not divide the {heads} heads of a rank (model.num_heads {model.num_heads} / tp {tp})",
            f"give one of {divisors}")  # fmt: skip


def keeps_whole_weights(layout: Layout, parallel: ParallelConfig, host_parameters: bool = False) -> bool:
    """Whether ranks keep copies of all parameters to compute with, and sums of all gradients, from step to step.

    One rank does, and so do several that split no parameter and are to gather and reduce once a step (ZeRO-1): then
    nothing of FSDP2 is needed. Its hooks cost the host as much as the kernels of a small model.
    """
    once = not (parallel.reshards or parallel.sync_every_micro_batch)
    return not host_parameters and layout.only_replicas and (layout.world == 1 or once)


def records_graphs(layout: Layout, parallel: ParallelConfig, host_parameters: bool = False, tokens: int = 0) -> bool:
    """Whether a run on CUDA devices records graphs: of passes without communication.

    Args:
        tokens: of a micro-batch; 0 where any number is meant.
    """
    return (
        keeps_whole_weights(layout, parallel, host_parameters)
        and layout.cp == 1
        and (parallel.cuda_graphs is True or (parallel.cuda_graphs is not False and tokens <= MOST_GRAPH_TOKENS))
        and not parallel.unrecorded
    )


@dataclass(frozen=True)
class _Job:
    """Demands that a layout must fit: the arguments of :func:`plan_layout`."""

    world: int
    parallel: ParallelConfig
    model: ModelConfig
    seq_lens: tuple[int, ...]

    @property
    def asked(self) -> tuple[int, ...]:
        """Sizes of `AXES` that the options ask for."""
        return tuple(getattr(self.parallel, axis) for axis in AXES)


def _problems(job: _Job) -> Iterator[tuple[str, str]]:
    """Axes that cannot work, each with the reason: first the two views' arithmetic, then what the model allows."""
    world, (pp, cp, tp, ep, etp) = job.world, job.asked
    if world % (pp * cp * tp):
        text = f"{world} processes = pp {pp} x dp ? x cp {cp} x tp {tp}: {world} / {pp * cp * tp} is not whole"
        yield ("pp" if world % pp else "cp" if world % (pp * cp) else "tp"), text
    if world % (pp * ep * etp):
        text = f"{world} processes = pp {pp} x edp ? x ep {ep} x etp {etp}: {world} / {pp * ep * etp} is not whole"
        yield ("ep" if world % (pp * ep) else "etp"), text
    for axis, size in zip(AXES, job.asked, strict=True):
        if problem := _PROBLEMS[axis](job, size):
            yield axis, problem
    if problem := _tokens_problem(job, cp, tp):
        yield "tp", problem


def _pp_problem(job: _Job, pp: int) -> str:
    chunks, layers = job.parallel.pp_chunks, job.model.num_layers
    if pp * chunks > layers:
        return f"pp {pp} x pp_chunks {chunks} = {pp * chunks} is more than model.num_layers {layers}"
    return ""


def _tp_problem(job: _Job, tp: int) -> str:
    model = job.model
    width = "shared_ffn_hidden_size" if model.num_experts else "ffn_hidden_size"
    for letter in dict.fromkeys(model.layer_pattern):
        if problem := mixer_spec(letter).tp_problem(model, tp):
            return problem
    if getattr(model, width) % tp:
        return f"model.{width} {getattr(model, width)} / tp {tp} is not whole"
    if model.vocab_size < tp:
        return f"model.vocab_size {model.vocab_size} is less than tp {tp}"
    return ""


def _tokens_problem(job: _Job, cp: int, tp: int) -> str:
    """Why the tokens of a micro-batch cannot be shared out: sequence parallelism takes equal parts of a rank's."""
    return _not_whole(job, cp * tp, f"tp {tp}" if cp == 1 else f"cp {cp} / tp {tp}")


def _cp_problem(job: _Job, cp: int) -> str:
    if cp == 1:
        return ""
    for letter in dict.fromkeys(job.model.layer_pattern):
        if not mixer_spec(letter).context_parallel:
            return f"layers {letter!r} of model.layer_pattern cannot share a row"
    chunks = job.parallel.cp_chunks
    return _not_whole(job, cp * chunks, f"(cp {cp} x cp_chunks {chunks} = {cp * chunks} chunks)")


def _not_whole(job: _Job, parts: int, words: str) -> str:
    """Why the tokens of some phase's micro-batches do not divide by a number of parts; empty if all do."""
    rows = job.parallel.micro_batch_rows
    for seq_len in job.seq_lens:
        if rows * seq_len % parts:
            tokens = f"micro_batch_rows {rows} x seq_len {seq_len} = {rows * seq_len} tokens"
            return f"{tokens} / {words} is not whole"
    return ""


def _ep_problem(job: _Job, ep: int) -> str:
    experts = job.model.num_experts
    if not experts:
        return "model.num_experts=0: a dense model has no experts to share out" if ep > 1 else ""
    return f"model.num_experts {experts} / ep {ep} is not whole" if experts % ep else ""


def _etp_problem(job: _Job, etp: int) -> str:
    width = job.model.ffn_hidden_size
    if not job.model.num_experts:
        return "model.num_experts=0: a dense model has no experts to cut" if etp > 1 else ""
    if width % etp:
        return f"model.ffn_hidden_size {width} / etp {etp} is not whole"
    if width // etp % ROW_ALIGNMENT:
        return f"model.ffn_hidden_size {width} / etp {etp} = {width // etp} is not a multiple of {ROW_ALIGNMENT}"
    return ""


_PROBLEMS = {"pp": _pp_problem, "cp": _cp_problem, "tp": _tp_problem, "ep": _ep_problem, "etp": _etp_problem}


def _advice(job: _Job) -> str:
    """The nearest layouts that work, as overrides of the options given."""
    changes = [
        " ".join(f"parallel.{axis}={new}" for axis, new, old in zip(AXES, sizes, job.asked, strict=True) if new != old)
        for sizes in _nearest_layouts(job)
    ]
    return "give " + ", or ".join(changes) if changes else "no layout of so many processes fits this model"


def _nearest_layouts(job: _Job, count: int = 3) -> list[tuple[int, ...]]:
    """Up to `count` sizes of `AXES` that work and change the fewest options, those by the smallest factors first.

    Once `pp` is chosen, `cp` and `tp` do not bear on the two expert axes, so the best of each side are enough.
    """
    divisors = [size for size in range(1, job.world + 1) if job.world % size == 0]
    sizes = {axis: [size for size in divisors if not _PROBLEMS[axis](job, size)] for axis in AXES}
    _, asked_cp, asked_tp, *asked_experts = job.asked
    found: list[tuple[int, ...]] = []
    for pp in sizes["pp"]:
        ranks = job.world // pp
        sharers = (
            pair for pair in product(sizes["cp"], sizes["tp"])
            if ranks % math.prod(pair) == 0 and not _tokens_problem(job, *pair)
        )  # fmt: skip
        experts = (pair for pair in product(sizes["ep"], sizes["etp"]) if ranks % math.prod(pair) == 0)
        sides = _nearest(sharers, (asked_cp, asked_tp), count), _nearest(experts, asked_experts, count)
        found += [(pp, *pair, *more) for pair, more in product(*sides)]
    best = _nearest(found, job.asked, count)
    changes = [sum(new != old for new, old in zip(layout, job.asked, strict=True)) for layout in best]
    return [layout for layout, number in zip(best, changes, strict=True) if number == changes[0]]


def _nearest(choices: Iterable[tuple[int, ...]], asked: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """The `count` choices with the fewest changes to the sizes asked for, then the smallest factors."""

    def distance(sizes: tuple[int, ...]) -> tuple[int, float, tuple[int, ...]]:
        factors = [abs(math.log2(new / old)) for new, old in zip(sizes, asked, strict=True) if new != old]
        return len(factors), sum(factors), sizes

    return nsmallest(count, choices, key=distance)
