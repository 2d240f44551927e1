"""Records to samples: each shape, and each way in which a record is wrong."""

from __future__ import annotations

import pytest

from mmdata.errors import DataError
from mmdata.prepare_images.shapes import BadRecord, sample_of
from mmdata.prepare_images.template import ImageRef, Template

PLAIN = Template()


def told(record, template=PLAIN) -> str:
    """A sample in one line: `[name]` is an image, upper case is learned."""

    def one(part):
        return (
            f"[{part.name}]" if isinstance(part, ImageRef) else part.text.upper() if part.learned else part.text.lower()
        )

    sample = sample_of(record, template)
    halves = [sample.parts] if sample.rejected is None else [sample.parts, sample.rejected]
    return " || ".join("".join(map(one, half)) for half in halves)


@pytest.mark.parametrize(
    ("record", "right"),
    [
        ({"image": "a", "conversations": [
            {"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "cat"},
            {"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]},
         "user: [a]\nwhat?\nassistant: CAT\nuser: why?\nassistant: SO\n"),
        ({"messages": [{"role": "system", "content": "be good"},
                       {"role": "user", "content": [{"type": "image", "path": "a"}, {"type": "text", "text": "and"},
                                                    {"type": "image", "image": "b"}]},
                       {"role": "assistant", "content": [{"type": "text", "text": "two"}]}]},
         "be good\nuser: [a]and[b]\nassistant: TWO\n"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]},
                       {"role": "assistant", "content": "y <image>"}], "images": ["a"]},
         "user: [a]x\nassistant: Y <IMAGE>\n"),
        ({"image": "a", "caption": "a cat"}, "[a]A CAT"),
        ({"image": "a", "question": "what?", "answer": "cat"}, "user: [a]what?\nassistant: CAT\n"),
        ({"images": ["a", "b"], "question": "is <image> in <image>?", "answer": "no"},
         "user: is [a] in [b]?\nassistant: NO\n"),
        ({"question": "2 + 2", "answer": "4"}, "user: 2 + 2\nassistant: 4\n"),
        ({"text": "see <image> and <image>.", "images": ["a", "b"]}, "SEE [a] AND [b]."),
        ({"text": "no image"}, "NO IMAGE"),
        ({"texts": ["one", None, "two"], "images": [None, "a", None]}, "ONE[a]TWO"),
        ({"parts": [{"text": "given", "learn": False}, {"image": "a"}, {"text": "told"}, "x"]}, "given[a]TOLDX"),
        ({"images": ["a"], "prompt": "<image>?", "chosen": "yes", "rejected": "no"},
         "user: [a]?\nassistant: YES\n || user: [a]?\nassistant: NO\n"),
        ({"image": "a", "prompt": [{"role": "user", "content": "hm"}],
          "chosen": [{"role": "assistant", "content": "y"}], "rejected": [{"role": "assistant", "content": "n"}]},
         "user: [a]hm\nassistant: Y\n || user: [a]hm\nassistant: N\n"),
    ],
)  # fmt: skip
def test_shapes(record, right):
    assert told(record) == right


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "<image> <image>", "images": ["a"]}, "placeholder without an image"),
        ({"text": "<image>"}, "placeholder without an image"),
        ({"text": "nothing", "images": ["a"]}, "image without a placeholder"),
        ({"image": "a", "conversations": [{"from": "human", "value": "x"}]}, "image without a placeholder"),
        ({"images": ["a", "b"], "question": "<image>", "answer": "y"}, "image without a placeholder"),
        ({"image": "https://host/a.jpg", "caption": "x"}, "image is a URL"),
        ({"image": "data:image/png;base64,", "caption": "x"}, "image is a URL"),
        ({"image": 7, "caption": "x"}, "image is not a path"),
        ({"image": "a", "caption": 7}, "text is not a string"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "turn of an unknown role"),
        ({"conversations": "x"}, "list expected"),
        ({"texts": ["a"], "images": []}, "texts and images of different lengths"),
        ({"texts": ["a"], "images": ["b"]}, "text and image in one place, or neither"),
        ({"parts": [{"sound": "a"}]}, "part is neither text nor image"),
        ({"prompt": "x", "chosen": "y", "rejected": "y"}, "chosen and rejected are the same"),
        ({"id": 1}, "no shape of record that is known"),
    ],
)
def test_wrong_records(record, reason):
    with pytest.raises(BadRecord, match=f"^{reason}$"):
        sample_of(record, PLAIN)


def test_templates():
    template = Template("<u>{}</u>", "<a>{}</a>", "{}", "[img]")
    record = {"image": "a", "question": "[img] is <image>?", "answer": "y"}
    assert told(record, template) == "<u>[a] is <image>?</u><a>Y</A>"
    with pytest.raises(DataError, match=r"--user is 'x'"):
        Template(user="x")
    with pytest.raises(DataError, match="--placeholder is empty"):
        Template(placeholder="")
