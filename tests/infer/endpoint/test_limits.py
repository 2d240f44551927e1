"""Bounds of the endpoint: bodies, lengths, the queue, keys, paths and methods."""

from __future__ import annotations

import json
import socket
from dataclasses import replace

import pytest

from mmtrain.errors import ConfigError
from mmtrain.infer.endpoint.served import Bounds
from tests.infer.endpoint.running import HeldEngine, Running, running, wait_for
from tests.infer.served import SMALL, assert_nothing_held


def test_a_body_beyond_the_limit_is_not_read() -> None:
    with running(body_bytes=5000) as server:
        status, headers, body = server.ask("POST", "/v1/completions", b"x" * 5001)
        assert status == 413 and json.loads(body)["error"]["code"] == "body_too_long"
        assert headers["connection"] == "close"
        assert server.ask("POST", "/v1/completions", json.dumps({"prompt": "a", "user": "x" * 4900}).encode())[0] == 200
        # Said to be huge, nothing of it sent: it is refused all the same.
        assert said(server, "Content-Length: 99999999999").startswith(b"HTTP/1.1 413")
        # Of unknown length, in parts that never end.
        part = b"1000\r\n" + b" " * 4096 + b"\r\n"
        assert said(server, "Transfer-Encoding: chunked", part * 2).startswith(b"HTTP/1.1 413")


def said(server: Running, header: str, data: bytes = b"") -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{header}\r\n\r\n"
        client.sendall(head.encode() + data)
        return client.recv(4096)


def test_a_prompt_beyond_the_memory_is_refused_with_what_fits() -> None:
    with running(options=replace(SMALL, longest=40, max_running=1)) as server:
        assert server.served.length == server.engine.plan.longest
        longest = server.served.length
        status, error = server.refused({"prompt": "a" * (longest + 1), "max_tokens": 1})
        assert status == 400 and error["code"] == "context_length_exceeded" and error["param"] == "prompt"
        assert f"takes {longest:,} together" in error["message"]
        assert (
            server.complete(prompt="a" * (longest - 3), max_tokens=3, ignore_eos=True)["usage"]["total_tokens"]
            == longest
        )
    with running(length=10) as server:
        assert server.refused({"prompt": "a" * 5, "max_tokens": 6})[1]["param"] == "max_tokens"
        assert server.complete(prompt="a" * 5, max_tokens=5)["choices"]


def test_beyond_the_queue_clients_are_told_to_come_again() -> None:
    with running(options=replace(SMALL, max_running=2), waiting=1) as server:
        engine = server.engine
        assert isinstance(engine, HeldEngine)
        engine.held = True
        clients = [server.connect(prompt="a", max_tokens=2, n=n, ignore_eos=True) for n in (1, 2)]
        wait_for(lambda: server.inside == 3)
        status, headers, body = server.ask("POST", "/v1/completions", b'{"prompt": "a"}')
        assert (status, headers["retry-after"]) == (429, "1")
        assert json.loads(body)["error"]["type"] == "rate_limit_error"
        assert server.refused({"prompt": "a", "n": 4})[0] == 400  # it would never have room
        page = server.ask("GET", "/metrics")[2].decode()
        assert "mmtrain_engine_inside 3" in page and 'mmtrain_http_responses_total{status="429"} 1' in page
        engine.release()
        assert all(client.recv(100).startswith(b"HTTP/1.1 200") for client in clients)
        wait_for(lambda: server.inside == 0)
        assert server.complete(prompt="a", max_tokens=1)["choices"]
        for client in clients:
            client.close()
        server.in_engine(lambda: assert_nothing_held(engine))


def test_paths_methods_and_types_that_are_not_served(server: Running) -> None:
    for method, path, data, headers, status in (
        ("GET", "/", b"", {}, 404),
        ("POST", "/v1/embeddings", b"{}", {}, 404),
        ("GET", "/v1/completions", b"", {}, 405),
        ("POST", "/v1/models", b"{}", {}, 405),
        ("POST", "/v1/completions", b"{}", {"Content-Type": "text/plain"}, 415),
        ("POST", "/v1/completions", b"{}", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ("POST", "/v1/completions", b"{}", {"Content-Encoding": "gzip"}, 415),
    ):
        found, _, body = server.ask(method, path, data, **headers)
        assert found == status and json.loads(body)["error"]["type"] == "invalid_request_error"


def test_without_a_chat_template_chats_are_refused_plainly(server: Running) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    status, error = server.refused(body, "/v1/chat/completions")
    assert status == 400 and error["code"] == "no_chat_template" and "use /v1/completions" in error["message"]


def test_a_key_is_asked_for_everywhere_but_for_health() -> None:
    key = "k" * 16
    with running(key=key) as server:
        for path in ("/v1/models", "/metrics", "/nothing"):
            for given in ({}, {"Authorization": "Bearer other"}, {"Authorization": key}, {"Authorization": "Bearer é"}):
                status, headers, body = server.ask("GET", path, **given)
                assert status == 401 and headers["www-authenticate"] == "Bearer"
                assert json.loads(body)["error"]["type"] == "authentication_error" and key.encode() not in body
        assert server.ask("POST", "/v1/completions", b'{"prompt": "a"}')[0] == 401
        assert server.ask("GET", "/health")[0] == 200
        bearer = {"Authorization": f"Bearer {key}"}
        assert server.ask("GET", "/v1/models", **bearer)[0] == 200
        assert server.ask("POST", "/v1/completions", b'{"prompt": "a"}', **bearer)[0] == 200


def test_models_health_and_figures(server: Running) -> None:
    model = json.loads(server.ask("GET", "/v1/models")[2])["data"][0]
    assert (model["id"], model["max_model_len"]) == ("tiny", server.served.length)
    assert server.ask("GET", "/health")[::2] == (200, b'{"status":"ok"}')
    before = server.engine.metrics.generated_tokens
    server.complete(prompt="abc", max_tokens=5, ignore_eos=True)
    status, headers, body = server.ask("GET", "/metrics")
    lines = dict(line.rsplit(" ", 1) for line in body.decode().splitlines() if not line.startswith("#"))
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    assert int(lines["mmtrain_engine_generated_tokens_total"]) == before + 5
    assert lines["mmtrain_engine_pages"] == str(server.engine.plan.pages)
    assert {f"mmtrain_engine_{name}" for name in ("waiting", "running", "pages_used", "inside")} <= set(lines)


@pytest.mark.parametrize(
    ("bounds", "told"),
    [
        (dict(body_bytes=5), "--max-body-mib"),
        (dict(waiting=-1), "--max-queue=-1"),
        (dict(length=1), "--max-length=1"),
        (dict(grace=-1.0), "--grace=-1.0"),
        (dict(grace=float("nan")), "--grace=nan"),
    ],
)
def test_bounds_that_make_no_sense(bounds: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Bounds(**bounds).validate()
