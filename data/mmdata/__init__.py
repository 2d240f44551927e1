"""mmdata: text to tokens on disk (Megatron `.bin/.idx`) to packed training batches.

One file a step, in the order of the data:

    prepare/  text to a corpus     recipes, folders, kinds -> collect (first_look) -> bpe -> shards, pool (progress) ->
                                   merge -> summary (next_command); a shard reads sources (streams, json_values,
                                   text_files, parquet; skips is what they leave out) into encoder; workfolder is
                                   around them; pipeline runs them all
    corpus/   a corpus on disk     writer, manifest, split write it; indexed, prepared, megatron read it;
                                   protocol is what every format provides, open the list of formats; array_cache
                                   (under build_lock) keeps what is slow to work out: the index, kept_split, documents;
                                   fingerprint knows a corpus again
    rows/     a corpus to batches  orders -> packing (documents laid into rows) -> stream -> mixture -> loader

Images beside text have three rooms of their own:

    prepare_images/  records with images to a corpus: records -> shapes -> encode -> shard -> merge; pipeline runs them
    images/          grid (an image's tiles and tokens by its size), header and pixels (its file), table and corpus (on
                     disk), packing -> stream (of row) -> batch -> reader (its tiles) -> stream_batches
    draw/            a data set of pictures that the project draws itself

Beside the rooms, since several of them need them: tokenizer (special_tokens, text_parts, tokenizer_identity,
save_tokenizer), hashing, errors.

Importing the package is cheap: torch is needed by `mmdata.rows.loader` only, megatron-core by `mmdata.corpus.writer`
only, when it writes.
"""

from mmdata.corpus.indexed import IndexedCorpus
from mmdata.corpus.open import open_corpus, tokenizer_path
from mmdata.corpus.protocol import Corpus
from mmdata.corpus.split import Split
from mmdata.errors import DataError
from mmdata.rows.mixture import Mixture
from mmdata.rows.stream import Row, RowStream
from mmdata.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Corpus",
    "DataError",
    "IndexedCorpus",
    "Mixture",
    "Row",
    "RowStream",
    "Split",
    "Tokenizer",
    "load_tokenizer",
    "open_corpus",
    "tokenizer_path",
]
