"""Layouts drawn at random, against an account of what works that shares nothing with the code it checks."""

import dataclasses
import itertools
import math
import random
from fractions import Fraction

from mmtrain.config import ModelConfig, ParallelConfig
from mmtrain.errors import ConfigError
from mmtrain.parallel.layout import plan_layout
from tests.parallel.advice import AXES, advised


def shares(total, ranks):
    return total in range(0, total + 1, ranks)


# An independent account of what works: sizes of the remaining axes are tried one by one.
def works(world, parallel, shape, seq_lens):
    pp, cp, tp, ep, etp = (getattr(parallel, axis) for axis in AXES)
    chunks, heads = parallel.pp_chunks, shape.num_kv_heads
    return all((
        any(pp * dp * cp * tp == world for dp in range(1, world + 1)),
        any(pp * edp * ep * etp == world for edp in range(1, world + 1)),
        pp * chunks in range(1, shape.num_layers + 1),
        chunks > 1 if parallel.pp_schedule == "interleaved" else True,
        chunks == 1 if parallel.pp_schedule == "1f1b" else True,
        shares(shape.num_heads, tp),
        shares(heads, tp) or any(heads * copies == tp for copies in range(1, tp + 1)),
        shape.vocab_size >= tp,
        shares(shape.shared_ffn_hidden_size if shape.num_experts else shape.ffn_hidden_size, tp),
        all(shares(length * parallel.micro_batch_rows, cp * tp) for length in seq_lens),
        cp == 1 or all(shares(length * parallel.micro_batch_rows, cp * parallel.cp_chunks) for length in seq_lens),
        shares(shape.num_experts, ep) if shape.num_experts else ep == 1,
        any(etp * held == shape.ffn_hidden_size for held in range(8, 1000, 8)) if shape.num_experts else etp == 1,
    ))  # fmt: skip


def factor(changes, parallel):
    """By how much the changed sizes differ from those asked for, multiplied up."""
    pairs = [sorted((size, getattr(parallel, axis))) for axis, size in changes.items()]
    return math.prod(Fraction(larger, smaller) for smaller, larger in pairs)


def draw(rng, worlds):
    """A random job; sizes are mostly divisors of the number of processes, so that about as many work as do not."""
    world = rng.choice(worlds)
    divisors = [size for size in range(1, world + 1) if world % size == 0]

    def size():
        return rng.choice([1, 1, rng.choice(divisors), rng.choice(divisors), rng.randint(1, 12)])

    heads = rng.choice([4, 6, 8, 12, 24])
    shape = ModelConfig(
        name="m",
        hidden_size=64,
        head_dim=8,
        rotary_dim=4,
        vocab_size=rng.choice([3, 160]),
        num_layers=rng.choice([4, 8, 12]),
        num_heads=heads,
        num_kv_heads=rng.choice([kv for kv in range(1, heads + 1) if heads % kv == 0]),
        num_experts=(experts := rng.choice([0, 4, 8, 12])),
        ffn_hidden_size=rng.choice([32, 96, 192, 240] if experts else [90, 96, 192]),
        shared_ffn_hidden_size=rng.choice([0, 0, 36, 48]),
    )
    shape.validate()
    schedule = rng.choice(["1f1b", "1f1b", "interleaved", "zero_bubble"])
    chunks = rng.choice({"1f1b": [1, 1, 1, 2], "interleaved": [2, 2, 3, 1], "zero_bubble": [1, 2]}[schedule])
    parallel = ParallelConfig(
        cp=rng.choice([1, size()]), cp_chunks=rng.choice([1, 2, 8]), tp=size(), pp=rng.choice([1, size()]), ep=size(),
        etp=rng.choice([1, size()]), pp_schedule=schedule, pp_chunks=chunks, micro_batch_rows=rng.choice([1, 2]),
    )  # fmt: skip
    return world, parallel, shape, rng.choice([[], [48], [16, 48], [18]])


def test_random_layouts_are_accepted_exactly_when_they_work():
    rng = random.Random(20250101)
    accepted = 0
    for _ in range(3000):
        world, parallel, shape, seq_lens = draw(rng, worlds=[1, 2, 4, 6, 7, 8, 12, 16, 24, 32, 48])
        expected = works(world, parallel, shape, seq_lens)
        try:
            layout = plan_layout(world, parallel, shape, seq_lens)
        except ConfigError as error:
            assert not expected, str(error)
            continue
        assert expected, (world, parallel, shape)
        assert layout.world == layout.pp * layout.dp * layout.cp * layout.tp == world
        assert layout.pp * layout.edp * layout.ep * layout.etp == world
        assert tuple(getattr(layout, axis) for axis in AXES) == tuple(getattr(parallel, axis) for axis in AXES)
        accepted += 1
    assert 500 < accepted < 2250


def test_advice_is_complete_and_as_small_as_can_be():
    rng = random.Random(7)
    seen = 0
    for _ in range(120):
        world, parallel, shape, seq_lens = draw(rng, worlds=[2, 4, 6, 7, 8, 12])
        try:
            plan_layout(world, parallel, shape, seq_lens)
            continue
        except ConfigError as error:
            if error.option == "parallel.pp_chunks":  # no layout mends these
                continue
            given = advised(error.fix)
        divisors = [size for size in range(1, world + 1) if world % size == 0]
        changes = []
        for sizes in itertools.product(divisors, repeat=5):
            tried = dataclasses.replace(parallel, **dict(zip(AXES, sizes, strict=True)))
            if works(world, tried, shape, seq_lens):
                changes.append({axis: size for axis, size in zip(AXES, sizes, strict=True)
                                if size != getattr(parallel, axis)})  # fmt: skip
        fewest = min(map(len, changes))
        smallest = [one for one in changes if len(one) == fewest]
        assert all(one in smallest for one in given)
        assert [factor(one, parallel) for one in given] == sorted(factor(one, parallel) for one in smallest)[:3]
        seen += 1
    assert seen > 30
