"""mmdata: text to tokens (Megatron `.bin/.idx`) to packed training batches.

The pipeline, one file per step:

    sources -> collect -> tokenizer / bpe -> shards -> prepare (writer, split, manifest)
    indexed -> packing -> stream -> mixture -> loader

Importing the package is cheap: torch is needed by `mmdata.rows.loader` only, megatron-core by `mmdata.corpus.writer`
only, and each is imported where it is used.
"""

from mmdata.corpus.indexed import IndexedCorpus, check_token_range
from mmdata.errors import DataError
from mmdata.rows.mixture import Mixture
from mmdata.rows.stream import Row, RowStream
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
