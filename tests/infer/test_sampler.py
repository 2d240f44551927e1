"""The choice of tokens by what requests ask for, whichever way it takes on the device."""

from __future__ import annotations

import pytest
import torch

from mmtrain.errors import ConfigError
from mmtrain.infer.sampling import Sampling
from mmtrain.infer.serving.document import Document
from mmtrain.infer.serving.generation import GenerationRequest
from mmtrain.infer.serving.sampler import Sampler

EOD, KNOWN, WIDTH = 2, 6, 8


def document(**asked: object) -> Document:
    """A request after the tokens 3 and 1."""
    request = GenerationRequest((3, 1), 4, **asked)
    return Document(1, request, list(request.tokens), None)


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.bfloat16)


@pytest.mark.parametrize("other", [{}, {"logprobs": True}, {"sampling": Sampling(1.0, top_k=1)}], ids=str)
@pytest.mark.parametrize(
    ("asked", "token"),
    [({}, 2), ({"ignore_eod": True}, 3), ({"sampling": Sampling(repetition_penalty=2.0), "ignore_eod": True}, 0)],
    ids=str,
)
def test_each_row_by_its_own_request(asked: dict, token: int, other: dict) -> None:
    logits_NV = row(5, 1, 9, 7, 0, 0, 20, 20).repeat(2, 1)  # ids from 6 on are not known
    before = logits_NV.clone()
    choices = Sampler(KNOWN, EOD).choose([document(**asked), document(**other)], logits_NV)
    assert choices.tokens == [token, 2]
    assert torch.equal(logits_NV, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, WIDTH - 1])
@pytest.mark.parametrize("asked", [{}, {"sampling": Sampling(1.0)}], ids=["largest", "drawn"])
def test_logits_that_are_no_numbers_are_refused(value: float, place: int, asked: dict) -> None:
    logits_NV = row(*range(WIDTH))
    logits_NV[0, place] = value
    with pytest.raises(ConfigError, match="not finite"):
        Sampler(KNOWN, EOD).choose([document(**asked)], logits_NV)
