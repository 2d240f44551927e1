"""Chat templates, beside transformers', and chats over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmdata.tokenizer import ByteTokenizer, FileTokenizer, load_tokenizer
from mmtrain.errors import ConfigError
from mmtrain.infer.endpoint import body
from mmtrain.infer.endpoint.chat_template import ChatTemplate, find_chat_template
from mmtrain.infer.endpoint.fields import parse_body
from mmtrain.infer.endpoint.refusal import Refusal
from mmtrain.infer.engine import Engine
from mmtrain.infer.serving.generation import GenerationRequest
from tests.infer.endpoint.running import running
from tests.infer.served import SMALL
from tests.model.small import small_model

SOURCE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['user', 'assistant', 'system'] %}
        {{- raise_exception('no such role: ' + message['role']) }}
    {%- endif %}
<|start|>{{ message['role'] }}
{{ message['content'] | trim }}<|end|>
{%- endfor %}
{%- if add_generation_prompt %}
<|start|>assistant
{% endif %}"""
CHAT = [{"role": "system", "content": " Be é brief. "}, {"role": "user", "content": "Hello, wörld"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face tokenizer whose template speaks in special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = ("<end_of_document>", "<|start|>", "<|end|>", "<bos>")
    made.add_special_tokens([AddedToken(name, special=True) for name in names])
    made.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": {"content": "<bos>"}, "chat_template": SOURCE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def template(folder: Path) -> ChatTemplate:
    found = find_chat_template(folder, load_tokenizer(folder))
    assert found is not None
    return found


def test_ids_are_those_of_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<bos>")
    expected = theirs.apply_chat_template(CHAT, chat_template=SOURCE, add_generation_prompt=True, return_dict=False)
    assert template(folder).encode(CHAT) == list(expected)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    source = config.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert find_chat_template(folder, load_tokenizer(folder)) is None
    (folder / "chat_template.jinja").write_text(source)
    assert template(folder).encode(CHAT) == list(expected)


def test_nobody_speaks_for_another_role(folder: Path) -> None:
    chat = template(folder)
    for message in ({"role": "user", "content": "a<|end|>"}, {"role": "user<|start|>", "content": "a"},
                    {"role": "user", "content": "a", "name": "<bos>"}):  # fmt: skip
        with pytest.raises(Refusal, match="spells the special token"):
            chat.encode([message])
    with pytest.raises(Refusal, match="no such role: tool") as caught:
        chat.encode([{"role": "tool", "content": "a"}])
    assert caught.value.status == 400 and caught.value.param == "messages"


def test_a_template_is_kept_in_its_sandbox(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, FileTokenizer)
    for source in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}"):
        with pytest.raises(Refusal, match="the chat template fails"):
            ChatTemplate(source, tokenizer, {}).encode(CHAT)


def test_a_broken_template_is_one_line(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ConfigError, match="its chat template is broken"):
        find_chat_template(folder, load_tokenizer(folder))
    assert find_chat_template(folder, ByteTokenizer()) is None


def test_chats_are_answered_as_the_engine_does(folder: Path) -> None:
    tokenizer, chat, path = load_tokenizer(folder), template(folder), "/v1/chat/completions"
    model = small_model(vocab_size=264, num_layers=2, layer_pattern="LS")
    twin = Engine(small_model(vocab_size=264, num_layers=2, layer_pattern="LS"), tokenizer, SMALL)
    (made,) = twin.generate([GenerationRequest(tuple(chat.encode(CHAT)), 20)])
    fields: dict[str, Any] = dict(messages=CHAT, max_tokens=20, temperature=0)
    with running(model, tokenizer=tokenizer, chat=chat) as server:
        answer = server.complete(path, **fields)
        assert answer["object"] == "chat.completion"
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": made.text}
        assert answer["usage"]["prompt_tokens"] == len(chat.encode(CHAT))
        events = server.stream(path, **fields)
        assert events[0]["choices"][0]["delta"]["role"] == "assistant"
        assert "".join(one["choices"][0]["delta"].get("content", "") for one in events) == made.text
        assert {one["object"] for one in events} == {"chat.completion.chunk"}
        newer = server.complete(path, messages=CHAT, max_completion_tokens=20, temperature=0, tools=[], logprobs=False)
        assert newer["choices"] == answer["choices"]
        usual = body.chat(parse_body(json.dumps({"messages": CHAT}).encode()), server.served)
        assert usual.requests[0].max_tokens == 256
        for wrong, param in (
            ({"messages": []}, "messages"),
            ({"messages": "hi"}, "messages"),
            ({"messages": [{"role": "user"}]}, "messages"),
            ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "messages"),
            ({"messages": [{"role": "user", "content": "a", "tool_calls": "b"}]}, "messages"),
            ({"messages": [{"role": "user", "content": "a<bos>"}]}, "messages"),
            ({"max_completion_tokens": 5}, "max_tokens"),
            ({"max_tokens": 10**9}, "max_tokens"),
            ({"tools": [{"type": "function"}]}, "tools"),
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"logprobs": True}, "logprobs"),
            ({"prompt": "a"}, "prompt"),
        ):
            status, error = server.refused({**fields, **wrong}, path)
            assert (status, error["param"]) == (400, param), wrong
        seen = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]}]
        assert "this server takes text alone" in server.refused({**fields, "messages": seen}, path)[1]["message"]
