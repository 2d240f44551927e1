"""One rank of a node under test: its device alone, then with the other ranks of the node, then with other nodes' ranks.

Its report is written anew after each of these, so that a rank which dies leaves what it had found.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mmtrain.errors import brief
from mmtrain.health.preflight import measures
from mmtrain.health.preflight.pairs import pair_rounds
from mmtrain.health.preflight.reports import NodeFacts, RankReport, read_facts, read_ranks, write

PATIENCE_SECONDS = 15.0  # with others: to appear, to meet, and for each collective


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line that :mod:`mmtrain.health.preflight.node` gives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--node", required=True)
    parser.add_argument("--nodes", required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--local-rank", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--patience", type=float, default=PATIENCE_SECONDS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure; returns 0 if all of it could be measured."""
    options = parse(argv)
    report = RankReport(options.node, options.local_rank)
    name = f"{options.node}-{options.local_rank}.rank"
    try:
        device = _device(options)
        report.rates |= measures.device_rates(device)
        write(options.folder, name, report)
        if options.processes > 1:
            _meet("127.0.0.1", options.port, options.local_rank, options.processes, device, options.patience)
            report.rates |= measures.group_rates(device)
            dist.destroy_process_group()
            write(options.folder, name, report)
    except Exception as error:  # whatever it is, it belongs into the report, and others wait for this rank
        report.errors.append(brief(error))
        write(options.folder, name, report)
        return 1
    _measure_pairs(options, device, report)
    report.done = True
    write(options.folder, name, report)
    return 0


def _device(options: argparse.Namespace) -> torch.device:
    if not options.gpus:
        torch.set_num_threads(1)
        return torch.device("cpu")
    if options.local_rank >= torch.cuda.device_count():
        raise RuntimeError(f"GPU {options.local_rank} is not visible: torch sees {torch.cuda.device_count()}")
    device = torch.device("cuda", options.local_rank)
    torch.cuda.set_device(device)
    return device


def _measure_pairs(options: argparse.Namespace, device: torch.device, report: RankReport) -> None:
    """Measure the way to one other node a round, where both have left their facts."""
    facts, nodes = read_facts(options.folder), options.nodes.split(",")
    appear = time.monotonic() + options.patience  # those that are later than this have met their own fault
    for i, partners in enumerate(pair_rounds(nodes)):
        other = partners.get(options.node)
        if other is None or other not in facts or not _is_well(options, other, appear):
            continue
        lower = min(options.node, other, key=nodes.index)
        rank = options.local_rank + (0 if lower == options.node else options.processes)
        host: NodeFacts = facts[lower]
        try:
            _meet(host.address, host.ports[i], rank, 2 * options.processes, device, options.patience)
            report.pairs[other] = dict(measures.group_rates(device))
        except Exception as error:
            report.pairs[other] = None
            report.errors.append(f"with {other}: {brief(error)}")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        write(options.folder, f"{options.node}-{options.local_rank}.rank", report)


def _is_well(options: argparse.Namespace, other: str, end: float) -> bool:
    """Wait until all ranks of another node have measured themselves; False where one failed, or has not by `end`."""
    while True:
        ranks = [one for one in read_ranks(options.folder) if one.node == other]
        if any(rank.rates.keys().isdisjoint({"copy"}) for rank in ranks):
            return False
        if len(ranks) == options.processes:
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def _meet(address: str, port: int, rank: int, world: int, device: torch.device, patience: float) -> None:
    """Make the default process group of a few ranks, which is destroyed again."""
    timeout = timedelta(seconds=patience)
    store = dist.TCPStore(address, port, world, is_master=rank == 0, timeout=timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout,
                            device_id=device if device.type == "cuda" else None)  # fmt: skip


if __name__ == "__main__":
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # a collective that fails is an error, and does not end the process
    sys.exit(main())
