"""The choice of weights that become int8, and the replacement of the modules that hold them.

Projections of the mixers, dense feed-forwards, shared experts and routed experts become int8. What chooses or
normalises stays as it is: routers, the embedding, the head, norms, and the coefficient of a shared expert. So does the
released model's own int8 recipe (`lm_head`, `embed_tokens`, `coefficient`, `gate`). States of lightning layers are no
weights and stay fp32.
"""

from __future__ import annotations

from torch import nn

from mmtrain.infer.quantised.modules import (
    QuantisedExperts,
    QuantisedLinear,
    QuantisedModule,
    QuantisedSwiGLU,
)
from mmtrain.model.ffn import SwiGLU
from mmtrain.model.linear import Linear
from mmtrain.model.model import HybridLM
from mmtrain.model.moe.experts import Experts

KEPT = frozenset({"lm_head", "coefficient"})
"""Attributes that hold a :class:`~mmtrain.model.linear.Linear`, maybe inside another module, and stay as they are."""
_KINDS: dict[type[nn.Module], type[QuantisedModule]] = {
    Linear: QuantisedLinear,
    SwiGLU: QuantisedSwiGLU,
    Experts: QuantisedExperts,
}


def quantised_kind(path: str, module: nn.Module) -> type[QuantisedModule] | None:
    """Return the class that takes the place of a module of the model; None: the module stays.

    Args:
        path: its name in the model.
        module: it itself. A class that a mixer brings along is not known and stays.
    """
    return _KINDS.get(type(module)) if KEPT.isdisjoint(path.split(".")) else None


def quantise_model(model: HybridLM, grouped: bool = False) -> None:
    """Turn the weights of a model's projections and experts into int8, in place, one module after the other.

    A model on the meta device gets modules without memory, to be filled one by one. Parameters that lie on several
    ranks are quantised as the parts that lie here (`mmkernels/int8_weights/README.md` says what that means).

    Args:
        model: loaded, or on the meta device; of any floating-point dtype.
        grouped: a scale for every 128 columns, else one a row.

    Raises:
        KernelArgumentError: a weight is not a finite number.
    """
    for path, module in list(model.named_modules()):
        kind = quantised_kind(path, module)
        if kind is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, kind(module, grouped))
