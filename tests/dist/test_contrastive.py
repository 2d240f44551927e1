"""The contrastive loss over ranks: the pairs of all are one batch, whatever fell to which."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from mmtrain.config import ParallelConfig
from mmtrain.errors import ConfigError
from mmtrain.parallel.caption_pairs import ReplicaPairs
from mmtrain.parallel.layout import plan_layout
from mmtrain.vision.contrastive import ContrastiveLoss, OneRank, contrastive_loss
from tests.dist.contrastive_steps import MODEL, PairsJob, train_pairs
from tests.dist.layouts import Outcome
from tests.dist.pool import Pool

COUNTS = [(3, 2), (4, 0), (1, 3, 2)]
MOST = 4


def vectors(counts: tuple[int, ...], rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit vectors of images and captions of a rank, or of all, and the scale; all want gradients."""
    generator = torch.Generator().manual_seed(len(counts))
    whole = torch.nn.functional.normalize(torch.randn(2, sum(counts), 5, generator=generator).double(), dim=-1)
    parts = whole if rank is None else whole.split(counts, 1)[rank]
    return *(part.clone().requires_grad_() for part in parts), torch.full((1,), 3.0).double().requires_grad_()


def on_ranks(counts: tuple[int, ...]) -> tuple[ContrastiveLoss, list[torch.Tensor]]:
    """The loss of this rank and the gradients of its vectors and scale."""
    dist.init_process_group("gloo")
    leaves = vectors(counts, dist.get_rank())
    found = contrastive_loss(*leaves, MOST, ReplicaPairs(dist.group.WORLD))
    found.loss.backward()
    return ContrastiveLoss(*(value.detach() for value in found)), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_losses_and_gradients_of_the_ranks_are_those_of_the_whole_batch(pool: Pool, counts: tuple[int, ...]) -> None:
    leaves = vectors(counts)
    expected = contrastive_loss(*leaves, sum(counts), OneRank())
    expected.loss.backward()
    outcomes = pool.run(on_ranks, counts, world=len(counts))
    for name in ("loss", "image_to_text", "text_to_image"):
        mean = sum(float(getattr(found, name)) for found, _ in outcomes) / len(counts)
        assert mean == pytest.approx(getattr(expected, name).item(), rel=1e-12), name
    for rank, (found, grads) in enumerate(outcomes):
        assert int(found.pairs) == sum(counts)
        for mine, leaf in zip(grads[:2], leaves[:2], strict=True):  # the mean over ranks is taken of weights' gradients
            wanted = leaf.grad.split(counts)[rank] * len(counts)
            torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-14, msg=f"rank {rank}")
    torch.testing.assert_close(sum(grads[2] for _, grads in outcomes) / len(counts), leaves[2].grad)


WHOLE: dict[str, Outcome] = {}


def one_process(pool: Pool, job: PairsJob, world: int) -> Outcome:
    """The same micro-batches on one process: as many rows more."""
    alone = replace(job, parallel=ParallelConfig(micro_batch_rows=world * job.parallel.micro_batch_rows))
    if repr(alone) not in WHOLE:
        WHOLE[repr(alone)] = pool.run(train_pairs, alone, world=1)[0]
    return WHOLE[repr(alone)]


@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": True}, {"activation_checkpoint": "block"}], ids=str)
def test_two_ranks_train_as_one_process_does(pool: Pool, options: dict) -> None:
    job = PairsJob(ParallelConfig(**options), rows=4, steps=2)
    one, outcomes = one_process(pool, job, 2), pool.run(train_pairs, job, world=2)
    assert one.results[0].figures["contrastive_pairs"] == 4 and one.results[0].figures["contrastive_loss"] > 0
    for rank, many in enumerate(outcomes):
        for step, (ours, theirs) in enumerate(zip(many.results, one.results, strict=True)):
            assert ours.figures == pytest.approx(theirs.figures, rel=1e-5), step
            assert (ours.loss, ours.aux_loss, ours.grad_norm) == pytest.approx(
                (theirs.loss, theirs.aux_loss, theirs.grad_norm), rel=2e-5
            )
        assert many.gradients.keys() == one.gradients.keys()
        for name, gradient in one.gradients.items():
            off = (many.gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-7)
            assert off < 1e-4, f"{name} on rank {rank}: {off:.2g}"
            if name.endswith("qkv_bias_3W"):  # keys' biases have no gradient but rounding, which AdamW makes steps of
                continue
            step = (one.after[name] - one.before[name]).norm()
            assert (many.after[name] - one.after[name]).norm() < 0.02 * step, name


def test_a_step_without_any_image_is_one_of_captions_alone(pool: Pool) -> None:
    (many, _) = pool.run(train_pairs, PairsJob(rows=2, first=5, steps=1), world=2)
    assert many.results[0].figures["contrastive_pairs"] == 2  # rows 5 and 6: one has no image
    (alone,) = pool.run(train_pairs, PairsJob(rows=1, first=5), world=1)
    assert alone.results[0].figures == {name: 0.0 for name in alone.results[0].figures}
    assert alone.results[0].aux_loss == 0 and not alone.results[0].skipped


@pytest.mark.parametrize("axis", ["tp", "cp", "pp"])
def test_other_layouts_are_refused_by_name(axis: str) -> None:
    with pytest.raises(ConfigError, match="data parallelism alone") as caught:
        plan_layout(2, ParallelConfig(**{axis: 2}), MODEL, [96])
    assert caught.value.option == f"parallel.{axis}"
