#!/usr/bin/env python
"""NCCL within a host by the number of its channels, and rows read directly: what these gain and take.

    torchrun --nproc-per-node 4 -m mmtrain.bench.nccl_gpu --out FOLDER

Collectives of bf16 over all GPUs, with nothing beside them, and beside two experts' products: the MoE layer's exchange
at hidden 6,144. Bytes are those that leave (all-to-all, all-gather) or reach (reduce-scatter) a GPU; medians of rank 0.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from mmtrain.bench.timing import timed
from mmtrain.config import ClusterConfig
from mmtrain.parallel import mesh
from mmtrain.parallel.expert.peer_buffers import PeerBuffers
from mmtrain.parallel.nccl import all_channels_group, with_channels
from mmtrain.parallel.peers.mapping import Unreachable

HIDDEN, FFN = 6144, 9216
CHANNELS = (16, 32, 64)


def used_mib() -> int:
    """Memory of this GPU in use, by what the driver says."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return (total - free) >> 20


def groups(device: torch.device) -> Iterator[tuple[str, ProcessGroup]]:
    """Groups of all ranks by how they are connected, each made when it is asked for."""
    plain = dist.new_group()
    yield "NCCL's own choice", plain
    yield "all channels", all_channels_group(plain, device)
    for channels in CHANNELS:
        yield f"{channels} channels", with_channels(plain, device, channels)


class Collectives:
    """The three collectives of `rows` rows a GPU, into buffers of their own."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.ranks = dist.get_world_size()
        self.part = torch.randn(rows // self.ranks, HIDDEN, device=device).bfloat16()
        self.whole = torch.randn(rows, HIDDEN, device=device).bfloat16()
        self.out = torch.empty_like(self.whole)
        self.out_part = torch.empty_like(self.part)
        self.moved = self.whole.nbytes * (self.ranks - 1) // self.ranks

    def calls(self, group: ProcessGroup) -> dict[str, Callable[[], object]]:
        """By name."""
        return {
            "all-to-all": lambda: dist.all_to_all_single(self.out, self.whole, group=group),
            "all-gather": lambda: dist.all_gather_into_tensor(self.out, self.part, group=group),
            "reduce-scatter": lambda: dist.reduce_scatter_tensor(self.out_part, self.whole, group=group),
        }


def copy_engines(collectives: Collectives, device: torch.device) -> Callable[[], object]:
    """All-to-all of symmetric memory without multiprocessors (NCCL_CTA_POLICY_ZERO), on a stream of its own."""
    import torch.distributed._symmetric_memory as symmetric

    symmetric.set_backend("NCCL")
    source, target = (symmetric.empty(*collectives.whole.shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    options = dist.ProcessGroupNCCL.Options()
    options.config.cta_policy = dist.ProcessGroupNCCL.NCCL_CTA_POLICY_ZERO
    group = dist.new_group(backend="nccl", pg_options=options)
    symmetric.rendezvous(source, group)
    symmetric.rendezvous(target, group)
    stream = torch.cuda.Stream()  # the default stream cannot have them

    def run() -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            dist.all_to_all_single(target, source, group=group)
        torch.cuda.current_stream().wait_stream(stream)

    return run


def direct(collectives: Collectives, device: torch.device) -> Callable[[], object]:
    """All-to-all by each GPU reading its rows out of the others' memory, as `parallel.exchange=direct` does."""
    buffers, out_MD = PeerBuffers(dist.group.WORLD, device), collectives.out
    used_M = torch.zeros(out_MD.shape[0], dtype=torch.int32, device=device)

    def run() -> None:
        buffers.stage(*out_MD.shape, out_MD.dtype)
        buffers.read(out_MD, used_M=used_M)

    return run


def products(device: torch.device, rows: int = 2560) -> Callable[[], object]:
    """Two experts' forward products, of 2,560 rows each."""
    x_RD = torch.randn(2 * rows, HIDDEN, device=device).bfloat16()
    a_RF = torch.randn(2 * rows, FFN, device=device).bfloat16()
    w13_EGD = torch.randn(2, 2 * FFN, HIDDEN, device=device).bfloat16()
    w2_EDF = torch.randn(2, HIDDEN, FFN, device=device).bfloat16()
    ends_E = torch.tensor([rows, 2 * rows], device=device, dtype=torch.int32)

    def run() -> None:
        F.grouped_mm(x_RD, w13_EGD.transpose(1, 2), offs=ends_E)
        F.grouped_mm(a_RF, w2_EDF.transpose(1, 2), offs=ends_E)

    return run


class Beside:
    """A collective on a stream of its own, before products or at the same time."""

    def __init__(self, compute: Callable[[], object]) -> None:
        self.compute, self.stream = compute, torch.cuda.Stream(priority=-1)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def one_after_another(self, call: Callable[[], object]) -> None:
        """The collective, then the products."""
        with self._aside():
            call()
        torch.cuda.current_stream().wait_stream(self.stream)
        self.compute()

    def at_once(self, call: Callable[[], object]) -> None:
        """The products beside the collective."""
        with self._aside():
            call()
        self.compute()
        torch.cuda.current_stream().wait_stream(self.stream)


def measure(device: torch.device, megabytes: int) -> list[dict[str, Any]]:
    """A row for each way of connecting and each collective."""
    rows = megabytes * 10**6 // (2 * HIDDEN) // 64 * 64
    alone, small = Collectives(rows, device), Collectives(rows // 4, device)
    beside = Beside(products(device))
    figures: list[dict[str, Any]] = []

    def add(way: str, name: str, large: Callable[[], object], little: Callable[[], object], memory: int | None) -> None:
        ms = timed(large)
        figures.append({
            "way": way, "collective": name, "ms": round(ms, 3), "GB_s": round(alone.moved / ms / 1e6),
            "one_after_another_ms": round(timed(lambda: beside.one_after_another(little)), 3),
            "at_once_ms": round(timed(lambda: beside.at_once(little)), 3), "first_call_MiB": memory,
        })  # fmt: skip

    before = used_mib()
    for way, group in groups(device):
        for (name, large), little in zip(alone.calls(group).items(), small.calls(group).values(), strict=True):
            large()
            memory, before = used_mib() - before, used_mib()
            add(way, name, large, little, memory)
            before = used_mib()
    with suppress(Unreachable):  # by all ranks alike
        add("direct", "all-to-all", direct(alone, device), direct(small, device), None)
    if torch.cuda.nccl.version() >= (2, 28):  # copy engines came with it
        add("copy engines", "all-to-all", copy_engines(alone, device), copy_engines(small, device), None)
    return figures


def table(figures: list[dict[str, Any]], title: str) -> str:
    """As Markdown."""
    head = ["channels", "collective", "ms", "GB/s", "before products ms", "beside products ms", "first call takes MiB"]
    lines = [title, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [
        "| " + " | ".join("" if value is None else str(value) for value in row.values()) + " |" for row in figures
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write `nccl-N.md` and `.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=252, help="what a GPU holds of an all-to-all, in 10^6 bytes")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    context = mesh.start(ClusterConfig(device="cuda"))
    figures = measure(context.device, options.megabytes)
    if context.is_main:
        ranks, version = dist.get_world_size(), ".".join(map(str, torch.cuda.nccl.version()))
        title = (f"NCCL {version} on {ranks} {torch.cuda.get_device_name()}, torch {torch.__version__}, "
                 f"{datetime.date.today().isoformat()}: {options.megabytes} MB of bf16 a GPU; a quarter of it beside "
                 "two experts' products.")  # fmt: skip
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"nccl-{ranks}.md").write_text(table(figures, title))
        (options.out / f"nccl-{ranks}.json").write_text(json.dumps({"title": title, "rows": figures}, indent=1) + "\n")
        print(table(figures, title))
    mesh.stop()


if __name__ == "__main__":
    main()
