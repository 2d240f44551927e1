"""Training steps of other code beside ours: which peers there are, how one is named, and how one is measured.

A peer trains a model of our model's shape on our rows, on as many GPUs. It is named `PEER:CASE`, as in
`megatron:1b-softmax-one-document`; a case alone is transformers' Llama.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from mmdata.rows.loader import PackedBatch
from mmtrain.bench.step_cases import CASES, STEPS, Case, batches, model_config
from mmtrain.bench.timing import slowest
from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.log.kernel_times import profile
from mmtrain.model.flops import step_flops
from mmtrain.parallel.mesh import ParallelContext
from mmtrain.train.device import peak_rate


@dataclass(frozen=True)
class PeerJob:
    """A model and the rows of a step, for a peer to train.

    Attributes:
        config: of our model.
        micro_batches: rows of this rank's step, on the host.
        device: to train on.
        graphs: record CUDA graphs, where the peer can.
        experts_apart: share the experts out to all GPUs (EP), where the peer can; else each GPU has all.
        compiled: call torch.compile, where the peer does without it too.
    """

    config: ModelConfig
    micro_batches: Sequence[PackedBatch]
    device: torch.device
    graphs: bool = False
    experts_apart: bool = False
    compiled: bool = False

    @property
    def on_device(self) -> list[PackedBatch]:
        """The rows on the device, copied before any step."""
        return [one.to(self.device) for one in self.micro_batches]


class PeerStep(Protocol):
    """A peer's model and optimizer.

    Attributes:
        settings: how it was set up, for the record.
        parameters: of the whole model.
    """

    settings: str
    parameters: int

    def __call__(self) -> float:
        """Train one step and return the mean loss of its last micro-batch; waits for the device."""

    def close(self) -> None:
        """Leave what the process holds beside this object."""


class Peer(NamedTuple):
    """Where a peer's code is, and what it can train.

    Attributes:
        module: of `mmtrain.bench`.
        step: its class of :class:`PeerStep`.
        packages: to be imported.
        kinds: letters of the layers that it has.
        packed: whether a row may hold several documents.
        experts: whether layers may have experts.
        several: whether it runs on several GPUs.
        graphs: whether it can record CUDA graphs.
        options: of :class:`PeerJob`.
    """

    module: str
    step: str
    packages: tuple[str, ...]
    kinds: str = "S"
    packed: bool = False
    experts: bool = False
    several: bool = True
    graphs: bool = False
    options: Mapping[str, bool] = MappingProxyType({})


PEERS = {
    "llama": Peer("step_llama", "LlamaStep", ("transformers",), several=False, graphs=True),
    "titan": Peer("step_titan", "TitanStep", ("torchtitan.models.llama3",)),
    "megatron": Peer("step_megatron", "MegatronStep", ("megatron.core",), experts=True, graphs=True),
    "megatron-ep": Peer(
        "step_megatron", "MegatronStep", ("megatron.core",), experts=True, graphs=True, options={"experts_apart": True}
    ),
    "fla": Peer("step_fla", "FlaStep", ("fla", "einops"), kinds="LS", packed=True),
    "fla-compiled": Peer(
        "step_fla", "FlaStep", ("fla", "einops"), kinds="LS", packed=True, options={"compiled": True}
    ),
}  # fmt: skip


def parse_peers(given: str) -> list[tuple[str, str]]:
    """Peers and cases of a list `PEER:CASE,...`, all checked before anything is built.

    Raises:
        ConfigError: an unknown peer or case, a case that the peer cannot train, or a package that is not installed.
    """
    found = []
    for entry in filter(None, map(str.strip, given.split(","))):
        peer, _, case = entry.rpartition(":")
        peer = peer or "llama"
        if peer not in PEERS:
            raise ConfigError("--peers", entry, f"{peer} is none of {', '.join(PEERS)}", "give PEER:CASE")
        if case not in CASES:
            raise ConfigError("--peers", entry, f"{case} is no case", f"give one of {', '.join(CASES)}")
        _check(entry, PEERS[peer], CASES[case])
        found.append((peer, case))
    return found


def _check(entry: str, peer: Peer, case: Case) -> None:
    config = model_config(case)
    odd = set(config.layer_types) - set(peer.kinds)
    if odd:
        raise ConfigError("--peers", entry, f"it has no layers of kind {', '.join(sorted(odd))}",
                          "give a case of softmax attention alone")  # fmt: skip
    if config.num_experts and not peer.experts:
        raise ConfigError("--peers", entry, "it has no experts here", "give a dense case")
    if case.mean_document and not peer.packed:
        raise ConfigError("--peers", entry, "its rows are of one document", "give a case that ends in -one-document")
    for package in peer.packages:
        if problem := missing(package):
            raise ConfigError("--peers", entry, f"{package} cannot be imported ({problem})",
                              "install it, or leave this peer out")  # fmt: skip


def missing(package: str) -> str | None:
    """Why a package cannot be imported; None if it can."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        return str(error)
    return None


def build(name: str, job: PeerJob) -> PeerStep:
    """A peer's model and optimizer."""
    peer = PEERS[name]
    return getattr(importlib.import_module(f"mmtrain.bench.{peer.module}"), peer.step)(job)


def measure_peer(name: str, case: Case, context: ParallelContext, steps: int, graphs: bool = False) -> dict[str, Any]:
    """Figures of a peer in a case's shape, of the slowest rank.

    MFU counts our operations of the same rows, which are the peer's too; with experts those of all assignments, before
    any is dropped.

    Raises:
        ConfigError: several GPUs for a peer that knows one.
    """
    world = dist.get_world_size()
    if world > 1 and not PEERS[name].several:
        raise ConfigError("--peers", name, f"it trains on one GPU, not on {world}", "start one process")
    config, device = model_config(case), context.device
    torch.cuda.reset_peak_memory_stats()
    rows = [batches(case, config.vocab_size, number, context.rank) for number in range(STEPS)]
    began = time.perf_counter()
    step = build(name, PeerJob(config, rows[0], device, graphs, **PEERS[name].options))
    try:
        first = step()
        until_first = time.perf_counter() - began
        losses = [first, step(), step(), step(), step()]
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            losses.append(step())  # reading the loss waits for the device
            seconds.append(time.perf_counter() - start)
        times = profile(step)
        settings, parameters = step.settings, step.parameters
    finally:
        step.close()
    median = slowest([statistics.median(seconds)], device)[0]
    lengths = [length for one in rows[0] for length in one.cu_seqlens.diff().tolist()]
    peak = peak_rate(device, torch.bfloat16)
    return {
        "peer": name, "settings": settings, "graphs": graphs, "gpus": world, "parameters": parameters,
        "step_s": round(median, 4), "tokens_s": round(case.tokens / median),
        "mfu": round(step_flops(config, lengths).total / median / peak, 4),
        "busy": round(times.busy_seconds / median, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "first_step_s": round(until_first, 2), "losses": losses, "kernels": len(times.runs),
        "kinds_ms": {kind: round(one.seconds * 1e3, 2) for kind, one in times.by_kind().items()},
        "longest_ms": {kernel[:90]: round(one.seconds * 1e3, 2) for kernel, one in list(times.by_name().items())[:22]},
    }  # fmt: skip
