"""One small corpus and one pool of worker processes for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dist.pool import Pool
from tests.dist.runs import make_corpus
from tests.dist.saved_run import SavedRun, save_run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Workers for up to eight ranks; none starts before a test runs something on it.

    New ones for each file: gloo's threads outlive their groups, and each wakes a hundred times a second.
    """
    with Pool(8) as workers:
        yield workers


@pytest.fixture(scope="session")
def saved(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    """A run of three steps on two ranks; tests that change it copy it first."""
    return save_run(corpus, tmp_path_factory.mktemp("saved"))
