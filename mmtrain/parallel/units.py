"""Units of a model, by which weights are exchanged: when a forward pass needs one, and when its gradients are whole.

Unit 0 is what comes before the layers (the embedding; the eyes of a model that has some) and all that has no other
place; then every layer is one; the last is norm and head.

Legend: T tokens, D model width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mmtrain.model.block import Block
from mmtrain.model.model import HybridLM


class UnitWatch:
    """A listener to a model's passes, which hears of units from hooks, and of recorded ones from who replays them.

    Args:
        model: the whole model.
        needed: is called before a unit's forward pass, with its number: all before it are needed too.
        done: is called in backward, with the number of the first unit from which on all gradients are whole. It may not
            be: where nothing below a unit is trained no gradient passes its beginning.
    """

    def __init__(self, model: HybridLM, needed: Callable[[int], None], done: Callable[[int], None]) -> None:
        self._needed, self._done = needed, done
        self.head = 1 + len(model.layers)
        self._tells_done = False
        self._open: Counter[int] = Counter()  # beginnings of units whose gradients have not come yet
        places = [*enumerate(model.layers, start=1), (self.head, model.norm), (self.head, model.lm_head)]
        self._units: dict[nn.Module, int] = {part: unit for unit, place in places for part in place.modules()}

    def unit_of(self, module: nn.Module) -> int:
        """The unit of one of the model's modules."""
        return self._units.get(module, 0)

    def listen(self, model: HybridLM) -> None:
        """Hook the beginnings of the layers, and of norm and head."""
        for module in (*model.layers, model.norm):
            module.register_forward_pre_hook(self._hear)

    def begin(self, tells_done: bool) -> None:
        """Begin a micro-batch.

        Args:
            tells_done: `done` is to be called in its backward pass.
        """
        self._tells_done = tells_done
        self._open.clear()

    def reach(self, needed: int, done: int, given: Sequence[Tensor]) -> None:
        """Say that a forward pass has come to a place.

        Args:
            needed: the last unit that is needed next.
            done: the first unit that lies behind this place as a whole.
            given: all that the pass goes on with; once it has its gradients the units from `done` on have theirs.
        """
        self._needed(needed)
        given = [tensor for tensor in given if tensor.requires_grad]
        if self._tells_done and given and torch.is_grad_enabled():
            self._open[done] += 1
            given[0].register_hook(partial(self._pass_back, done))

    def reach_segment(self, closes: Block | None, opens: Block | None, given: Sequence[Tensor]) -> None:
        """Say that a forward pass has come to what lies between the attention of two softmax layers.

        Args:
            closes: layer whose attention has just run; None at the first layer.
            opens: layer whose attention follows; None before the loss.
            given: as :meth:`reach` takes it.
        """
        needed = self.head if opens is None else self._units[opens]
        self.reach(needed, 1 if closes is None else 1 + self._units[closes], given)

    def _hear(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        # What is recorded now is replayed often: the one who does so tells of it.
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            unit = self.unit_of(module)
            self.reach(unit, unit, arguments[:1])

    def _pass_back(self, unit: int, gradient: Tensor) -> None:
        self._open[unit] -= 1
        if not any(count for one, count in self._open.items() if one >= unit):  # layers may run more than once
            self._done(unit)
