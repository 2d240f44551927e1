"""Requests with images on ranks that share weights, experts or keys: as one process answers them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mmdata.tokenizer import load_tokenizer
from mmtrain.infer.engine import Engine
from mmtrain.infer.layout import RankLayout
from mmtrain.infer.open import open_model
from mmtrain.infer.serving.generation import GenerationRequest
from tests.dist.pool import Pool
from tests.infer.chain import save_run
from tests.infer.seen import prompt_of, seeing_model
from tests.infer.served import SMALL

OPTIONS = replace(SMALL, prefill_tokens=23, prefix_slots=8, prefix_interval=None, memory_bytes=1 << 24)
PROMPTS = ((3, (60, 25, 0), 4), ((28, 28, 1), 2, (28, 28, 2)), (9, (20, 70, 3), 1), (3, (60, 25, 4), 4))
Made = list[tuple[list[int], list[float]]]


def answers(engine: Engine) -> Made:
    """Tokens and log-probabilities of all prompts, asked twice: the second time a beginning of each is known."""
    model = seeing_model(vocab_size=300)
    asks = [GenerationRequest(tokens, 4, ignore_eod=True, logprobs=True, images=images,
                                  keep_prefix=(len(tokens) - 1,))
            for tokens, images in (prompt_of(model, *parts) for parts in PROMPTS)]  # fmt: skip
    made = engine.generate(asks) + engine.generate(asks)
    assert all(one.prefix_tokens for one in made[len(asks) :])
    return [(one.tokens, one.logprobs) for one in made]


def serve(path: str, axis: str) -> Made | None:
    """What rank 0 got; None on others."""
    with open_model(Path(path), RankLayout(**{axis: 2}), device="cpu") as opened:
        return opened.run(OPTIONS, answers)


@pytest.mark.parametrize("axis", ["tp", "ep", "cp"])
def test_ranks_answer_as_one_process_does(axis: str, pool: Pool, tmp_path: Path) -> None:
    model = seeing_model(vocab_size=300)
    save_run(tmp_path / "run", model)
    alone = answers(Engine(model, load_tokenizer("bytes"), OPTIONS))
    together, other = pool.run(serve, str(tmp_path / "run"), axis, world=2)
    assert other is None
    for (tokens, logprobs), (wanted, wanted_logprobs) in zip(together, alone, strict=True):
        assert tokens == wanted and logprobs == pytest.approx(wanted_logprobs, abs=1e-5)
