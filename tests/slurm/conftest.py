"""The Slurm that `make test-slurm` has brought up; between tests nothing runs on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dist.runs import environment, make_corpus
from tests.slurm.jobs import slurm, wait


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("SLURM_CONF"):
        for item in items:
            if item.get_closest_marker("slurm"):
                item.add_marker(pytest.mark.skip(reason="needs the Slurm of `make test-slurm`"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def empty_queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Jobs find this Python; none of them outlives its test."""
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, environment()[name])
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    yield
    slurm("scancel", "--user=root")
    wait("an empty queue", lambda: not slurm("squeue", "--noheader"), 60)
