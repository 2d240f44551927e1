"""mmdata: text to tokens (Megatron `.bin/.idx`) to packed training batches.

The pipeline, one file per step:

    sources -> collect -> tokenizer / bpe -> shards -> prepare (writer, split, manifest)
    indexed -> packing -> stream -> mixture -> loader

Importing the package is cheap: torch is needed by `mmdata.loader` only, megatron-core by `mmdata.writer` only, and
each is imported where it is used.
"""

from mmdata.errors import DataError
from mmdata.indexed import IndexedCorpus, check_token_range
from mmdata.mixture import Mixture
from mmdata.stream import Row, RowStream
from mmdata.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "DataError",
    "IndexedCorpus",
    "Mixture",
    "Row",
    "RowStream",
    "Tokenizer",
    "check_token_range",
    "load_tokenizer",
]
