"""Options of a model's eyes: the vision transformer, the projector, and the tiles that images become."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmtrain.config.allowed import above, at_least, check_allowed, one_of
from mmtrain.config.checks import require
from mmtrain.config.option_marks import SHAPES_WEIGHTS

ACTIVATIONS = ("gelu", "quick_gelu")


def released_grids() -> list[list[int]]:
    """Return the 28 grids of the released configuration as [rows, columns] of tiles, in its order."""
    most = {1: 6, 2: 6, 3: 6, 4: 4, 5: 3, 6: 3}
    return [[rows, columns] for rows in most for columns in range(1, most[rows] + 1)]


@dataclass
class ContrastiveConfig:
    """Contrastive loss of images and their captions, beside that of the captions' tokens (MiniMax-01 section 6).

    The paper says that its vision transformer was trained so, after CoCa, and no figure of the loss.

    Attributes:
        size: width of the space that images and captions share. Chosen here: that of CLIP's ViT-L/14.
        weight: factor of the loss beside the captions' mean loss a token. Chosen here: CoCa's ratio, 1 to 2.
        temperature: of the first step; it is learned. Chosen here: CLIP's.
    """

    size: int = field(default=768, metadata={**SHAPES_WEIGHTS, **at_least(1)})
    weight: float = field(default=0.5, metadata=above(0, fix="model.vision.contrastive=null turns it off"))
    temperature: float = field(default=0.07, metadata=at_least(0.01, 1.0))


@dataclass
class VisionConfig:
    """The eyes of a model that sees (MiniMax-01 section 6; the defaults are those of the released config.json).

    Attributes:
        image_token: id of the token whose places in a row an image's embeddings take; below `vocab_size`.
        tile_size: pixels of a tile's side, the only size that the vision transformer sees.
        patch_size: pixels of a patch's side; a divisor of `tile_size`. Every patch is a token.
        grids: grids of tiles, each [rows, columns], that an image may be resized to; the best fit is taken. None of
            them: every image is one tile.
        hidden_size: width of the vision transformer.
        num_layers: depth of it.
        num_heads: heads of it; a divisor of `hidden_size`.
        ffn_hidden_size: width inside its feed-forwards.
        activation: of its feed-forwards; ``quick_gelu`` is OpenAI's CLIP.
        norm_eps: epsilon of its norms.
        unused_layers: layers at its end that images do not go through: 0 is `vision_feature_layer` -1, which a port of
            the release has, 1 is -2, which vLLM's class assumes. Unverified for the released weights.
        keep_class_token: the class token of the thumbnail comes before its patches; false drops it, as ports of the
            release do. Unverified for the released weights.
        projector_activation: between the two layers of the projector.
        contrastive: train with a contrastive loss too; null is a loss of text alone.
    """

    image_token: int = field(default=200_025, metadata=at_least(0))
    tile_size: int = field(default=336, metadata={**SHAPES_WEIGHTS, **at_least(1)})
    patch_size: int = field(default=14, metadata={**SHAPES_WEIGHTS, **at_least(1)})
    grids: list[list[int]] = field(default_factory=released_grids)
    hidden_size: int = field(default=1024, metadata={**SHAPES_WEIGHTS, **at_least(1)})
    num_layers: int = field(default=24, metadata={**SHAPES_WEIGHTS, **at_least(1)})
    num_heads: int = field(default=16, metadata=at_least(1))
    ffn_hidden_size: int = field(default=4096, metadata={**SHAPES_WEIGHTS, **at_least(1)})
    activation: str = field(default="gelu", metadata=one_of(*ACTIVATIONS))
    norm_eps: float = field(default=1e-5, metadata=above(0))
    unused_layers: int = field(default=0, metadata=at_least(0))
    keep_class_token: bool = False
    projector_activation: str = field(default="gelu", metadata=one_of(*ACTIVATIONS))
    contrastive: ContrastiveConfig | None = None

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads

    @property
    def patches(self) -> int:
        """Patches of a tile."""
        return (self.tile_size // self.patch_size) ** 2

    def validate(self, vocab_size: int, path: str = "model.vision") -> None:
        """Refuse shapes that cannot be built.

        Args:
            vocab_size: of the text model.
            path: dotted name of this group.
        """
        check_allowed(self, path)
        require(self.image_token < vocab_size, f"{path}.image_token", self.image_token,
                f"must be below vocab_size={vocab_size}", "give the id that the tokenizer has for images")  # fmt: skip
        require(self.tile_size % self.patch_size == 0, f"{path}.patch_size", self.patch_size,
                f"must divide tile_size={self.tile_size}", "for example 14 for 336 or 224")  # fmt: skip
        require(self.hidden_size % self.num_heads == 0, f"{path}.num_heads", self.num_heads,
                f"must divide hidden_size={self.hidden_size}", "heads of 64 are usual")  # fmt: skip
        require(self.unused_layers < self.num_layers, f"{path}.unused_layers", self.unused_layers,
                f"must be below num_layers={self.num_layers}", "0 uses all layers, 1 all but the last")  # fmt: skip
        for i, grid in enumerate(self.grids):
            require(len(grid) == 2 and min(grid) >= 1, f"{path}.grids[{i}]", grid,
                    "must be [rows, columns], both at least 1", "for example [2, 3]")  # fmt: skip
            require(grid not in self.grids[:i], f"{path}.grids[{i}]", grid, "is there twice", "leave one out")
