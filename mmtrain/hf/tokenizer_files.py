"""Tokenizer, end of text and chat template of an exported folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdata.save_tokenizer import save_tokenizer
from mmdata.special_tokens import EOD_NAMES
from mmdata.tokenizer import EOD_TOKEN, ByteTokenizer, FileTokenizer, Tokenizer
from mmtrain.hf.folder import HFFolder, tokenizer_is_bytes

RELEASED_EOS = 200020  # of the released model's tokenizer
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
_FILE, _GENERATION = "tokenizer.json", "generation_config.json"


@dataclass(frozen=True)
class TextFiles:
    """The tokenizer that an exported folder gets.

    Attributes:
        tokenizer: of the run; None: `folder` has all there is.
        folder: where more files of the same tokenizer lie, a chat template among them; None: nowhere.
        eos: ids that end a text; None where nothing says it.
        is_bytes: it is that of bytes, which the folder gets spelt as a tokenizer.json.
    """

    tokenizer: Tokenizer | None
    folder: Path | None
    eos: int | list[int] | None
    is_bytes: bool = False

    @staticmethod
    def of_run(tokenizer: Tokenizer, folder: Path | None) -> TextFiles:
        """Files of the tokenizer that a run was trained with."""
        eos: int | list[int] = tokenizer.eod_id
        if isinstance(tokenizer, FileTokenizer) and eos != RELEASED_EOS:
            name = _backend(tokenizer).id_to_token(RELEASED_EOS)  # the released one has more than one end
            eos = [eos, RELEASED_EOS] if name in EOD_NAMES else eos
        return TextFiles(tokenizer, folder, eos, isinstance(tokenizer, ByteTokenizer))

    @staticmethod
    def of_folder(folder: HFFolder) -> TextFiles:
        """Files of another Hugging Face folder, taken over as they are."""
        path, config, vocab_size = folder.path, folder.config, folder.model.vocab_size
        generation = _object(path / _GENERATION)
        eos = generation.get("eos_token_id", config.get("eos_token_id"))
        known = type(eos) is int or (isinstance(eos, list) and eos and all(type(one) is int for one in eos))
        if not known:
            eos = RELEASED_EOS if vocab_size == 200064 else None
        return TextFiles(None, path, eos, tokenizer_is_bytes(folder))

    def write(self, out: Path, longest: int | None) -> None:
        """Write tokenizer, generation configuration and what goes with them.

        Args:
            out: the folder that is made.
            longest: tokens of the longest rows that the model was trained with.
        """
        if isinstance(self.tokenizer, ByteTokenizer):
            (out / _FILE).write_text(byte_tokenizer_json(), encoding="utf-8")
        elif self.tokenizer is not None:
            save_tokenizer(self.tokenizer, out)
        for name in (*_COMPANIONS, *((_FILE,) if self.tokenizer is None else ())):
            if self.folder is not None and (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, out / name)
        if self.tokenizer is not None and not (out / _COMPANIONS[0]).exists():
            _write(out / _COMPANIONS[0], _tokenizer_config(self.tokenizer, longest))
        generation = _object(self.folder / _GENERATION) if self.tokenizer is None and self.folder else {}
        _write(out / _GENERATION, generation | {"eos_token_id": self.eos})


def byte_tokenizer_json() -> str:
    """Return a tokenizer.json that gives the ids of the byte tokenizer: byte-level BPE without merges.

    Byte b is the token b, and 256 the end of a document.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    letters = _letters()
    made = Backend(models.BPE({letter: byte for byte, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(EOD_TOKEN, special=True)])
    return made.to_str(pretty=True)


def _letters() -> list[str]:
    """Return the character that stands for each byte in byte-level BPE: itself if it prints, else one from 256 on."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in prints else chr(next(others)) for byte in range(256)]


def _tokenizer_config(tokenizer: Tokenizer, longest: int | None) -> dict[str, Any]:
    name = EOD_TOKEN
    if isinstance(tokenizer, FileTokenizer):
        name = _backend(tokenizer).id_to_token(tokenizer.eod_id)
    limit = {} if longest is None else {"model_max_length": longest}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": name, "clean_up_tokenization_spaces": False,
            **limit}  # fmt: skip


def _backend(tokenizer: FileTokenizer) -> Any:
    from tokenizers import Tokenizer as Backend

    return Backend.from_str(tokenizer.source.decode("utf-8"))


def _object(path: Path) -> dict[str, Any]:
    """Return a small JSON file's object; an empty one where there is none, or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size < 1 << 20 else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def files_beside(tokenizer: Tokenizer, given: str | None, meta: Mapping[str, Any]) -> Path | None:
    """Return a folder with the same tokenizer.json in which more of its files may lie; None where there is none.

    Args:
        tokenizer: of the run.
        given: what the user named: a folder, a tokenizer.json in one, or "bytes"; None: `data.tokenizer` of the record.
        meta: the record of the checkpoint.
    """
    path = given or meta.get("config", {}).get("data", {}).get("tokenizer")
    if not isinstance(tokenizer, FileTokenizer) or not isinstance(path, str):
        return None
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    try:
        same = (folder / _FILE).read_bytes() == tokenizer.source
    except OSError:
        return None
    return folder if same else None
