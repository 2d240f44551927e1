"""Prompt of a command line: given as text, in a file, or on standard input."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import BinaryIO, TextIO

from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError
from mmtrain.infer.request import checked_text

LIMIT = 64 << 20  # bytes of a prompt: all of it is held in memory, and every later token looks back at it


def read_prompt(text: str | None, file: str | None, stdin: TextIO | None) -> str:
    """Return the prompt; an empty one stands for the start of a document.

    Of a file or standard input one newline at the end is dropped, as `echo` and editors put it there, and a byte order
    mark at the start.

    Args:
        text: of ``--prompt``; "-" stands for standard input.
        file: of ``--prompt-file``; "-" stands for standard input.
        stdin: read where it is named, or where neither of the others is given and it is not a terminal.

    Raises:
        ConfigError: there is no prompt, it cannot be read, is too long, or is not UTF-8.
    """
    if text is not None and text != "-":
        return checked_text(text)
    if file is not None and file != "-":
        try:
            with Path(file).open("rb") as stream:
                return _read("--prompt-file", file, stream)
        except OSError as error:
            raise ConfigError("--prompt-file", file, f"cannot be read ({error.strerror})", "give a text file") from None
    named = text == "-" or file == "-"
    if stdin is None or (not named and stdin.isatty()):
        raise ConfigError("--prompt", None, "no prompt given", "give --prompt TEXT, --prompt-file FILE, or text on "
                          'standard input; --prompt "" starts a document')  # fmt: skip
    return _read("--prompt-file", "-", stdin.buffer)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids of a prompt; an empty one is the end of the document before.

    Raises:
        ConfigError: the prompt is not empty, but has no token; or it is not UTF-8.
        DataError: the tokenizer has no tokens for it.
    """
    if not prompt:
        return [tokenizer.eod_id]
    ids = tokenizer.encode(checked_text(prompt))
    if not ids:
        raise ConfigError("--prompt", repr(prompt)[:60], "the tokenizer makes no token of it", "give other text")
    return ids


def _read(option: str, name: str, stream: BinaryIO) -> str:
    data = stream.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise ConfigError(option, name, f"is longer than {LIMIT >> 20} MiB", "give a shorter prompt")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte 0x{data[error.start]:02x} at {error.start:,})"
        raise ConfigError(option, name, problem, "save it as UTF-8") from None
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
