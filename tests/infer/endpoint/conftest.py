"""A server that the tests of a file share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mmdata.tokenizer import ByteTokenizer
from mmtrain.infer.engine import Engine
from tests.infer.endpoint.running import Running, byte_model, running, wait_for
from tests.infer.served import SMALL, assert_nothing_held


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """A server of a random model of bytes."""
    with running() as made:
        yield made


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    """The shared server, which must hold nothing after the test."""
    yield shared
    wait_for(lambda: shared.inside == 0)
    shared.in_engine(lambda: assert_nothing_held(shared.engine))


@pytest.fixture(scope="module")
def twin() -> Engine:
    """An engine of the same model, to ask directly."""
    return Engine(byte_model(), ByteTokenizer(), SMALL)
