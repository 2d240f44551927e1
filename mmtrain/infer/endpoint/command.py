"""Options of `launch/serve.py`, checked before anything is read. Needs no torch and no server."""

from __future__ import annotations

import argparse
import importlib.util
from ipaddress import ip_address
from pathlib import Path

from mmtrain.errors import ConfigError
from mmtrain.infer.command import check_engine_options
from mmtrain.infer.endpoint.served import Bounds

LONGEST = 1 << 22  # tokens; where neither --max-length nor the engine's memory says less


def check_options(options: argparse.Namespace) -> Bounds:
    """Refuse options that make no sense, and return the bounds that they give.

    Raises:
        ConfigError: the first that is wrong, or a package that is missing.
    """
    for name in ("starlette", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(name, "missing", "the endpoint needs it", 'pip install "mmtrain[serve]"')
    if not 0 <= options.port <= 65_535:
        raise ConfigError("--port", options.port, "must lie in 0 to 65535", "0 takes a free one")
    if options.name is not None and not options.name.strip():
        raise ConfigError("--name", repr(options.name), "is empty", "leave it out")
    check_engine_options(options)
    if not 0 < options.max_body_mib <= 4096:
        raise ConfigError("--max-body-mib", options.max_body_mib, "must lie above 0 and to 4096", "for example 32")
    bounds = Bounds(int(options.max_body_mib * (1 << 20)), options.max_queue, options.max_length, options.grace)
    bounds.validate()
    return bounds


def read_key(file: str | None) -> str | None:
    """Return the key that clients must send: the only line of a file; None without a file.

    Raises:
        ConfigError: the file cannot be read, or does not hold one word.
    """
    if file is None:
        return None
    try:
        words = Path(file).read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--api-key-file", file, f"cannot be read ({error})", "give a text file") from None
    if len(words) != 1 or len(words[0]) < 16:
        problem = "must hold one word of 16 characters at least"
        raise ConfigError("--api-key-file", file, problem, "for example of: openssl rand -hex 32")
    return words[0]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def model_name(checkpoint: Path) -> str:
    """Return what clients call a checkpoint: its run's name, or its folder's, in UTF-8 whatever it is on disk."""
    folder = checkpoint.resolve()
    name = folder.parents[1].name if folder.parent.name == "checkpoints" else folder.name
    return name.encode("utf-8", "replace").decode()
