"""Checkpoints that the tests of decoding read, written once."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.infer.chain import chain_model, save_run

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "generate.py"


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose greedy continuation is known."""
    folder = tmp_path_factory.mktemp("runs") / "chain"
    save_run(folder, chain_model(certainty=3.0))
    return folder


@pytest.fixture
def main() -> Callable[[list[str]], int]:
    """The launcher's main function, called in this process."""
    spec = importlib.util.spec_from_file_location("launch_generate", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main
