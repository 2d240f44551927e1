"""Saving of a checkpoint: every rank writes its part, beside the steps that follow, and a folder appears when whole."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict

from mmtrain.checkpoint.agreement import on_main
from mmtrain.checkpoint.durable import sync_folder, write_text
from mmtrain.checkpoint.listing import REPLACED, WRITING
from mmtrain.checkpoint.manifest import FileSum, write_manifest
from mmtrain.checkpoint.progress import FORMAT, RECORD, Progress
from mmtrain.checkpoint.rank_writer import RankWriter
from mmtrain.checkpoint.staging import StagingBuffer
from mmtrain.checkpoint.tensor_index import write_index
from mmtrain.errors import brief
from mmtrain.model.weights import local

_COUNT = 8  # bytes of a count of steps, at most
# The optimizer's state is saved by parameter, not by group: ranks of a pipeline have groups of other parameters.
BY_PARAMETER = StateDictOptions(flatten_optimizer_state_dict=True)


class SaveFailed(Exception):
    """A checkpoint that could not be written; nothing of it is left, and the older ones are as they were.

    Raised on all ranks alike. The message names the rank that failed, and why.
    """

    EXIT_CODE = 1


class PendingSave:
    """A checkpoint that is being written while the run goes on.

    Args:
        final: the folder that it will be.
        write: writes all that this rank has to write, and returns the checksums of its file of tensors.
        let_go: returns once the tensors that are saved may change.

    Attributes:
        seconds: that this rank's writing took, once it is done.
        bytes: of the files of all ranks' tensors, once it is finished.
    """

    def __init__(
        self, final: Path, write: Callable[[], dict[str, FileSum]], let_go: Callable[[], None] = lambda: None
    ) -> None:
        self.final, self.let_go = final, let_go
        self._write, self._thread = write, threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._sums: dict[str, FileSum] = {}
        self._problem: str | None = None
        self.seconds, self.bytes = 0.0, 0

    def start(self) -> None:
        """Write in a thread. A process that ends on an error does not wait for it."""
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        """Whether this rank has not written its part yet."""
        return self._thread.is_alive()

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            self._sums = self._write()
        except Exception as error:  # told to all ranks by `finish`, which a thread's error would not reach
            self._problem = _why(error)
        self.seconds = time.perf_counter() - began

    def finish(self) -> Path:
        """Wait for all ranks, and give the checkpoint its name. Collective.

        Returns:
            The folder of the checkpoint.

        Raises:
            SaveFailed: a rank could not write; on all ranks.
        """
        if self._thread.ident is None:
            self._run()
        else:
            self._thread.join()
        world = dist.get_world_size()
        told: list[tuple[dict[str, FileSum], str | None]] = [({}, None)] * world
        dist.all_gather_object(told, (self._sums, self._problem))
        hashed = {name: made for sums, _ in told for name, made in sums.items()}
        self.bytes = sum(one.size for one in hashed.values())
        scratch = _scratch(self.final)
        for rank, (_, problem) in enumerate(told):
            if problem is not None:
                raise _failed(self.final, problem, rank)
        try:
            on_main(lambda: _name(scratch, self.final, hashed))
        except OSError as error:
            raise _failed(self.final, _why(error), 0) from error
        return self.final


def begin_save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: dict[str, Any],
    rope_base: float,
    extra: dict[str, Any] | None = None,
    attach: Callable[[Path], None] | None = None,
    copy: StagingBuffer | None = None,
    writer: RankWriter | None = None,
) -> PendingSave:
    """Begin to write `folder`/step-N: weights, optimizer state, progress, configuration and RoPE base. Collective.

    Files go to a scratch folder that is renamed when all ranks have written theirs and everything is on the disk, so a
    checkpoint under its final name is always whole, and an interrupted one leaves the older ones as they were. Each
    rank hashes what it writes; the main process puts all checksums into the manifest.

    Args:
        folder: the run's folder of checkpoints.
        model: the model as it is laid over the ranks.
        optimizer: its optimizer.
        progress: where the run stands.
        config: every option of the run.
        rope_base: base that the last step was trained with; it cannot be read off the weights.
        extra: more entries of the record, as JSON.
        attach: writes more files into the folder before it gets its name; called on the main process, in the thread.
        copy: memory for a copy of the tensors, which is written while the run goes on; the optimizer's next step must
            wait for `PendingSave.let_go`. None writes the tensors themselves, in `PendingSave.finish`.
        writer: of the save before of this model and optimizer in this layout, which keeps its plan; none is in use.

    Raises:
        SaveFailed: the folder cannot be made; on all ranks, which may go on.
    """
    final = folder / f"step-{progress.step:08d}"
    scratch, writer = _scratch(final), writer or RankWriter()
    weights, moments = state_of(model, optimizer)
    try:
        on_main(lambda: _make_empty(scratch))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own deprecations
            writer.take(scratch, {"model": weights, "optimizer": moments})
    except CheckpointException as error:  # of one rank or several; all ranks get it
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, KeyboardInterrupt | SystemExit):
            raise
        raise _failed(final, _why(cause), rank) from error
    except OSError as error:
        raise _failed(final, _why(error), 0) from error
    meta = {"format": FORMAT, **asdict(progress), "rope_base": rope_base, "config": config, **(extra or {})}

    def write() -> dict[str, FileSum]:
        sums = writer.write(None if copy is None else copy.finish())
        if writer.metadata is not None:  # the main process
            if attach is not None:
                attach(scratch)
            write_index(scratch, writer.metadata)
            write_text(scratch / RECORD, json.dumps(meta, indent=1) + "\n")
        return sums

    if copy is None:
        return PendingSave(final, write)
    buffers = {f"model.{name}" for name, _ in model.named_buffers()}
    copy.start(writer.tensors, [name in buffers for name in writer.names])
    writer.tensors = []  # they are not looked at any more
    pending = PendingSave(final, write, copy.wait)
    pending.start()
    return pending


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return weights and optimizer state by parameter; no state where none of this rank's parameters is trained."""
    if not any(group["params"] for group in optimizer.param_groups):
        return get_model_state_dict(model), {}
    return get_state_dict(model, optimizer, options=BY_PARAMETER)


def most_bytes(model: nn.Module) -> int:
    """Return the bytes of a rank's tensors at most: weights, two moments and a count of steps of each, and buffers."""
    weights = sum(3 * local(parameter).nbytes + _COUNT for parameter in model.parameters())  # moments are fp32 as they
    return weights + sum(buffer.nbytes for buffer in model.buffers())


def _scratch(final: Path) -> Path:
    return final.with_name(f"{final.name}{WRITING}")


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _name(scratch: Path, final: Path, hashed: dict[str, FileSum]) -> None:
    """Write the manifest, the last file, and give a checkpoint its name; all else is on the disk.

    One that has the name already, of a step that was run again, goes only once the new one is in place.
    """
    write_manifest(scratch, int(final.name[5:]), hashed)
    replaced = final.with_name(f"{final.name}{REPLACED}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(scratch, final)
    shutil.rmtree(replaced, ignore_errors=True)
    sync_folder(final.parent)


def _failed(final: Path, why: str, rank: int) -> SaveFailed:
    """Remove what was written of a checkpoint that failed; no rank writes any more."""
    if dist.get_rank() == 0:
        shutil.rmtree(_scratch(final), ignore_errors=True)
    return SaveFailed(f"{final} could not be written: {why} (rank {rank})")


def _why(cause: BaseException) -> str:
    return cause.strerror or str(cause) if isinstance(cause, OSError) else brief(cause)
