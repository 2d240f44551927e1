"""Parts of a sample, and `Template`, how turns of a conversation become texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from mmdata.errors import DataError

PLACEHOLDER = "<image>"


class Text(NamedTuple):
    """Text of a sample; `learned` says whether its tokens are labels, `template` that it may name special tokens."""

    text: str
    learned: bool
    template: bool = False


class ImageRef(NamedTuple):
    """An image of a sample, as the record names it."""

    name: str


Part = Text | ImageRef


class Sample(NamedTuple):
    """Parts of a document; of a preference pair the preferred one's, and those of the `rejected` one.

    `is_caption` says that its text is the caption of its images and nothing else.
    """

    parts: tuple[Part, ...]
    rejected: tuple[Part, ...] | None = None
    is_caption: bool = False


@dataclass(frozen=True)
class Template:
    r"""How turns of a conversation become text: "{}" stands for what was said.

    Names of special tokens in a template are those tokens; text never gives one. Only what the assistant says is
    learned, and what its template puts after it. Spaces before what it says are said by it too: most tokenizers have
    words with the space before them as a token, and a model that is given the space has to spell.

    Attributes:
        user, assistant, system: a turn of each.
        placeholder: what stands for an image in texts.
    """

    user: str = "User: {}\n"
    assistant: str = "Assistant: {}\n"
    system: str = "{}\n"
    placeholder: str = PLACEHOLDER

    def __post_init__(self) -> None:
        for role in ("user", "assistant", "system"):
            if getattr(self, role).count("{}") != 1:
                raise DataError(f"--{role} is {getattr(self, role)!r}: it needs {{}} once, for what is said")
        if not self.placeholder:
            raise DataError(f"--placeholder is empty: give what stands for an image in texts, as {PLACEHOLDER}")

    @property
    def spaces(self) -> str:
        """Spaces that what the assistant says begins with."""
        before = self.assistant.partition("{}")[0]
        return before[len(before.rstrip(" ")) :]

    def turn(self, role: str, said: str) -> list[Text | str]:
        """Texts of one turn; what was said is a plain str if it is still to be cut at placeholders."""
        before, _, after = getattr(self, role).partition("{}")
        if role != "assistant":
            return [Text(before, False, True), said, Text(after, False, True)]
        return [Text(before.rstrip(" "), False, True), Text(self.spaces + said, True), Text(after, True, True)]
