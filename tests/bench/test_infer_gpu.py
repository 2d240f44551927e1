"""The inference bench's arithmetic and passes, on a CPU with a small model."""

from __future__ import annotations

import pytest
import torch

from mmtrain.bench.infer_gpu import (
    CASES,
    Decode,
    Prefill,
    decode,
    filled,
    floor_bytes,
    main,
    model_config,
    prefill,
    served,
)
from mmtrain.errors import ConfigError
from mmtrain.infer.engine import Engine
from mmtrain.model.model import HybridLM
from tests.infer.served import SMALL
from tests.model.small import small_config


@pytest.fixture(scope="module")
def model() -> HybridLM:
    return served(small_config(num_layers=4, layer_pattern="LLLS"), torch.device("cpu"), torch.float32)


def nothing() -> None:
    """What waits for a device."""


@pytest.mark.parametrize("graphs", [None, True])
def test_decode(model: HybridLM, graphs: bool | None) -> None:
    found = decode(Decode("small", 3, 40, graphs), model, 1e12, 2, nothing)
    assert found["of_floor"] == pytest.approx(found["floor_ms"] / found["step_ms"])


def test_filled_documents_are_at_work(model: HybridLM) -> None:
    engine = Engine(model, options=SMALL)
    documents = filled(engine, 2, 9)
    assert [(one.computed, len(one.tokens), len(one.pages)) for one in documents] == [(9, 10, 19)] * 2
    assert documents[0].slot != documents[1].slot and not set(documents[0].pages) & set(documents[1].pages)


def test_floor(model: HybridLM) -> None:
    engine, config = Engine(model, options=SMALL), model.config
    weights = sum(p.numel() for n, p in model.named_parameters() if n != "embed_tokens.weight")
    state = 3 * config.num_heads * config.head_dim**2
    keys = 10 * 2 * config.num_kv_heads * config.head_dim
    assert floor_bytes(engine, model, 2, 10) == 4 * (weights + 2 * (2 * state + keys))


def test_prefill(model: HybridLM) -> None:
    found = prefill(Prefill("small", 50, 16), model, nothing)
    assert found["tokens_s"] > 0 and found["forward_tokens_s"] > 0


def test_cases() -> None:
    for case in CASES.values():
        assert model_config(case.model).num_layers > 0
    with pytest.raises(ConfigError, match="is no case"):
        main(["--out", "nowhere", "--only", "no"])
