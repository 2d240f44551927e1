"""A sweep with a launcher that trains nothing, and a corpus that is only opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.runs import make_corpus
from tests.runs.sweep.stand_in import StandIn


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def stand_in(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)
