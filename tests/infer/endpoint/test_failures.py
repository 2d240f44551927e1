"""Steps that fail: their requests are told, others are served on; an engine that cannot be trusted ends the server."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mmtrain.errors import ConfigError
from mmtrain.infer.serving.runner import Runner
from mmtrain.infer.serving.scheduler import Chunk, Step
from tests.infer.endpoint.running import HeldEngine, Running, running, wait_for
from tests.infer.served import SMALL, assert_nothing_held

MARK = ord("!")


def break_on_mark(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let every step fail whose documents' prompts have the mark."""
    run = Runner.run

    def broken(self: Runner, step: Step) -> Any:
        if any(MARK in document.request.tokens for document, _ in (*step.prefill, *step.decode)):
            raise error
        return run(self, step)

    monkeypatch.setattr(Runner, "run", broken)


def test_a_step_beyond_the_memory_answers_503_and_the_server_lives_on(
    server: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = Runner._pass

    def full(self: Runner, chunks: list[Chunk]) -> Any:
        if any(MARK in chunk.document.request.tokens for chunk in chunks):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return run(self, chunks)

    monkeypatch.setattr(Runner, "_pass", full)
    status, headers, body = server.ask("POST", "/v1/completions", b'{"prompt": "!", "n": 3}')
    error = json.loads(body)["error"]
    assert (status, error["type"], error["code"]) == (503, "server_error", "out_of_memory") and headers["retry-after"]
    assert server.complete(prompt="a", max_tokens=2)["choices"] and server.ask("GET", "/health")[0] == 200
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "answered 503" in err and "does not fit into the memory" in err


def test_only_the_requests_of_the_step_that_failed_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    not_finite = ConfigError("checkpoint", "its weights", "give logits that are not finite numbers", "take another")
    break_on_mark(monkeypatch, not_finite)
    with running() as server, ThreadPoolExecutor(3) as clients:
        engine = server.engine
        assert isinstance(engine, HeldEngine)
        engine.held = True
        before = clients.submit(server.complete, prompt="b", max_tokens=1)
        wait_for(lambda: engine.begun == 1)  # so that both of the following are the engine's before its next step
        # The first one's prompt is all that a step reads: the second waits while it fails.
        first = clients.submit(server.refused, {"prompt": "!" * SMALL.prefill_tokens, "max_tokens": 3})
        wait_for(lambda: server.inside == 2)
        second = clients.submit(server.complete, prompt="a", max_tokens=3, temperature=0, ignore_eos=True)
        wait_for(lambda: server.inside == 3)
        engine.release()
        assert before.result()["choices"]
        status, error = first.result()
        assert status == 500 and "not finite" in error["message"] and error["code"] == "not_finite"
        assert second.result()["usage"]["completion_tokens"] == 3
        assert server.complete(prompt="a", max_tokens=3)["choices"]
        server.in_engine(lambda: assert_nothing_held(engine))


def test_a_stream_is_told_in_an_event_and_has_no_done(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    not_finite = ConfigError("checkpoint", "its weights", "give logits that are not finite numbers", "take another")
    break_on_mark(monkeypatch, not_finite)
    status, _, body = server.ask("POST", "/v1/completions", b'{"prompt": "!", "stream": true}')
    assert status == 200 and b"[DONE]" not in body
    assert json.loads(body.decode().removeprefix("data: "))["error"]["code"] == "not_finite"


def test_after_any_other_error_all_are_told_and_the_server_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    break_on_mark(monkeypatch, RuntimeError("CUDA error: an illegal memory access"))
    with running() as server, ThreadPoolExecutor(2) as clients:
        engine = server.engine
        assert isinstance(engine, HeldEngine)
        engine.held = True
        asked = [clients.submit(server.refused, {"prompt": text}) for text in ("a", "!")]
        wait_for(lambda: server.inside == 2)
        engine.release()
        for one in asked:
            status, error = one.result()
            assert status == 500 and error["code"] == "engine_failed"
        server.join()
        assert server.code == 1
    err = capsys.readouterr().err
    assert "illegal memory access" in err.splitlines()[-1] and err.splitlines()[-1].startswith(
        "error: the engine failed"
    )
