"""One node of a job under test: says what it is, waits for the others, and starts a rank for each of its devices."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmtrain.config.installation import output_of
from mmtrain.health.preflight.pairs import MAX_ROUNDS
from mmtrain.health.preflight.reports import NodeFacts, read_facts, write
from mmtrain.health.preflight.worker import PATIENCE_SECONDS

TOTAL_SECONDS = 55.0
WORKER = ("-m", "mmtrain.health.preflight.worker")
_SMI = {
    "ecc.errors.uncorrected.volatile.total": lambda text: text.isdecimal() and int(text) > 0,
    "retired_pages.pending": lambda text: text == "Yes",
    "remapped_rows.failure": lambda text: text in ("1", "Yes"),
    "clocks_event_reasons.hw_slowdown": lambda text: text == "Active",
    "clocks_event_reasons.hw_thermal_slowdown": lambda text: text == "Active",
    "clocks_event_reasons.sw_thermal_slowdown": lambda text: text == "Active",
}
"""What nvidia-smi is asked of each GPU, and which answers are faults; what a driver does not know is left out."""


@dataclass(frozen=True)
class NodeUnderTest:
    """What one node is told.

    Attributes:
        folder: shared by all nodes.
        node: its name.
        nodes: names of all, in the job's order.
        processes: ranks of a node.
        gpus: GPUs of a node; 0 measures the CPU.
        worker: arguments of Python that start a rank.
        seconds: for everything.
        patience: for others: their facts to appear, their ranks to meet.
    """

    folder: Path
    node: str
    nodes: Sequence[str]
    processes: int
    gpus: int
    worker: Sequence[str] = WORKER
    seconds: float = TOTAL_SECONDS
    patience: float = PATIENCE_SECONDS

    def facts(self, commit: str, versions: dict[str, str]) -> NodeFacts:
        """Return what this node says of itself."""
        ports = free_ports(MAX_ROUNDS)
        listed = smi("index") if self.gpus else []
        faults = gpu_faults() if self.gpus else []
        return NodeFacts(self.node, _address(self.node), ports, len(listed), commit, versions, faults)

    def run(self, facts: NodeFacts) -> int:
        """Leave the facts, wait for those of the others, and measure; returns 0, or 1 where a rank failed.

        Raises:
            OSError: the folder cannot be written.
        """
        end = time.monotonic() + self.seconds
        write(self.folder, f"{self.node}.facts", facts)
        meet = time.monotonic() + self.patience
        while (seen := set(read_facts(self.folder))) < set(self.nodes) and time.monotonic() < meet:
            time.sleep(0.1)
        (self.folder / f"{self.node}.seen").write_text(" ".join(sorted(seen)))
        port = free_ports(1)[0]
        ranks = [subprocess.Popen(self._command(local, port)) for local in range(self.processes)]
        codes = []
        for rank in ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                codes.append(rank.wait(max(0.1, end - time.monotonic())))
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
        return int(codes != [0] * self.processes)

    def _command(self, local_rank: int, port: int) -> list[str]:
        return [sys.executable, *self.worker, "--folder", str(self.folder), "--node", self.node,
                "--nodes", ",".join(self.nodes), "--processes", str(self.processes),
                "--local-rank", str(local_rank), "--gpus", str(self.gpus), "--port", str(port),
                "--patience", str(self.patience)]  # fmt: skip


def free_ports(count: int) -> list[int]:
    """Return ports of this host that nobody listens on."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def smi(query: str) -> list[str]:
    """Return what nvidia-smi answers for each GPU; nothing where it is missing or does not know the question."""
    answer = output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits")
    return [line.strip() for line in answer.splitlines()]


def gpu_faults(ask: Callable[[str], list[str]] = smi) -> list[str]:
    """Return a line for each fault that a GPU reports: uncorrected errors of memory, throttling."""
    answers = ((query, is_fault, ask(query)) for query, is_fault in _SMI.items())
    return [f"GPU {i}: {query} is {text}" for query, is_fault, texts in answers
            for i, text in enumerate(texts) if is_fault(text)]  # fmt: skip


def _address(node: str) -> str:
    """Return a name by which others reach this node: its own where it can be looked up, else this host's loopback."""
    try:
        socket.gethostbyname(node)
    except OSError:
        return "127.0.0.1"
    return node
