"""Names and shapes of all tensors of a folder: of a model of text, or of one with eyes beside its text model.

A model with eyes has the names of the released MiniMax-VL-01: those of the eyes (`mmtrain.hf.vision_naming`), and those
of the text model (`mmtrain.hf.naming`) after ``language_model.``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mmtrain.build import meta_model
from mmtrain.config import ModelConfig
from mmtrain.hf.naming import Piece, file_shapes, is_derived, parameter_shapes, pieces_of, router_of_one
from mmtrain.hf.vision_naming import LANGUAGE_MODEL, holds_no_weights_of_ours, vision_file_shapes, vision_pieces_of

ENCODER = "encoder."
"""Of :class:`~mmtrain.vision.model.VisionLanguageModel`, what the names of its eyes' parameters begin with."""

CONTRASTIVE = "contrastive."
"""What the names of a contrastive loss's parameters begin with (`mmtrain.vision.contrastive_model`)."""


@dataclass(frozen=True)
class FolderNames:
    """Names of a model's tensors in the files of a folder.

    Attributes:
        model: that the folder holds.
        stacked: how its experts are named (`mmtrain.hf.naming`).
    """

    model: ModelConfig
    stacked: bool = False

    def pieces(self, parameter: str, shape: Sequence[int]) -> list[Piece]:
        """Return the tensors that make up a parameter of the model.

        Args:
            parameter: its name in :class:`~mmtrain.model.model.HybridLM` or a model with eyes.
            shape: of the full parameter.

        Raises:
            ConfigError: the format has no such parameter.
        """
        vision = self.model.vision
        if vision is None:
            return pieces_of(parameter, shape, self.stacked)
        if parameter.startswith(ENCODER):
            return vision_pieces_of(parameter.removeprefix(ENCODER), shape, vision.patch_size)
        text = pieces_of(parameter, shape, self.stacked)
        return [replace(piece, name=LANGUAGE_MODEL + piece.name) for piece in text]

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter that a folder holds by its name, in order, without any memory for it.

        They are the whole model's, but for the maps of a contrastive loss: the format has no place for them.

        Raises:
            ConfigError: the format has no layers of a kind that the model has.
        """
        shapes = parameter_shapes(self.model)
        if self.model.vision is None:
            return shapes
        every = ((name, tuple(parameter.shape)) for name, parameter in meta_model(self.model).named_parameters())
        return {name: shape for name, shape in every if not name.startswith(CONTRASTIVE)}

    def file_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor that a folder must hold, by name."""
        text = file_shapes(self.model, self.stacked)
        return text if self.model.vision is None else vision_file_shapes(self.model) | _of_text(text)

    def routers_of_one(self) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of a dense model's routers of one expert, which a folder need not hold."""
        text = router_of_one(self.model, self.stacked)
        return text if self.model.vision is None else _of_text(text)

    def holds_no_weights(self, name: str) -> bool:
        """Tell whether a tensor holds nothing that the model needs: what follows from the configuration, or a norm that
        CLIP's tower has and the release has not.
        """
        if self.model.vision is None:
            return is_derived(name)
        return is_derived(name.removeprefix(LANGUAGE_MODEL)) or holds_no_weights_of_ours(name)


def _of_text(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {LANGUAGE_MODEL + name: shape for name, shape in shapes.items()}
