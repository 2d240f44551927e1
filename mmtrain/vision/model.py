"""The language model with eyes: images become embeddings, and the text model goes on from there.

Legend: T tokens (all rows of a micro-batch, flattened), D model width, V vocabulary, I tokens of images.
"""

from __future__ import annotations

from torch import Tensor

from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.model.given_embeddings import GivenEmbeddings
from mmtrain.model.label_score import LabelScore
from mmtrain.model.model import HybridLM, LossOutput, StageOutput
from mmtrain.model.packed_seq import Packing
from mmtrain.model.preference import PairScore, PreferencePairs
from mmtrain.vision.encoder import ImageEncoder
from mmtrain.vision.image_inputs import ImageInputs, ImageWork, whole_image_work
from mmtrain.vision.images import Images


class VisionLanguageModel(HybridLM):
    """A text model with eyes that give it embeddings (MiniMax-01 section 6: ViT-MLP-LLM).

    Its layers are the text model's, by the same names: a checkpoint of text is one of this model without the eyes, and
    all that lays out a text model does so with this one.

    Attributes:
        encoder: the eyes; None where a pipeline's later stages go on from hidden states.
        image_work: makes embeddings of a micro-batch's images; where ranks share the work, another in its place.
    """

    def __init__(self, config: ModelConfig) -> None:
        if config.vision is None:
            raise ConfigError("model.vision", None, "the model has no eyes", "for example model=minimax_vl_01")
        super().__init__(config)
        self.encoder: ImageEncoder | None = ImageEncoder(config.vision, config.hidden_size)
        self.image_work: ImageWork = whole_image_work

    def forward(
        self,
        tokens_T: Tensor,
        packing: Packing,
        labels_T: Tensor | None = None,
        rope_base: float | None = None,
        given: GivenEmbeddings | ImageInputs | None = None,
        pairs: PreferencePairs | None = None,
        *,
        score: bool = False,
    ) -> LossOutput | StageOutput | LabelScore | PairScore | Tensor:
        """Return the loss of `labels_T` or of `pairs`, or the logits [T, V], as the text model does.

        Args:
            tokens_T: int64 [T], with as many placeholders in a row as its images have tokens.
            packing: the documents that the tokens belong to.
            labels_T: next tokens.
            rope_base: RoPE base; None takes the configuration's.
            given: images in the order of their placeholders, or embeddings; None: text alone.
            pairs: preference pairs among the documents.
            score: return how many of the labels are the argmax in place of the loss, or of pairs the log-probabilities.

        Raises:
            ConfigError: the tiles are not those that the images have.
        """
        if given is None and self.encoder is not None:  # ranks that share the work may have images
            given = ImageInputs.none(self.encoder.config, tokens_T.device)
        if isinstance(given, ImageInputs):
            given = self.look(given)
        return super().forward(tokens_T, packing, labels_T, rope_base, given, pairs, score=score)

    def look(self, given: ImageInputs) -> GivenEmbeddings | None:
        """Return the embeddings of a micro-batch's images; None on later stages of a pipeline."""
        return None if self.encoder is None else self.image_work(self.encoder, given)

    def prune(self, layers: set[int], *, embedding: bool, head: bool) -> None:
        """Take parts away as the text model does; the eyes stay with the embedding."""
        super().prune(layers, embedding=embedding, head=head)
        if not embedding:
            self.encoder = None


def images_of(tokens_T: Tensor, images: Images, image_token: int) -> ImageInputs:
    """Return images with the places that rows keep for them; waits for the device of `tokens_T`.

    Raises:
        ConfigError: they are not as many as the images have tokens.
    """
    return ImageInputs.whole(images, placeholders(tokens_T, images, image_token).cpu())


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
