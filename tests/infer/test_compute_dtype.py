"""A model served in bf16 computes as it does in training under that precision."""

from __future__ import annotations

from dataclasses import replace

import torch

from mmtrain.infer.compute_dtype import cast_for_compute
from mmtrain.infer.engine import Engine
from tests.infer.served import SMALL, full_logits, request, seen_logits, served_model, text_of
from tests.model.small import relative


def test_all_weights_but_those_of_routers_are_cast_and_states_stay_fp32() -> None:
    model = served_model()
    cast_for_compute(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "router" in name else torch.bfloat16), name
    engine = Engine(model, options=SMALL)
    dtypes = [value.dtype for layer in engine.memory.layers for value in vars(layer).values()]
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]  # of LLSL


def test_logits_of_bf16_are_near_those_of_its_whole_forward_pass() -> None:
    exact, model, text = served_model(), served_model(), text_of(30)
    cast_for_compute(model, torch.bfloat16)
    for prefill_tokens in (7, 64):
        with seen_logits() as seen:
            Engine(model, options=replace(SMALL, prefill_tokens=prefill_tokens)).generate([request(text, 1)])
        assert relative(seen[text], full_logits(exact, text)[-1]) < 0.05
