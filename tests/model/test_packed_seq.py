"""A packed row is its documents run one by one, and nothing passes between them: every layer kind and the hybrid."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.model.loss import IGNORE
from mmtrain.model.packed_seq import Packing
from tests.model.small import draw, draw_tokens, gradients, relative, small_model

LENGTHS = [1, 2, 300, 1, 257, 70, 2]
KINDS = {
    "lightning": dict(num_layers=2, layer_pattern="L", num_experts=0),
    "softmax": dict(num_layers=2, layer_pattern="S", num_experts=0, rotary_dim=8),
    "lightning_experts": dict(num_layers=2, layer_pattern="L"),
    "softmax_experts": dict(num_layers=2, layer_pattern="S", rotary_dim=8),
    "hybrid_dense": dict(num_layers=8, num_experts=0, rotary_dim=8),
    "hybrid": dict(num_layers=8, rotary_dim=8),
    "hybrid_shared": dict(num_layers=4, layer_pattern="LLLS", shared_ffn_hidden_size=24, post_norm=False),
}
DEEP = "hybrid_dense"  # eight layers, whose kinds the other cases have too
DENSE_KINDS = [kind for kind, changes in KINDS.items() if changes.get("num_experts") == 0]


def model_and_tolerance(kind: str) -> tuple[nn.Module, float]:
    """Dense models in float64; experts in fp32, where a product's rounding depends on the rows it is given."""
    model = small_model(**KINDS[kind])
    return (model.double(), 1e-12) if kind in DENSE_KINDS else (model, 1e-5)


def spans(lengths: list[int]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise([0, *torch.tensor(lengths).cumsum(0).tolist()])]


def labels_of(tokens: Tensor, lengths: list[int]) -> Tensor:
    """The next token of the same document; the last token of each has none."""
    labels = tokens.roll(-1)
    labels[torch.tensor(lengths).cumsum(0) - 1] = IGNORE
    return labels


def ce_gradients(model: nn.Module, tokens: Tensor, lengths: list[int], labels: Tensor) -> tuple[Tensor, dict]:
    model.zero_grad()
    out = model(tokens, Packing.from_lengths(lengths), labels)
    out.ce_sum.backward()
    return out.ce_sum.detach(), gradients(model)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k == DEEP else k for k in KINDS])
def test_packed_row_equals_its_documents_one_by_one(kind: str) -> None:
    model, tolerance = model_and_tolerance(kind)
    tokens = draw_tokens(sum(LENGTHS))
    labels = labels_of(tokens, LENGTHS)
    with torch.no_grad():
        logits = model(tokens, Packing.from_lengths(LENGTHS))
        alone = [model(tokens[span], Packing.from_lengths([span.stop - span.start])) for span in spans(LENGTHS)]
    for span, document in zip(spans(LENGTHS), alone, strict=True):
        assert relative(logits[span], document) < tolerance, span

    loss, packed = ce_gradients(model, tokens, LENGTHS, labels)
    total, summed = torch.zeros_like(loss), {name: torch.zeros_like(g) for name, g in packed.items()}
    for span in spans(LENGTHS):
        one, grads = ce_gradients(model, tokens[span], [span.stop - span.start], labels[span])
        total += one
        for name, grad in grads.items():
            summed[name] += grad
    assert relative(total, loss) < tolerance
    assert set(packed) == {name for name, _ in model.named_parameters()}
    for name, grad in packed.items():
        assert relative(grad, summed[name]) < 5 * tolerance, name


@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_a_changed_token_changes_no_bit_of_other_documents(kind: str) -> None:
    model = small_model(**KINDS[kind])
    tokens, packing = draw_tokens(sum(LENGTHS)), Packing.from_lengths(LENGTHS)
    with torch.no_grad():
        before = model(tokens, packing)
        for document in spans(LENGTHS):
            changed = tokens.clone()
            changed[document.start] = (changed[document.start] + 1) % 160
            difference = (model(changed, packing) - before).abs().amax(-1)
            assert (difference[document] > 0).all(), "the change is seen in its own document"
            difference[document] = 0
            assert torch.count_nonzero(difference) == 0, document


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_crosses_documents(kind: str) -> None:
    model = small_model(**KINDS[kind])
    tokens, packing = draw_tokens(sum(LENGTHS)), Packing.from_lengths(LENGTHS)
    embedded = F.embedding(tokens, model.embed_tokens.weight.detach()).requires_grad_()
    model.embed_tokens.lookup = lambda *_: embedded
    logits, upstream = model(tokens, packing), draw(160, dtype=torch.float32)
    for document in spans(LENGTHS):
        (grad,) = torch.autograd.grad((logits[document] @ upstream).sum(), embedded, retain_graph=True)
        assert (grad[document].abs().amax(-1) > 0).all()
        assert torch.count_nonzero(grad) == torch.count_nonzero(grad[document])


@pytest.mark.parametrize("kind", ["lightning", "softmax", "hybrid"])
def test_no_gradient_comes_from_later_tokens(kind: str) -> None:
    model = small_model(**KINDS[kind])
    tokens, packing = draw_tokens(300), Packing.from_lengths([300])
    embedded = F.embedding(tokens, model.embed_tokens.weight.detach()).requires_grad_()
    model.embed_tokens.lookup = lambda *_: embedded
    logits, upstream = model(tokens, packing), draw(160, dtype=torch.float32)
    for t in (0, 1, 255, 256, 298):
        (grad,) = torch.autograd.grad(logits[t] @ upstream, embedded, retain_graph=True)
        assert torch.count_nonzero(grad[t + 1 :]) == 0
        assert grad[t].abs().max() > 0


def test_lengths_of_zero_are_documents_without_tokens() -> None:
    model = small_model(**KINDS["hybrid"])
    tokens = draw_tokens(12)
    with torch.no_grad():
        assert torch.equal(model(tokens, Packing.from_lengths([0, 5, 0, 0, 7, 0])),
                           model(tokens, Packing.from_lengths([5, 7])))  # fmt: skip


def test_positions_begin_again_in_every_document() -> None:
    packing = Packing.from_lengths([3, 1, 2], start=10)
    assert packing.cu_seqlens.tolist() == [0, 3, 4, 6] and packing.cu_seqlens.dtype == torch.int32
    assert packing.position_ids_T.tolist() == [10, 11, 12, 10, 10, 11]
    assert packing.max_seqlen == 3 and packing.lengths == (3, 1, 2)
    assert Packing(packing.cu_seqlens, packing.position_ids_T, 3).lengths == (3, 1, 2)


def test_softmax_layers_read_the_position_ids_and_lightning_layers_do_not() -> None:
    tokens, packing = draw_tokens(40), Packing.from_lengths([25, 15])
    stretched = Packing(packing.cu_seqlens, packing.position_ids_T * 3, packing.max_seqlen)
    shifted = Packing.from_lengths([25, 15], start=1000)
    with torch.no_grad():
        softmax, lightning = (small_model(**KINDS[kind]) for kind in ("softmax", "lightning"))
        expected = softmax(tokens, packing)
        assert relative(softmax(tokens, stretched), expected) > 1e-3
        assert relative(softmax(tokens, shifted), expected) < 1e-5
        assert torch.equal(lightning(tokens, stretched), lightning(tokens, packing))


@pytest.mark.parametrize("kind", ["softmax", "lightning", "hybrid"])
def test_masked_labels_add_no_loss_and_no_gradient(kind: str) -> None:
    model, tolerance = model_and_tolerance(kind)
    lengths, tokens = [30, 40, 9], draw_tokens(79)
    labels = labels_of(tokens, lengths)
    kept = torch.cat([tokens[:30], tokens[70:]])
    masked = labels.clone()
    masked[30:70] = IGNORE
    loss, grads = ce_gradients(model, tokens, lengths, masked)
    without, expected = ce_gradients(model, kept, [30, 9], labels_of(kept, [30, 9]))
    assert relative(loss, without) < tolerance
    for name, grad in grads.items():
        assert relative(grad, expected[name]) < 5 * tolerance, name

    one = labels.clone()
    one[5] = IGNORE
    with torch.no_grad():
        logits = model(tokens, Packing.from_lengths(lengths))
        whole, less = (model(tokens, Packing.from_lengths(lengths), each).ce_sum for each in (labels, one))
    torch.testing.assert_close(whole - less, F.cross_entropy(logits[5], labels[5]), rtol=0, atol=1e-3)
