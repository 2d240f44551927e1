"""The memory of a model's eyes, as a prediction counts it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mmtrain.build import meta_model
from mmtrain.model.flops import count_parameters
from mmtrain.parallel.memory.eyes import eyes_memory, tiles_of_a_rank
from mmtrain.parallel.memory.predict import predict
from mmtrain.parallel.memory.workload import Workload, layer_parameters, root_parameters
from tests.parallel.memory.test_predict import workload

FROZEN_EYES, PROJECTOR_ALONE = ("encoder",), ("*", "!encoder.projector")


def test_a_model_of_text_has_none() -> None:
    found = eyes_memory(workload("model=hybrid_410m"))
    assert (found.tower.whole, found.ends.whole, found.kept) == (0, 0, 0.0)


def test_all_parameters_are_counted() -> None:
    work = workload("model=tiny_vl")
    found = eyes_memory(work)
    counted = sum(layer_parameters(work.model, work.layout, letter).whole for letter in work.model.layer_types)
    counted += root_parameters(work.model, work.layout, embedding=True, head=True).whole
    assert counted == count_parameters(work.model).total
    assert counted + found.tower.whole + found.ends.whole == sum(p.numel() for p in meta_model(work.model).parameters())


@pytest.mark.parametrize(
    ("frozen", "tower", "ends"), [((), True, True), (FROZEN_EYES, False, False), (PROJECTOR_ALONE, False, True)]
)
def test_what_is_frozen_has_no_moments_and_keeps_no_activations(
    frozen: tuple[str, ...], tower: bool, ends: bool
) -> None:
    work = workload("model=tiny_vl")
    found, all_trained = eyes_memory(replace(work, frozen=frozen)), eyes_memory(work)
    assert (found.tower_trained.whole > 0, found.ends_trained.whole > 0) == (tower, ends)
    assert (found.kept < all_trained.kept) is not tower


def test_ranks_that_train_a_row_share_its_tiles() -> None:
    alone, shared = workload("model=tiny_vl"), workload("model=tiny_vl", "parallel.cp=2", "parallel.tp=2", world=4)
    assert tiles_of_a_rank(alone) == 4 * tiles_of_a_rank(shared) == 8192 // 64
    assert eyes_memory(shared).kept < 0.5 * eyes_memory(alone).kept


def peak(*overrides: str, frozen: tuple[str, ...] = (), world: int = 8, text: bool = False) -> float:
    work: Workload = workload("model=vl_3b", *overrides, world=world, micro_batches=2)
    return predict(replace(work, frozen=frozen, model=replace(work.model, vision=None) if text else work.model)).peak


def test_eyes_need_memory_and_less_of_it_frozen_recomputed_or_beyond_the_first_stage() -> None:
    text, eyes = peak(text=True), peak()
    assert text < peak(frozen=FROZEN_EYES) < eyes
    assert peak("parallel.activation_checkpoint=block") - peak("parallel.activation_checkpoint=block", text=True) < (
        eyes - text
    )
    found = predict(workload("model=vl_3b", world=8))
    assert found.parts["images"] > 0 and predict(workload("model=hybrid_3b", world=8)).parts["images"] == 0
