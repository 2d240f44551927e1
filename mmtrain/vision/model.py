"""The language model with eyes: images become embeddings, and a text model goes on from there.

Legend: T tokens (all rows of a micro-batch, flattened), D model width, V vocabulary, I tokens of images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.model.given_embeddings import GivenEmbeddings
from mmtrain.model.init import initialise, initialise_parameters
from mmtrain.model.label_score import LabelScore
from mmtrain.model.model import HybridLM, LossOutput, StageOutput
from mmtrain.model.packed_seq import Packing
from mmtrain.vision.encoder import ImageEncoder
from mmtrain.vision.images import Images


class VisionLanguageModel(nn.Module):
    """A text model, and the eyes that give it embeddings (MiniMax-01 section 6: ViT-MLP-LLM).

    Attributes:
        encoder: the eyes.
        language_model: the text model, which knows nothing of them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vision is None:
            raise ConfigError("model.vision", None, "the model has no eyes", "for example model=minimax_vl_01")
        self.config = config
        self.encoder = ImageEncoder(config.vision, config.hidden_size)
        self.language_model = HybridLM(config)

    def forward(
        self,
        tokens_T: Tensor,
        packing: Packing,
        labels_T: Tensor | None = None,
        rope_base: float | None = None,
        images: Images | None = None,
        score: bool = False,
    ) -> LossOutput | StageOutput | LabelScore | Tensor:
        """Return the loss of `labels_T`, or the logits [T, V], as the text model does.

        Args:
            tokens_T: int64 [T], with as many placeholders in a row as its images have tokens.
            packing: the documents that the tokens belong to.
            labels_T: next tokens.
            rope_base: RoPE base; None takes the configuration's.
            images: in the order of their placeholders; None: text alone, whose tokens are not looked at.
            score: return how many of the labels are the argmax in place of the loss.

        Raises:
            ConfigError: there are more or fewer placeholders than tokens of images.
        """
        given = None
        if images is not None:
            at_I = placeholders(tokens_T, images, self.config.vision.image_token)
            if len(at_I):
                given = GivenEmbeddings(at_I, self.encoder(images))
        return self.language_model(tokens_T, packing, labels_T, rope_base, score=score, given=given)


def placeholders(tokens_T: Tensor, images: Images, image_token: int) -> Tensor:
    """Return the places [I], int64, that rows keep for images.

    Raises:
        ConfigError: they are not as many as the images have tokens.
    """
    at_I = (tokens_T == image_token).nonzero().flatten()
    wanted = sum(layout.tokens for layout in images.layouts)
    if len(at_I) != wanted:
        raise ConfigError(
            "model.vision.image_token", image_token,
            f"the rows have {len(at_I)} of them, and their {len(images.layouts)} images {wanted} tokens",
            "write each image as so many as mmdata.images.grid.image_tokens says, and no other",
        )  # fmt: skip
    return at_I


def meta_vision_language_model(config: ModelConfig) -> VisionLanguageModel:
    """Make a model without memory, to be given memory and filled by :func:`initialise_vision_language_model`.

    Raises:
        ConfigError: the configuration has no eyes.
    """
    with torch.device("meta"):
        return VisionLanguageModel(config)


def initialise_vision_language_model(model: VisionLanguageModel, seed: int) -> None:
    """Fill every parameter (plain or DTensor) and buffer; the text model's are those it has alone with the seed."""
    initialise(model.language_model, seed)
    initialise_parameters(model.encoder, seed)


def build_vision_language_model(
    config: ModelConfig, device: torch.device | str = "cpu", seed: int = 1234
) -> VisionLanguageModel:
    """Make a model with initial weights, whole, on one device, in fp32 (for tests, tools and decoding).

    Raises:
        ConfigError: the configuration has no eyes.
    """
    model = meta_vision_language_model(config).to_empty(device=device)
    initialise_vision_language_model(model, seed)
    return model
