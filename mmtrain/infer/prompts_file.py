"""Prompts of a JSON lines file, each with what is wanted of it, checked before anything is loaded. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError, nearest
from mmtrain.infer.prompt import prompt_ids
from mmtrain.infer.request import Request
from mmtrain.infer.serving.generation import GenerationRequest
from mmtrain.json_text import parse_json

if TYPE_CHECKING:
    from mmtrain.vision.prompts import ImagePrompts, SeenPrompt

_KINDS: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "tokens": (list,),
    "images": (list,),
    "id": (str, int),
    "max_tokens": (int,),
    "temperature": (int, float),
    "top_k": (int, type(None)),
    "top_p": (int, float, type(None)),
    "repetition_penalty": (int, float),
    "seed": (int,),
    "stop": (str, list),
    "stop_ids": (list,),
    "ignore_eod": (bool,),
    "logprobs": (bool,),
    "prompt_logprobs": (bool,),
    "score_from": (int,),
    "keep_prefix": (list,),
}
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


@dataclass(frozen=True)
class PromptLine:
    """A line of the file.

    Attributes:
        number: of the line, from 1 on.
        fields: what it says.
        folder: of the file, that paths of images are taken from.
    """

    number: int
    fields: dict[str, Any]
    folder: Path = Path()

    def seen(self, prompts: ImagePrompts, chat: bool) -> SeenPrompt | None:
        """Return the line's prompt with its images looked at; None where it has none and is not to be a turn.

        Args:
            prompts: of the model.
            chat: write the prompt as the user's turn.

        Raises:
            ConfigError: an image cannot be used, or images and placeholders are not as many.
        """
        images = self.fields.get("images", [])
        prompt = self.fields.get("prompt")
        if prompt is None or not (images or chat or prompts.asks_for_images(prompt)):
            return None
        return prompts.prompt(prompt, images, "images", self.folder, chat)

    def request(
        self, tokenizer: Tokenizer, default: Request, tokens: tuple[int, ...] | None = None
    ) -> GenerationRequest:
        """Return what the line asks of the engine; what it leaves open is as for the whole command.

        Args:
            tokenizer: of the model.
            default: of the command. The seed of line n is the command's and n - 1, unless the line has its own.
            tokens: of the prompt, where they are known.

        Raises:
            ConfigError: the prompt makes no token.
        """
        given = {
            name: value for name, value in self.fields.items() if name not in ("prompt", "id", "images", *_SAMPLING)
        }
        if tokens is not None:
            given["tokens"] = tokens
        elif "tokens" not in given:
            given["tokens"] = prompt_ids(tokenizer, self.fields["prompt"])
        if isinstance(given.get("stop"), str):
            given["stop"] = [given["stop"]]
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        sampling = replace(default.sampling, **{k: v for k, v in self.fields.items() if k in _SAMPLING})
        usual = dict(max_tokens=default.max_tokens, seed=default.seed + self.number - 1, stop=default.stop,
                     ignore_eod=default.ignore_eod)  # fmt: skip
        return GenerationRequest(**{**usual, **given}, sampling=sampling)


def read_prompts(file: str) -> list[PromptLine]:
    """Read a JSON lines file; empty lines are passed over.

    Raises:
        ConfigError: it cannot be read, has no prompt, or a line is not what it should be.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")  # a text may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--prompts", file, f"cannot be read ({error})", "give a JSON lines file in UTF-8") from None
    found = [_line(file, number, text) for number, text in enumerate(lines, 1) if text.strip()]
    if not found:
        raise ConfigError("--prompts", file, "has no prompt", 'give lines such as {"prompt": "Once"}')
    return found


def _line(file: str, number: int, text: str) -> PromptLine:
    where = f"{file}, line {number}"
    try:
        fields = parse_json(text)
    except json.JSONDecodeError as error:
        problem = f"is no JSON ({error.msg})"
        raise ConfigError("--prompts", where, problem, 'give lines such as {"prompt": "Once"}') from None
    if not isinstance(fields, dict) or ("prompt" in fields) == ("tokens" in fields):
        raise ConfigError("--prompts", where, "needs either prompt or tokens", 'for example {"prompt": "Once"}')
    for name, value in fields.items():
        if name not in _KINDS:
            raise ConfigError("--prompts", where, f"has an unknown field {name!r}", nearest(name, _KINDS))
        if not isinstance(value, _KINDS[name]) or (isinstance(value, bool) and bool not in _KINDS[name]):
            kinds = " or ".join("null" if kind is type(None) else kind.__name__ for kind in _KINDS[name])
            raise ConfigError("--prompts", where, f"{name} must be {kinds}", f"it is {json.dumps(value)[:40]}")
        if isinstance(value, list):
            _check_list(where, name, value)
    if fields.get("images") and "prompt" not in fields:
        raise ConfigError("--prompts", where, "has images beside tokens", "give a prompt, which says where they stand")
    return PromptLine(number, fields, Path(file).parent)


def _check_list(where: str, name: str, value: Sequence[Any]) -> None:
    kind = str if name in ("stop", "images") else int
    wrong = next((x for x in value if not isinstance(x, kind) or isinstance(x, bool)), None)
    if wrong is not None:
        raise ConfigError("--prompts", where, f"{name} must hold {kind.__name__}s", f"not {json.dumps(wrong)[:40]}")
