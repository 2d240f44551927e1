"""Which share of each part of a model is trained: gradients and moments are of that share alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mmtrain.config import ModelConfig
from mmtrain.parallel.memory.workload import Parameters


@dataclass
class _Count:
    """Elements of a part, trained and in all, its experts' apart."""

    trained: list[int] = field(default_factory=lambda: [0, 0])
    total: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, size: int, *, expert: bool, frozen: bool) -> None:
        self.total[expert] += size
        self.trained[expert] += 0 if frozen else size

    def of(self, whole: Parameters) -> Parameters:
        """Take the trained share of this part of what a rank has of it."""
        dense, experts = (a / b if b else 0.0 for a, b in zip(self.trained, self.total, strict=True))
        return Parameters(round(whole.dense * dense), round(whole.experts * experts))


class TrainedShares:
    """Shares of layers, embedding and head, which are about the same on all ranks.

    Args:
        model: a validated model.
        frozen: patterns of the parameters that are not trained; at least one.
    """

    def __init__(self, model: ModelConfig, frozen: Sequence[str]) -> None:
        from mmtrain.build import meta_model
        from mmtrain.model.frozen import is_frozen  # brings torch

        self._parts: dict[str, _Count] = {}
        for name, parameter in meta_model(model).named_parameters():
            first, _, rest = name.partition(".")
            part = rest.partition(".")[0] if first == "layers" else first
            if first == "encoder":
                part = f"encoder.{rest.partition('.')[0]}"
            expert = ".ffn.experts." in name
            self._parts.setdefault(part, _Count()).add(parameter.numel(), expert=expert, frozen=is_frozen(name, frozen))

    def layer(self, number: int, whole: Parameters) -> Parameters:
        """Return what is trained of a layer, given what a rank has of it."""
        return self._parts[str(number)].of(whole)

    def end(self, name: str, whole: int) -> int:
        """Return what is trained of `embed_tokens`, `norm`, `lm_head` or a part of the eyes.

        Args:
            name: of the part; of the eyes `encoder.vision_tower`, `encoder.projector` or `encoder.newline_D`.
            whole: what a rank has of it.
        """
        return self._parts[name].of(Parameters(whole, 0)).dense
