"""Options of the evaluations that run inside training."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmtrain.config.allowed import above, at_least, check_allowed, one_of
from mmtrain.config.checks import require
from mmtrain.config.schema import Count

NEEDLE_KINDS = ("single", "multi", "multi_key", "variable_tracking")


@dataclass
class NeedlesConfig:
    """Needles in a haystack of held-out text (RULER's retrieval and variable-tracking tasks), scored under the layout.

    Attributes:
        enabled: run them.
        kinds: ``single`` needle; ``multi``: four needles, all asked for; ``multi_key``: one of four is asked for;
            ``variable_tracking``: one of two chains of five assignments is asked for. Empty: all of them.
        lengths: tokens of a sample, question and answer included; those beyond a phase's sequence length are left out
            of it. Empty: 1/8, 1/4, 1/2 and all of each phase's sequence length.
        depths: where the needle lies, 0 at the beginning and 1 right before the question. Several needles lie evenly
            from there to the end.
        samples: of each kind, length and depth, drawn by `data.seed`.
        every: steps between evaluations within a phase; 0 evaluates at the end of each phase only.
    """

    enabled: bool = False
    kinds: list[str] = field(default_factory=list, metadata=one_of(*NEEDLE_KINDS))
    lengths: list[Count] = field(default_factory=list, metadata=at_least(1))
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0], metadata=at_least(0, 1))
    samples: int = field(default=4, metadata=at_least(1))
    every: int = field(default=0, metadata=at_least(0, fix="0 evaluates at the end of each phase only"))


@dataclass
class EvalsConfig:
    """Evaluations inside training, and the time that they may take.

    Attributes:
        max_share: largest share of a phase's time. Evaluations are measured, one sample of each length first; where
            they would take more, they are set further apart or made smaller, and a line says so. Chosen here.
        needles: needles in a haystack of held-out text.
    """

    max_share: float = field(default=0.02, metadata=above(0, 0.5))
    needles: NeedlesConfig = field(default_factory=NeedlesConfig)

    def validate(self) -> None:
        """Refuse kinds, depths and lengths that there are not, none of them, or one twice."""
        check_allowed(self, "evals")
        for name in ("kinds", "lengths", "depths"):
            values, option = getattr(self.needles, name), f"evals.needles.{name}"
            require(bool(values) or name != "depths", option, values, "is empty", "give one or more")
            require(len(set(values)) == len(values), option, values, "names one twice", "name each once")
