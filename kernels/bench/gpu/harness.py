"""The bench that fills the table: it times ours, the peer and what else a row needs.

Nothing that a measured function raises ends the run: its cell then holds the error's name.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.gpu.table import Call, Cell, Goal, Label, Peer, Row


@dataclass
class Bench:
    """The machine's rates, the timer and the rows so far.

    Attributes:
        device: where tensors live.
        copy_gbps: bandwidth that floors are counted with.
        timer: milliseconds that the GPU works on a call.
        launched: milliseconds of a call with the host's work, for what users run as it is launched.
        compiler: what stands for ``torch.compile``.
        limit: no length above this one (``--quick``, tests); None keeps all.
    """

    device: torch.device
    copy_gbps: float
    timer: Callable[[Call], float]
    launched: Callable[[Call], float]
    compiler: Callable[[Callable], Callable]
    limit: int | None = None
    rows: list[Row] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def cap(self, size: int) -> int:
        """The size, or the limit if that is less."""
        return size if self.limit is None else min(size, self.limit)

    def lengths(self, sizes: Iterable[int]) -> list[int]:
        """Those within the limit (cut to it where none is), each once."""
        sizes = list(sizes)
        return [size for size in sizes if self.cap(size) == size] or [self.cap(min(sizes))]

    def floor_ms(self, size: float | None) -> float | None:
        """Time of moving so many bytes."""
        return None if size is None else size / self.copy_gbps / 1e6

    def attempt(self, what: str, call: Call | None) -> Cell:
        """Milliseconds, or the error's name; None without a call."""
        if call is None:
            return None
        try:
            cell: Cell = self.timer(call)
        except Exception as error:
            cell = self.note(what, error)
        release()  # only here, where the error no longer holds the tensors of its frames
        return cell

    def note(self, what: str, error: Exception) -> str:
        """Keep the error's first line for the report; returns its name."""
        text = (str(error).strip().splitlines() or [""])[0][:200]
        self.errors.append(f"{what}: {type(error).__name__}: {text}")
        print(self.errors[-1], file=sys.stderr, flush=True)
        return type(error).__name__

    def case(self, label: Label, run: Callable[..., None], *args: Any) -> None:
        """``run(self, *args)``; what its preparation raises becomes a row, and its memory is freed."""
        try:
            run(self, *args)
        except Exception as error:
            self.rows.append(Row(*label, ours_ms=self.note(" ".join(label), error)))
        gc.collect()
        release()

    def add(
        self,
        label: Label,
        ours: Call | None,
        peer: Peer | None = None,
        *,
        floor: float | None = None,
        goal: Goal | None = None,
        others: Mapping[str, Call] | None = None,
        derive: Callable[[Row], None] | None = None,
    ) -> Row:
        """Time one row.

        Args:
            label: its name.
            ours: our call.
            peer: the peer's.
            floor: bytes that must be moved.
            goal: judged last.
            others: further calls, timed into ``extra`` as ``<key>_ms``.
            derive: computes further figures of ``extra`` from the times.
        """
        what = " ".join(label)
        row = Row(*label, ours_ms=self.attempt(f"{what}: ours", ours), floor_ms=self.floor_ms(floor))
        if peer is not None:
            row.peer, row.peer_ms = peer.name, self.attempt(f"{what}: {peer.name}", peer.call)
        for name, call in (others or {}).items():
            row.extra[f"{name}_ms"] = self.attempt(f"{what}: {name}", call)
        if derive is not None:
            try:
                derive(row)
            except Exception as error:
                row.extra["error"] = self.note(what, error)
        row.finish(goal)
        self.rows.append(row)
        return row

    def both_ways(
        self,
        label: Label,
        ours: Call | None,
        peer: Peer | None,
        leaves: Sequence[Tensor],
        gradient: Tensor | Sequence[Tensor],
        *,
        floors: tuple[float | None, float | None] = (None, None),
        goals: tuple[Goal | None, Goal | None] = (None, None),
        others: Mapping[str, Call] | None = None,
        derive: Callable[[Row, bool], None] | None = None,
    ) -> list[Row]:
        """A row for the forward pass and one for forward and backward together, with gradients of ``leaves``."""
        rows = []
        for back, way in enumerate(("forward", "forward+backward")):

            def wrap(call: Call | None, back: int = back) -> Call | None:
                if call is None:
                    return None
                return with_backward(call, leaves, gradient) if back else without_gradient(call)

            rows.append(
                self.add(
                    label._replace(name=f"{label.name} {way}".strip()),
                    wrap(ours),
                    peer and Peer(peer.name, wrap(peer.call)),
                    floor=floors[back],
                    goal=goals[back],
                    others={name: wrap(call) for name, call in (others or {}).items()},
                    derive=None if derive is None else lambda row, back=back: derive(row, bool(back)),
                )
            )
        return rows

    def peak_bytes(self, call: Call) -> int | None:
        """Most memory allocated while it runs, beyond what was allocated before; None where nothing counts it."""
        if self.device.type != "cuda":
            call()
            return None
        gc.collect()
        torch.cuda.synchronize()
        release()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def without_gradient(call: Call) -> Call:
    """The call as inference makes it."""

    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def with_backward(call: Call, leaves: Sequence[Tensor], gradient: Tensor | Sequence[Tensor]) -> Call:
    """The call and the gradients of ``leaves``."""
    return lambda: torch.autograd.grad(call(), leaves, gradient)


def release() -> None:
    """Give cached device memory back. After a fault of the device this raises too, and says nothing new."""
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
