"""The launcher as a process: signals, what it says, and what it refuses before it reads anything."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.infer.chain import TEXT

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "launch" / "serve.py"
Capture = pytest.CaptureFixture


@contextmanager
def served(run: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that serves a run, and its port, once it says that it does."""
    pytest.importorskip("starlette", reason='the endpoint needs pip install "mmtrain[serve]"')
    pytest.importorskip("uvicorn", reason='the endpoint needs pip install "mmtrain[serve]"')
    paths = [str(ROOT), str(ROOT / "data"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(SCRIPT),
        str(run),
        "--port",
        "0",
        "--device",
        "cpu",
        "--memory-gib",
        "0.01",
        *options,
    ]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.match(r"serving chain \(.*\) at http://127\.0\.0\.1:(\d+)/v1: [\d,]+ tokens a request", line)
        assert found, line
        yield process, int(found[1])
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def connect(port: int, **fields: object) -> http.client.HTTPResponse:
    """The response to a completion; its body is still to be read."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/completions", json.dumps(fields), {"Content-Type": "application/json"})
    return connection.getresponse()


def test_commands_of_the_docs_work_as_printed_and_a_signal_lets_a_stream_finish(run: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    lines = re.findall(r"^curl .*$", (ROOT / "docs" / "serving.md").read_text(), re.M)
    assert len(lines) >= 6
    with served(run) as (process, port):
        for line in lines:
            command = shlex.split(line.replace("localhost:8000", f"127.0.0.1:{port}"))
            done = subprocess.run([*command, "--fail", "--max-time", "120"], capture_output=True, text=True)
            assert done.returncode == 0 and done.stdout, (line, done.stderr)
            assert "[DONE]" in done.stdout if '"stream": true' in line else True
        # A request as a person would type it, over a bare socket.
        with socket.create_connection(("127.0.0.1", port), timeout=120) as client:
            body = '{"prompt": "n", "temperature": 0}'
            client.sendall(f"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json; charset=utf-8\r\n"
                           f"content-length: {len(body)}\r\n\r\n{body}".encode())  # fmt: skip
            said = b"".join(iter(lambda: client.recv(4096), b"")).decode()
        assert said.startswith("HTTP/1.1 200 OK\r\n") and TEXT[1:] in said
        with socket.create_connection(("127.0.0.1", port), timeout=120) as client:
            client.sendall(b"no HTTP at all\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 400")
        stream = connect(port, prompt="n", max_tokens=400, ignore_eos=True, temperature=0, stream=True)
        first = stream.readline()
        assert stream.status == 200 and json.loads(first.removeprefix(b"data: "))["choices"][0]["text"] == "é"
        process.send_signal(signal.SIGTERM)
        rest = stream.read().decode()  # to its end
        assert rest.endswith("data: [DONE]\n\n") and '"finish_reason": "length"' in rest
        assert process.wait(timeout=120) == 0
        assert process.stderr is not None and process.stderr.read() == "Invalid HTTP request received.\n"
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=10)


@pytest.fixture
def main() -> Callable[[list[str]], int]:
    """The launcher's main function, called in this process."""
    spec = importlib.util.spec_from_file_location("launch_serve", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


WRONG = {
    "--port -1": "--port=-1: must lie in 0 to 65535",
    "--port 65536": "--port=65536: must lie",
    "--port http": "argument --port: invalid int value",
    "--host 256.1.1.1": "--host=256.1.1.1 port 8000: cannot be served on",
    "--name ": "--name='': is empty",
    "--name a\udcff": r"--name='a\udcff': is not UTF-8 text (at character 1)",
    "--max-length 1": "--max-length=1: must be at least 2",
    "--max-queue -1": "--max-queue=-1: must be at least 0",
    "--max-body-mib 0": "--max-body-mib=0.0: must lie above 0",
    "--max-body-mib nan": "--max-body-mib=nan: must lie above 0",
    "--grace -1": "--grace=-1.0: must lie in 0 to 86,400",
    "--max-running 0": "--max-running=0: must be at least 1",
    "--prefill-tokens 0": "--prefill-tokens=0: must be at least 1",
    "--memory-gib inf": "--memory-gib=inf: must be a number above 0",
    "--device mps": "--device=mps: not a device",
    "--rope-base 0": "--rope-base=0.0: must be above 1",
    "--api-key-file gone": "--api-key-file=gone: cannot be read",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options_are_one_line_before_the_checkpoint_is_read(
    options: str, run: Path, main: Callable[[list[str]], int], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("uvicorn")
    monkeypatch.setattr("mmtrain.infer.load.open_checkpoint", lambda *args: pytest.fail("the checkpoint was read"))
    try:
        code = main([str(run), *options.split(" ", 1)])
    except SystemExit as end:  # argparse's own
        assert isinstance(end.code, int)
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ")
    assert WRONG[options] in err


def test_a_port_that_is_taken_is_one_line_before_the_checkpoint_is_read(
    run: Path, main: Callable[[list[str]], int], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("uvicorn")
    monkeypatch.setattr("mmtrain.infer.load.open_checkpoint", lambda *args: pytest.fail("the checkpoint was read"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main([str(run), "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot be served on (Address already in use)" in capsys.readouterr().err
    assert main([str(run / "gone")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_without_its_packages_one_line_says_what_to_install(
    run: Path, main: Callable[[list[str]], int], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    assert main([str(run)]) == 2
    assert capsys.readouterr().err == 'error: uvicorn=missing: the endpoint needs it; pip install "mmtrain[serve]"\n'


def test_a_host_that_others_reach_is_warned_of_without_a_key(
    run: Path, main: Callable[[list[str]], int], capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("uvicorn")
    monkeypatch.setattr(
        "mmtrain.infer.endpoint.server.EndpointServer.serve_until_told", lambda self, bound, ready: ready() or 0
    )
    small = ["--port", "0", "--device", "cpu", "--memory-gib", "0.01"]
    key = tmp_path / "key"
    key.write_text("0123456789abcdef\n")
    for options, warned in ((["--host", "0.0.0.0"], True), (["--host", "0.0.0.0", "--api-key-file", str(key)], False),
                            (["--host", "localhost"], False), ([], False)):  # fmt: skip
        assert main([str(run), *small, *options]) == 0
        err = capsys.readouterr().err
        assert ("there is no authentication" in err) == warned and err.count("serving chain") == 1
    for text in ("", "short", "two words of 16 characters", "é" * 20):
        key.write_text(text)
        assert main([str(run), *small, "--api-key-file", str(key)]) == 2
        assert "--api-key-file=" in capsys.readouterr().err


def test_help_needs_neither_torch_nor_a_server(main: Callable[[list[str]], int]) -> None:
    code = "import runpy, sys\nsys.argv = ['s', '--help']\ntry:\n    "
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    code += "\nexcept SystemExit:\n    assert not {'torch', 'numpy', 'starlette', 'uvicorn'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "data"), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "--api-key-file" in done.stdout
