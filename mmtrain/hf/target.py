"""The formats of folders that a model can be exported to, and what each has no word for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.hf.hf_config import RELEASED_EPS
from mmtrain.hf.naming import parameter_shapes

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Target:
    """A format of folders.

    Attributes:
        name: as it is asked for.
        port: for transformers' MiniMaxForCausalLM; else for the released MiniMax-Text-01's own code, and vLLM.
        stacked: experts are named as transformers 5 stacks them.
        plain_rope: rows of W_q and W_k stay as they are where RoPE is partial, which the port may not know.
    """

    name: str
    port: bool
    stacked: bool = False
    plain_rope: bool = False

    def reorders(self, model: ModelConfig) -> bool:
        """Whether rows of W_q and W_k are reordered (`mmtrain.hf.rope_rows`)."""
        return self.port and not self.plain_rope and model.rotary_dim != model.head_dim

    def check(self, model: ModelConfig) -> list[str]:
        """Refuse what the format has no word for; return warnings on what other programs compute otherwise.

        Raises:
            ConfigError: naming the option of the model.
        """
        parameter_shapes(model)  # refuses other mixers
        if self.port and model.vision is not None:
            raise ConfigError("--to", self.name, "transformers has no class for a MiniMax model with eyes",
                              "give --to minimax: the layout of MiniMax-VL-01")  # fmt: skip
        if self.port and model.num_experts and model.shared_ffn_hidden_size:
            problem = "transformers' MiniMaxForCausalLM has no shared expert"
            raise ConfigError(
                "model.shared_ffn_hidden_size", model.shared_ffn_hidden_size, problem, "give --to minimax"
            )
        if self.port and not model.post_norm:
            raise ConfigError("model.post_norm", False, "transformers' MiniMaxForCausalLM takes the residual after the "
                              "norm, always", "export with --to minimax")  # fmt: skip
        if self.reorders(model) and model.head_dim % 2:
            raise ConfigError("model.head_dim", model.head_dim, "an odd number cannot be rotated whole",
                              "export with --to minimax")  # fmt: skip
        if model.lightning_norm_eps == RELEASED_EPS:
            return []
        return [f"model.lightning_norm_eps={model.lightning_norm_eps:g}: the format has no word for it; the released "
                f"code and transformers take {RELEASED_EPS:g}"]  # fmt: skip


TARGETS = {
    one.name: one
    for one in (Target("hf", port=True), Target("hf-stacked", port=True, stacked=True), Target("minimax", port=False))
}
