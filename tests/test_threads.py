"""Workers of pytest-xdist share the cores: each computes with one thread, or as many as the environment says."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="this is no worker of pytest-xdist")
def test_a_worker_computes_with_the_threads_that_it_was_given() -> None:
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
