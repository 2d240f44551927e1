"""Chat template of a tokenizer: how messages become the ids of a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mmdata.tokenizer import FileTokenizer, Tokenizer
from mmtrain.errors import ConfigError
from mmtrain.infer.endpoint.refusal import Refusal


class ChatTemplate:
    """Template of Hugging Face's kind, rendered in a sandbox, and encoded with the special tokens that it spells.

    Args:
        source: Jinja.
        tokenizer: whose `tokenizer.json` has the special tokens.
        names: special tokens by their role, such as `bos_token`, that the template may use.
    """

    def __init__(self, source: str, tokenizer: FileTokenizer, names: Mapping[str, str]) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from tokenizers import Tokenizer as Backend

        # As transformers compiles them: templates count on it for their white space.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **rest: json.dumps(value, ensure_ascii=False, **rest)
        environment.globals["raise_exception"] = _refuse
        self._template, self._names = environment.from_string(source), dict(names)
        self._backend = Backend.from_str(tokenizer.source.decode("utf-8"))
        self._backend.no_truncation()
        self._backend.no_padding()
        added = json.loads(tokenizer.source)["added_tokens"] or []
        self._special = [one["content"] for one in added if one.get("special")]

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of messages and of the beginning of the answer to them.

        Raises:
            Refusal: a message spells a special token, which would let it speak for another role, or the template
                refuses the messages.
        """
        for message in messages:
            for name in self._special:
                if any(name in text for text in message.values()):
                    raise Refusal(
                        400, f"messages: a message spells the special token {name}", "messages", "invalid_value"
                    )
        try:
            text = self._template.render(messages=list(messages), add_generation_prompt=True, **self._names)
        except Refusal:
            raise
        except Exception as error:  # whatever a template does
            _refuse(f"the chat template fails ({error})")
        return self._backend.encode(text, add_special_tokens=False).ids


def find_chat_template(folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the chat template that lies beside a `tokenizer.json`; None where there is none.

    Args:
        folder: with `chat_template.jinja`, or a `tokenizer_config.json` that holds one.
        tokenizer: of the folder; bytes have no template.

    Raises:
        ConfigError: the template is broken.
    """
    if not isinstance(tokenizer, FileTokenizer):
        return None
    config, path = {}, folder / "tokenizer_config.json"
    try:
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
        file = folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
        if isinstance(source, list):  # several by name
            source = next((one["template"] for one in source if one["name"] == "default"), None)
        if not source:
            return None
        return ChatTemplate(source, tokenizer, _role_tokens(config))
    except ImportError:
        raise ConfigError("jinja2", "missing", "chat templates need it", 'pip install "mmtrain[serve]"') from None
    except Exception as error:  # Jinja's own, and whatever a broken file gives
        raise ConfigError(
            "checkpoint", folder, f"its chat template is broken ({str(error)[:120]})", "mend it"
        ) from None


def _role_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return special tokens by role; older files write them as objects."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _refuse(message: str) -> NoReturn:
    raise Refusal(400, f"messages: {str(message)[:200]}", "messages", "invalid_value")
