"""The scaling laws of MiniMax-01 (arXiv 2501.08313) as data: sizes and operations of Table 1, coefficients of Table 2,
and the marks of its batch sizes in Figure 13. Compute is in PFLOP/s-days there.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmtrain.model.flops import paper_table1

PFLOP_S_DAY = 1e15 * 86400
"""Operations of a PFLOP/s-day."""

ARCHITECTURES = ("softmax", "lightning", "hybrid")


@dataclass(frozen=True)
class PaperLaw:
    """A power law beta C^alpha, as printed.

    Attributes:
        beta: the value at one PFLOP/s-day.
        alpha: the exponent.
    """

    beta: float
    alpha: float

    def at(self, flops: float) -> float:
        """Return the law's value at a compute in FLOP."""
        return self.beta * (flops / PFLOP_S_DAY) ** self.alpha


@dataclass(frozen=True)
class PaperRow:
    """The laws of one architecture in Table 2: loss in nats a token, parameters without embeddings, tokens.

    Attributes:
        loss: L(C), the lowest loss for a compute.
        parameters: N_opt(C), the size that reaches it.
        tokens: D_opt(C), the tokens that reach it.
    """

    loss: PaperLaw
    parameters: PaperLaw
    tokens: PaperLaw


# Fitted by the paper on 70M to 7B parameters and at most 300B tokens, 8,192 a row, 4M a batch, at the fixed learning
# rate 3e-4 (section 2.2). C is not 6 N D by these laws: at one PFLOP/s-day 6 N_opt D_opt of softmax is 0.32 of it, and
# the exponents of N_opt and D_opt add up to 1.22 (softmax), 1.12 (lightning) and 1.14 (hybrid).
TABLE_2 = {
    "softmax": PaperRow(PaperLaw(3.7087, -0.0798), PaperLaw(1.82e8, 0.7118), PaperLaw(2.56e10, 0.5102)),
    "lightning": PaperRow(PaperLaw(3.5391, -0.0768), PaperLaw(2.74e8, 0.6470), PaperLaw(4.43e10, 0.4684)),
    "hybrid": PaperRow(PaperLaw(3.4797, -0.0763), PaperLaw(2.57e8, 0.6670), PaperLaw(3.70e10, 0.4707)),
}

# (training loss, tokens of a batch) where the batch is doubled, read off Figure 13 by eye.
FIGURE_13 = ((2.22, 16e6), (1.98, 32e6), (1.77, 64e6), (1.58, 128e6))


def table1_parameters(architecture: str, layers: int, hidden: int, heads: int) -> float:
    """Return parameters by Table 1, without embeddings: 12 l d^2, and what lightning layers add.

    Raises:
        ValueError: Table 1 has no such architecture.
    """
    return paper_table1(architecture, layers, hidden, heads, 1, 1)[0]


def table1_flops(architecture: str, layers: int, hidden: int, heads: int, batch: int, seq: int) -> float:
    """Return the operations of one training step by Table 1, forward and backward, in FLOP.

    Two things differ from :func:`mmtrain.model.flops.step_flops`. Softmax attention counts masked pairs too, twice
    ours. A lightning layer counts 36 d^2/h operations a token for its attention, three times the least it takes, which
    is ours, as blocks do more. The term 20 l d a token is in neither the head nor the products: we have none like it.

    Args:
        architecture: `softmax`, `lightning` or `hybrid` (7:1).
        layers: depth l.
        hidden: width d.
        heads: attention heads h.
        batch: sequences b.
        seq: tokens n of a sequence.

    Raises:
        ValueError: Table 1 has no such architecture.
    """
    return paper_table1(architecture, layers, hidden, heads, batch, seq)[1]
