"""Whose turn it is to build DeepSpeed's kernel, also after a process that was killed as it did."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

from mmtrain.optim.host_kernel import build_turn


def build(folder: Path, killed: bool) -> None:
    """As torch does: the file `lock` is there while it builds."""
    with build_turn(folder):
        (folder / "lock").touch(exist_ok=False)
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        with (folder / "built").open("a") as built:
            built.write("once\n")
        (folder / "lock").unlink()


def build_elsewhere(folder: Path, killed: bool) -> int | None:
    process = multiprocessing.get_context("spawn").Process(target=build, args=(folder, killed))
    process.start()
    process.join(60)
    return process.exitcode


def test_the_lock_of_a_process_that_was_killed_is_removed(tmp_path: Path) -> None:
    assert build_elsewhere(tmp_path, killed=True) == -signal.SIGKILL and (tmp_path / "lock").exists()
    for _ in range(2):
        build(tmp_path, killed=False)
    assert (tmp_path / "built").read_text() == "once\nonce\n"


def test_the_lock_of_another_program_stays(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with build_turn(tmp_path):
        assert (tmp_path / "lock").exists()
