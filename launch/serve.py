#!/usr/bin/env python
r"""Serve a checkpoint to programs of this machine, by OpenAI's HTTP interface.

    python launch/serve.py runs/first
    torchrun --nproc-per-node 8 launch/serve.py runs/first --tp 8 --precision int8
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "def ", "max_tokens": 32}'

Reads the newest checkpoint of a run folder (or the one named) into one process, or into ranks of a host that share it
(--tp, --ep, --etp, --cp), of which the first answers /v1/completions, /v1/models, /health, /metrics, and
/v1/chat/completions where the tokenizer has a chat template: docs/serving.md.

It listens on loopback alone unless --host says otherwise, and asks for no key unless --api-key-file gives one. It is no
public server. SIGTERM or Ctrl-C lets the requests inside finish for --grace seconds; the exit code is 0 then, 2 for bad
input, and 1 if the engine failed.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mmtrain.command_line import Parser, exit_code
from mmtrain.config.telling import told_once
from mmtrain.infer.command import add_engine_options

if TYPE_CHECKING:
    import socket

    from mmtrain.infer.endpoint.served import Bounds
    from mmtrain.infer.engine import Engine
    from mmtrain.infer.open import OpenModel


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="run folder, one of its checkpoints, or a Hugging Face folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default %(default)s)")
    parser.add_argument("--api-key-file", metavar="FILE", help="holds the key that clients must send as bearer token")
    parser.add_argument("--name", help="of the model, as clients call it (default: the run's)")
    parser.add_argument("--max-length", type=int, help="tokens of a prompt and its answer (default: what memory holds)")
    parser.add_argument("--max-queue", type=int, default=1024, help="continuations that may wait (default %(default)s)")
    parser.add_argument("--max-body-mib", type=float, default=32, help="size of a request (default %(default)s)")
    parser.add_argument("--grace", type=float, default=30, help="seconds to finish in when told to end (default 30)")
    add_engine_options(parser, "continuations")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> int:
    """Check all that can be checked without the checkpoint, take the address, read the checkpoint, and serve it.

    Raises:
        ConfigError, DataError: the first thing that is wrong.
    """
    from mmtrain.infer.endpoint.command import check_options, is_loopback, read_key

    bounds, key = check_options(options), read_key(options.api_key_file)
    from mmtrain.config.process_env import read_processes
    from mmtrain.infer.endpoint.server import bind  # from here on with torch

    if read_processes().rank > 0:
        # torchrun tells all ranks to end; the first one lets the others go when its requests are done.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        try:
            return serve(options, bounds, key, None)
        except Exception:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to finish
            raise
    with bind(options.host, options.port) as bound:
        if key is None and not is_loopback(options.host):
            print(f"warning: whoever reaches {options.host} can use the model, as there is no authentication: give "
                  "--api-key-file", file=sys.stderr, flush=True)  # fmt: skip
        return serve(options, bounds, key, bound)


def serve(options: argparse.Namespace, bounds: Bounds, key: str | None, bound: socket.socket | None) -> int:
    """Read the checkpoint and serve it on a bound socket until a signal comes; returns the exit code.

    Raises:
        ConfigError, DataError: the first thing that is wrong.
    """
    from mmtrain.infer.command import engine_options, open_asked
    from mmtrain.infer.serving.options import EngineOptions

    with open_asked(options) as opened:
        sizes = engine_options(options, EngineOptions(longest=bounds.length))
        code = opened.run(sizes, lambda engine: answer(options, opened, engine, bounds, key, bound))
        return 0 if code is None else code


def answer(
    options: argparse.Namespace, opened: OpenModel, engine: Engine, bounds: Bounds, key: str | None,
    bound: socket.socket | None,
) -> int:  # fmt: skip
    """Answer clients until a signal comes; returns the exit code.

    Raises:
        ConfigError: a chat template that cannot be read.
    """
    import time

    from mmtrain.infer.endpoint.chat_template import find_chat_template
    from mmtrain.infer.endpoint.command import LONGEST, model_name
    from mmtrain.infer.endpoint.served import Served
    from mmtrain.infer.endpoint.server import EndpointServer

    assert bound is not None  # the first rank's
    checkpoint = opened.checkpoint
    place = Path(options.tokenizer or (checkpoint.path if checkpoint.folder else checkpoint.path / "tokenizer"))
    chat = find_chat_template(place if place.is_dir() else place.parent, checkpoint.tokenizer)
    length = min(bounds.length or LONGEST, engine.plan.longest or LONGEST)
    name = options.name or model_name(checkpoint.path)
    served = Served(name, checkpoint.tokenizer, length, engine.plan.running + bounds.waiting, int(time.time()), chat)
    host, port = bound.getsockname()[:2]
    where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    line = (f"serving {name} ({checkpoint.path} on {opened.place}) at {where}/v1: {length:,} tokens a request, "
            f"{engine.plan.running} at once")  # fmt: skip
    server = EndpointServer(engine, served, bounds, key)
    return server.serve_until_told(bound, lambda: print(line, file=sys.stderr, flush=True))


def main(argv: list[str] | None = None) -> int:
    """Serve; returns the exit code."""
    options = parse(argv)
    return exit_code(lambda: told_once(lambda: run(options)))


if __name__ == "__main__":
    sys.exit(main())
