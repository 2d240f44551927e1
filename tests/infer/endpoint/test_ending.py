"""The end of a server: requests finish within the grace, or are told."""

from __future__ import annotations

import json

from tests.infer.endpoint.running import HeldEngine, Running, running, wait_for

LONG = dict(prompt="a", max_tokens=3000, ignore_eos=True)


def told_to_end(server: Running) -> None:
    loop = server.server._loop
    assert loop is not None
    loop.call_soon_threadsafe(server.server.end)


def said(server: Running, **fields: object) -> str:
    """All that a connection says, to its end."""
    with server.connect(**fields) as client:
        wait_for(lambda: server.inside >= 1)
        told_to_end(server)
        wait_for(lambda: server.server.endpoint.door.closing)
        assert isinstance(server.engine, HeldEngine)
        server.engine.release()
        return b"".join(iter(lambda: client.recv(4096), b"")).decode()


def test_requests_finish_within_the_grace() -> None:
    for stream in (True, False):
        with running() as server:
            server.engine.held = True
            text = said(server, prompt="a", max_tokens=30, ignore_eos=True, stream=stream)
            assert text.startswith("HTTP/1.1 200") and '"length"' in text and ("[DONE]" in text) == stream
            server.join()
            assert server.code == 0 and server.engine.unfinished == 0


def test_after_the_grace_they_are_told() -> None:
    for stream in (True, False):
        with running(grace=0.0) as server:
            server.engine.held = True
            text = said(server, **LONG, stream=stream)
            assert text.startswith("HTTP/1.1 200" if stream else "HTTP/1.1 503") and "[DONE]" not in text
            assert '"code": "shutting_down"' in text or '"code":"shutting_down"' in text
            server.join()
            assert server.code == 0 and server.engine.unfinished == 0 and server.engine.metrics.cancelled == 1


def test_told_twice_it_does_not_wait() -> None:
    with running(grace=3600.0) as server:
        server.engine.held = True
        with server.connect(**LONG) as client:
            wait_for(lambda: server.inside == 1)
            told_to_end(server)
            told_to_end(server)
            server.engine.release()  # type: ignore[attr-defined]
            server.join()
            del client
        assert server.code == 0 and server.engine.unfinished == 0


def test_while_it_ends_nobody_is_let_in() -> None:
    import http.client

    with running() as server:
        server.engine.held = True
        first = server.connect(prompt="a", max_tokens=1)
        wait_for(lambda: server.inside == 1)
        late = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        late.putrequest("POST", "/v1/completions")  # in the middle of a request when the server is told to end
        for name, value in (("Content-Type", "application/json"), ("Content-Length", "15")):
            late.putheader(name, value)
        late.endheaders(b'{"prompt":')
        wait_for(lambda: len(server.server.server_state.tasks) == 2)
        told_to_end(server)
        wait_for(lambda: server.server.endpoint.door.closing)
        late.send(b' "a"}')
        response = late.getresponse()
        assert response.status == 503 and json.loads(response.read())["error"]["code"] == "shutting_down"
        server.engine.release()  # type: ignore[attr-defined]
        assert first.recv(100).startswith(b"HTTP/1.1 200")
        first.close()
        late.close()
