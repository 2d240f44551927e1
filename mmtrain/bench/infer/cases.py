"""Cases of the inference bench, the cheap ones first: a time limit cuts the longest prompts alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A model that is measured.

    Attributes:
        model: a preset.
        precision: as :mod:`mmtrain.infer.compute_dtype` names it.
    """

    model: str
    precision: str = "bf16"


@dataclass(frozen=True)
class Decode(Case):
    """Documents of some length that get a token each.

    Attributes:
        documents: their number.
        context: tokens of each.
        graphs: as :class:`~mmtrain.infer.serving.options.EngineOptions` takes them.
    """

    documents: int = 1
    context: int = 2**13
    graphs: bool | None = None


@dataclass(frozen=True)
class Prefill(Case):
    """One prompt, in pieces.

    Attributes:
        tokens: of the prompt.
        piece: tokens of a piece.
        once: read it once, after a prompt of two pieces, and leave the training forward pass out: for long prompts.
    """

    tokens: int = 2**17
    piece: int = 2**14
    once: bool = False


@dataclass(frozen=True)
class Shares(Case):
    """Attention's share of the time of a prefill, by kind of layer, in a model cut down to one layer of each kind.

    Attributes:
        points: lengths at which the share of the prefill so far is told, ascending multiples of `piece`.
        piece: tokens of a piece.
    """

    points: tuple[int, ...] = (2**13, 2**15, 2**17, 2**19, 1_024_000)
    piece: int = 2**13


@dataclass(frozen=True)
class Mixed(Case):
    """A step of documents that get a token each and of short prompts (MiniMax-01 section 3.3: 18 or 19 and 1 or 2).

    Attributes:
        decodes: documents that get a token.
        prompts: prompts that are read.
        tokens: of each prompt.
        padded: tokens that the way beside ours pads every request to.
    """

    decodes: int = 18
    prompts: int = 2
    tokens: int = 50
    padded: int = 256


@dataclass(frozen=True)
class Peer(Case):
    """transformers' MiniMaxForCausalLM beside ours: a prompt, then tokens one by one.

    Attributes:
        context: tokens of the prompt.
    """

    context: int = 2**13


B7, B1 = "hybrid_7b", "hybrid_1b"
# fmt: off
CASES: dict[str, Case] = {
    "7b-mixed-1": Mixed(B7, prompts=1),
    "7b-mixed-2": Mixed(B7, prompts=2),
    "7b-decode-1-8k": Decode(B7),
    "7b-decode-1-8k-no-graphs": Decode(B7, graphs=False),
    "7b-decode-64-8k": Decode(B7, documents=64),
    "7b-decode-64-8k-no-graphs": Decode(B7, documents=64, graphs=False),
    "7b-decode-1-32k": Decode(B7, context=2**15),
    "7b-decode-1-128k": Decode(B7, context=2**17),
    "7b-decode-1-512k": Decode(B7, context=2**19),
    "7b-decode-1-1m": Decode(B7, context=2**20),
    "7b-decode-1-2m": Decode(B7, context=2**21),
    "7b-decode-1-4m": Decode(B7, context=2**22),
    "7b-int8-decode-1-8k": Decode(B7, "int8"),
    "7b-int8-decode-64-8k": Decode(B7, "int8", documents=64),
    "7b-g128-decode-1-8k": Decode(B7, "int8-g128"),
    "7b-g128-decode-64-8k": Decode(B7, "int8-g128", documents=64),
    "1b-decode-1-8k": Decode(B1),
    "1b-prefill-8k": Prefill(B1, tokens=2**13),
    "1b-transformers-8k": Peer(B1),
    "7b-prefill-128k": Prefill(B7),
    "7b-prefill-128k-4k": Prefill(B7, piece=2**12),
    "7b-prefill-128k-32k": Prefill(B7, piece=2**15),
    "7b-int8-prefill-128k": Prefill(B7, "int8"),
    "7b-shares": Shares(B7),
    "1b-prefill-1m": Prefill(B1, tokens=2**20, once=True),
    "7b-prefill-1m": Prefill(B7, tokens=2**20, once=True),
    "1b-prefill-4m": Prefill(B1, tokens=2**22, once=True),
}
# fmt: on
