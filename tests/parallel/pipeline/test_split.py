"""The split of layers into stages, against all splits there are."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from mmtrain.build import meta_model
from mmtrain.config import ModelConfig
from mmtrain.model.flops import step_flops
from mmtrain.parallel.pipeline.split import layer_costs, split_layers, split_stages
from mmtrain.vision.flops import encoder_flops
from mmtrain.vision.model import VisionLanguageModel
from tests.dist.vision_steps import EYES

SMALL = ModelConfig("small", vocab_size=101, hidden_size=32, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=8,
                    ffn_hidden_size=32, layer_pattern="LLS", rotary_dim=4, num_experts=4)  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_no_split_has_a_cheaper_costliest_stage(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 9)
    model = replace(SMALL, num_layers=count, layer_pattern="".join(draw.choices("LS", k=count)),
                    vocab_size=draw.choice([8, 101, 5000]))  # fmt: skip
    stages, seq_len = draw.randint(1, count), draw.choice([16, 256, 8192])
    costs, head = layer_costs(model, seq_len)

    def costliest(bounds: tuple[int, ...]) -> float:
        sums = [sum(costs[start:end]) for start, end in pairwise(bounds)]
        return max([*sums[:-1], sums[-1] + head])

    best = min(costliest((0, *cuts, count)) for cuts in combinations(range(1, count), stages - 1))
    found = split_layers(model, stages, seq_len)
    bounds = (found[0].start, *(part.stop for part in found))
    assert [len(part) >= 1 for part in found] == [True] * stages
    assert bounds[0] == 0 and bounds[-1] == count
    assert costliest(bounds) == pytest.approx(best)

    def evenness(bounds: tuple[int, ...]) -> tuple[int, int]:
        sizes = [end - start for start, end in pairwise(bounds)]
        return max(sizes), sum(size**2 for size in sizes)

    equals = [cut for cut in ((0, *cuts, count) for cuts in combinations(range(1, count), stages - 1))
              if costliest(cut) <= best * (1 + 1e-9)]  # fmt: skip
    assert evenness(bounds) == min(map(evenness, equals))


def test_costs_are_those_of_the_whole_model() -> None:
    costs, head = layer_costs(SMALL, 64)
    assert sum(costs) + head == pytest.approx(step_flops(SMALL, [64]).forward)
    assert costs[2] > costs[0] or costs[2] < costs[0]  # the two kinds differ


def test_long_softmax_layers_get_stages_of_their_own() -> None:
    model = replace(SMALL, num_layers=8, layer_pattern="LLLS")
    assert split_layers(model, 2, 64) == [range(0, 4), range(4, 8)]
    assert [len(part) for part in split_layers(model, 4, 10**7)].count(1) >= 1


def test_parts_keep_their_names_and_share_their_modules() -> None:
    names = dict(meta_model(SMALL).named_parameters()).keys()
    found = []
    for rank in range(2):
        model = meta_model(SMALL)
        stages = split_stages(model, rank, 2, 2, split_layers(SMALL, 4, 64))
        assert list(stages) == [rank, rank + 2]
        mine = [name for name, _ in model.named_parameters()]
        parts = [(name, p) for stage in stages.values() for name, p in stage.named_parameters()]
        assert sorted(name for name, _ in parts) == sorted(mine)
        assert all(dict(model.named_parameters())[name] is p for name, p in parts)
        assert model.layer_numbers == sorted(n for stage in stages.values() for n in stage.layer_numbers)
        found += mine
    assert sorted(found) == sorted(names)


def test_a_middle_stage_has_only_layers() -> None:
    model = meta_model(SMALL)
    model.prune({3}, embedding=False, head=False)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"layers"}
    assert model.layer_numbers == [3]


def test_eyes_lie_with_the_embedding_and_so_does_their_work() -> None:
    config = replace(SMALL, vision=EYES)
    model = meta_model(config)
    assert isinstance(model, VisionLanguageModel)

    def work(*_: object) -> None:
        raise AssertionError

    model.image_work = work
    stages = split_stages(model, 0, 2, 2, split_layers(config, 4, 64))
    assert [stage.encoder is None for stage in stages.values()] == [False, True]
    assert all(stage.image_work is work for stage in stages.values()) and stages[0].encoder is model.encoder
    other = meta_model(config)
    split_stages(other, 1, 2, 2, split_layers(config, 4, 64))
    assert other.encoder is None


def test_the_first_layer_costs_what_eyes_cost_too() -> None:
    (first, *others), _ = layer_costs(replace(SMALL, vision=EYES), 64)
    (without, *same), _ = layer_costs(SMALL, 64)
    assert others == same
    assert first - without == encoder_flops(replace(SMALL, vision=EYES), 64 / EYES.patches, 64) > 0
