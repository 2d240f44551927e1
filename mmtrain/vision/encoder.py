"""From images to the embeddings that stand in a row for them: vision transformer, projector, newlines.

Legend: N tiles, S pixels of a tile's side, Q tokens of a tile, W width of the vision transformer, D of the language
model, M tokens that are patches, I tokens of all images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmdata.images.grid import ImageLayout
from mmtrain.config import VisionConfig
from mmtrain.model.initial import Initial, Uniform
from mmtrain.model.packed_seq import to_device
from mmtrain.model.weights import local
from mmtrain.vision.images import Images, normalise, token_sources
from mmtrain.vision.projector import Projector
from mmtrain.vision.vit import VisionTransformer


class ImageEncoder(nn.Module):
    """The eyes of a model.

    The two halves of :meth:`forward` may run on different ranks: tiles know nothing of each other until
    :meth:`embeddings` joins them.

    Args:
        config: of the eyes.
        hidden_size: D.
    """

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        # Names of parameters seed their initial weights and key checkpoints (`mmtrain.model.init`): do not rename.
        self.vision_tower = VisionTransformer(config)
        self.projector = Projector(config.hidden_size, hidden_size, config.projector_activation)
        self.newline_D = nn.Parameter(torch.empty(hidden_size))
        self.initial: dict[str, Initial] = {"newline_D": Uniform(hidden_size**-0.5)}  # LLaVA-NeXT's deviation

    def forward(self, images: Images) -> Tensor:
        """Return the embeddings [I, D] of all images, in their order.

        Raises:
            ConfigError: the tiles are not those that the images have.
        """
        images.check(self.config)
        return self.embeddings(self.features(images.tiles_N3SS), images.layouts)

    def features(self, tiles_N3SS: Tensor) -> Tensor:
        """Return the hidden states [N, Q, W] of tiles of uint8."""
        return self.vision_tower(normalise(tiles_N3SS))

    def embeddings(self, x_NQW: Tensor, layouts: Sequence[ImageLayout]) -> Tensor:
        """Join the features of tiles into embeddings of images, [I, D]; only patches that are kept are projected."""
        patch_M, at_M, tokens = token_sources(layouts)
        y_MD = self.projector(x_NQW.flatten(0, 1).index_select(0, to_device(patch_M, x_NQW.device)))
        newlines_ID = local(self.newline_D).to(y_MD.dtype).expand(tokens, -1)
        return newlines_ID.index_copy(0, to_device(at_M, y_MD.device), y_MD)

    def join(self, x_MW: Tensor, newlines: int) -> Tensor:
        """Return the embeddings of some patches, [M, W], and after them those of newlines: [M + newlines, D]."""
        y_MD = self.projector(x_MW)
        return torch.cat([y_MD, local(self.newline_D).to(y_MD.dtype).expand(newlines, -1)])
