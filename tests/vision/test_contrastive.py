"""The contrastive loss of one rank against CLIP's of transformers, and what its figures say."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.config import ContrastiveConfig
from mmtrain.model.init import initialise_parameters
from mmtrain.vision.contrastive import ContrastiveHead, OneRank, contrastive_loss

CONFIG = ContrastiveConfig(size=6, weight=1.0, temperature=0.1)


def head(seed: int = 1) -> ContrastiveHead:
    made = ContrastiveHead(CONFIG, 10, 8)
    initialise_parameters(made, seed)
    return made.double()


def features(pairs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (pairs, 10), (pairs, 8)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)


def by_clip(made: ContrastiveHead, image_PF: Tensor, text_PD: Tensor) -> Tensor:
    """The loss as transformers' CLIP has it."""
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    image_PE, text_PE = image_PF @ made.image_EF.t(), text_PD @ made.text_ED.t()
    image_PE, text_PE = (x / x.norm(dim=1, keepdim=True) for x in (image_PE, text_PE))
    return image_text_contrastive_loss(text_PE @ image_PE.t() * made.log_scale_1.exp())


@pytest.mark.parametrize(("pairs", "most"), [(5, 5), (5, 9), (1, 4)])
def test_loss_and_gradients_are_those_of_clip(pairs: int, most: int) -> None:
    made, inputs = head(), features(pairs)
    leaves = [*inputs, *made.parameters()]
    found = made(*inputs, most)
    expected = by_clip(made, *inputs)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-12) and int(found.pairs) == pairs
    ours, theirs = (torch.autograd.grad(loss, leaves) for loss in (found.loss, expected))
    for name, mine, other in zip(("images", "texts", "image_EF", "text_ED", "log_scale_1"), ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12, msg=name)


def test_it_begins_at_the_temperature_and_stops_at_clip_s_largest_scale() -> None:
    made = head()
    assert made.scale.item() == pytest.approx(1 / CONFIG.temperature, rel=1e-6)
    made.log_scale_1.data.fill_(math.log(250.0))
    assert made.scale.item() == pytest.approx(100.0)
    made.scale.sum().backward()
    assert made.log_scale_1.grad.item() == 0


def test_accuracies_count_whose_own_is_nearest() -> None:
    eye_44 = torch.eye(4)
    text_44 = eye_44[[0, 1, 3, 2]]  # the last two captions are swapped
    found = contrastive_loss(eye_44, text_44, torch.ones(1), 6, OneRank())
    assert (found.image_to_text.item(), found.text_to_image.item(), found.pairs.item()) == (0.5, 0.5, 4)
    crowd_44 = torch.nn.functional.normalize(torch.ones(4, 4) + 0.1 * eye_44)
    both = contrastive_loss(eye_44, F.normalize(crowd_44 + eye_44[:1]), torch.ones(1), 4, OneRank())
    assert both.image_to_text.item() == 1.0 and both.text_to_image.item() == 0.25


def test_a_batch_without_pairs_has_no_loss_and_gradients_of_zero() -> None:
    made, inputs = head(), features(0)
    found = made(*inputs, 3)
    assert [value.item() for value in found] == [0, 0, 0, 0]
    found.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in made.parameters())
