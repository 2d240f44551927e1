"""The paper's figures as data, and how its Table 1 counts beside ours."""

import pytest

from mmtrain.config import ModelConfig
from mmtrain.model.flops import count_parameters, step_flops
from mmtrain.scaling.compute import isoflop_laws
from mmtrain.scaling.isoflop import fit_groups
from mmtrain.scaling.paper import FIGURE_13, PFLOP_S_DAY, TABLE_2, table1_flops, table1_parameters
from mmtrain.scaling.power import fit_power
from tests.scaling.made import paper_points

LAYERS, HIDDEN, HEADS, SEQ, BATCH = 16, 1536, 12, 4096, 3


def ours(pattern):
    """A dense model of Table 1's shape: heads x head_dim = d, as many kv heads, a feed-forward of 8/3 d."""
    feed_forward = 8 * HIDDEN // 3
    return ModelConfig("m", 1, HIDDEN, LAYERS, HEADS, HEADS, HIDDEN // HEADS, feed_forward, pattern, num_experts=0)


@pytest.mark.parametrize(("name", "pattern"), [("softmax", "S"), ("lightning", "L"), ("hybrid", "LLLLLLLS")])
def test_what_table_1_counts_otherwise(name, pattern):
    config, tokens, square = ours(pattern), BATCH * SEQ, LAYERS * HIDDEN**2
    lightning = {"softmax": 0.0, "lightning": 1.0, "hybrid": 7 / 8}[name]
    count, flops = count_parameters(config), step_flops(config, [SEQ] * BATCH)

    # Table 1 has no vectors, and in a lightning layer a gate of 2 d^2/h weights where the released model has d^2.
    vectors = count.activated_without_embeddings - sum(
        config.layer_types.count(letter) * weights for letter, weights in (("S", 12 * HIDDEN**2), ("L", 13 * HIDDEN**2))
    )
    assert 0 < vectors < 1e-3 * count.activated_without_embeddings
    gate = lightning * square * (1 - 2 / HEADS)
    expected = count.activated_without_embeddings - vectors - gate
    assert table1_parameters(name, LAYERS, HIDDEN, HEADS) == pytest.approx(expected, rel=1e-12)

    # Operations: all pairs of softmax attention where we count the causal half; three times our least of lightning
    # attention; no head; 20 l d a token beside; and no gate at all in a lightning layer, where we count its d^2.
    masked = 3 * flops.by_part["softmax_attention"] * (SEQ - 1) / (SEQ + 1)  # we count the diagonal too
    least = 3 * flops.by_part["lightning_attention"]
    assert least == pytest.approx(12 * lightning * square * tokens / HEADS, rel=1e-9)
    head, beside = 3 * flops.by_part["head"], 20 * LAYERS * HIDDEN * tokens
    expected = flops.total + masked + 2 * least - head + beside - 6 * tokens * lightning * square
    assert table1_flops(name, LAYERS, HIDDEN, HEADS, BATCH, SEQ) == pytest.approx(expected, rel=1e-9)


def test_table_2_is_not_6_n_d():
    sizes = {name: (row.parameters, row.tokens) for name, row in TABLE_2.items()}
    share = {name: 6 * n.beta * d.beta / PFLOP_S_DAY for name, (n, d) in sizes.items()}
    assert share == pytest.approx({"softmax": 0.324, "lightning": 0.843, "hybrid": 0.660}, abs=1e-3)
    grows = {name: n.alpha + d.alpha for name, (n, d) in sizes.items()}
    assert grows == pytest.approx({"softmax": 1.222, "lightning": 1.1154, "hybrid": 1.1377})
    assert TABLE_2["hybrid"].loss.at(PFLOP_S_DAY) == pytest.approx(3.4797)


def test_figure_13_gives_the_power_of_the_batch():
    law = fit_power(*zip(*FIGURE_13, strict=True), "B_crit(L)")
    assert law.alpha.value == pytest.approx(-6.12, abs=0.005)
    assert law.beta.value == pytest.approx(2.10e9, rel=0.005)


@pytest.mark.parametrize("architecture", sorted(TABLE_2))
def test_laws_of_table_2_are_recovered(architecture):
    minima, refused = fit_groups(paper_points(architecture))
    assert len(minima) == 7 and not refused
    laws, row = isoflop_laws(minima), TABLE_2[architecture]
    for name in ("loss", "parameters", "tokens"):
        found, printed = getattr(laws, name), getattr(row, name)
        assert found.alpha.value == pytest.approx(printed.alpha, rel=1e-6)
        assert found.beta.value == pytest.approx(printed.beta, rel=1e-6)


@pytest.mark.parametrize("name", ["loss", "parameters", "tokens"])
def test_intervals_hold_table_2_as_often_as_they_say(name):
    """Of 100 noisy sweeps 95 are expected within; 89 or fewer, or all 100, come once in a hundred times."""
    inside, printed = 0, getattr(TABLE_2["hybrid"], name)
    for seed in range(100):
        found = getattr(isoflop_laws(fit_groups(paper_points("hybrid", noise=0.002, seed=seed))[0]), name)
        assert found.alpha.value == pytest.approx(printed.alpha, rel=0.1)
        inside += found.alpha.low < printed.alpha < found.alpha.high
    assert 90 <= inside <= 99
