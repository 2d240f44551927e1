"""Weights & Biases as a copy of the metrics that never raises, prompts or stops a run.

The first failure of any call prints one warning and turns the tracker off; `metrics.jsonl` has everything anyway.
"""

from __future__ import annotations

import netrc
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from mmtrain.config import LogConfig
from mmtrain.config.checks import require
from mmtrain.log.series import series

CONNECT_TIMEOUT_SECONDS = 3.0
INIT_TIMEOUT_SECONDS = 30.0
FINISH_TIMEOUT_SECONDS = 30.0
DEFAULT_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # of older and newer wandb releases


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def wandb_mode(log: LogConfig) -> str:
    """Return ``online``, ``offline`` or ``off``.

    `auto` goes online only with an API key, as it must never prompt; wandb's own WANDB_MODE may hold it back. `online`
    does not make do with less for want of a key; a server that does not answer is a warning, as with `auto`.

    Raises:
        ConfigError: `online` without an API key, or against WANDB_MODE.
    """
    forced = os.environ.get("WANDB_MODE", "")
    if log.wandb == "online":
        require(forced in ("", "online", "run"), "log.wandb", "online", f"WANDB_MODE={forced} forbids it",
                "unset WANDB_MODE, or give log.wandb=auto")  # fmt: skip
        require(_has_api_key(), "log.wandb", "online", "there is no API key here", "run `wandb login`, or set "
                "WANDB_API_KEY, or give log.wandb=offline")  # fmt: skip
        return "online"
    if log.wandb == "off" or forced == "disabled":
        return "off"
    if log.wandb == "offline" or forced in ("offline", "dryrun"):
        return "offline"
    return "online" if _has_api_key() else "offline"


def _has_api_key() -> bool:
    """Look where `wandb login` and its users put the key: the environment, or the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    own_server = urlparse(os.environ.get("WANDB_BASE_URL", "")).hostname
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any(host in hosts for host in ((own_server,) if own_server else DEFAULT_HOSTS))


def _reachable(url: str) -> bool:
    """Try to connect, for a few seconds: a thread, because looking a name up has no time limit of its own."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    parts, answered = urlparse(url), threading.Event()

    def connect() -> None:
        try:
            port = parts.port or (80 if parts.scheme == "http" else 443)
            socket.create_connection((parts.hostname or "", port), timeout=CONNECT_TIMEOUT_SECONDS).close()
            answered.set()
        except OSError:
            pass

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_TIMEOUT_SECONDS)
    return answered.is_set()


class Tracker:
    """Sends records to wandb, or does nothing.

    Args:
        log: its mode and project.
        run_dir: the run's folder; wandb writes into its `wandb` folder only.
        name: the run's name.
        config: the run's configuration as a nested dict.
        enabled: False on every rank but the first.
        warn: prints the one warning of a failure.
    """

    def __init__(
        self,
        log: LogConfig,
        run_dir: Path,
        name: str,
        config: Mapping[str, Any],
        enabled: bool = True,
        warn: Callable[[str], None] = _warn,
    ) -> None:
        self._warn, self._run = warn, None
        mode = wandb_mode(log) if enabled else "off"
        if mode != "off":
            self._guard(lambda: self._start(mode, log.wandb_project, Path(run_dir), name, dict(config)))

    @property
    def on(self) -> bool:
        """Whether records still go anywhere."""
        return self._run is not None

    @property
    def place(self) -> str:
        """Where records go: the page of an online run, the folder of an offline one; empty when off."""
        if self._run is None:
            return ""
        return getattr(self._run, "url", None) or f"offline in {getattr(self._run, 'dir', '')}"

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Send one record; lists of one number a layer become one series a layer, deeper ones stay out."""
        if self._run is not None:
            self._guard(lambda: self._run.log(dict(series(record)), step=step))

    def finish(self) -> None:
        """Close the run, waiting for an upload for half a minute at most."""
        if self._run is not None:
            self._guard(lambda: self._run.finish())
            self._run = None

    def _start(self, mode: str, project: str, run_dir: Path, name: str, config: dict[str, Any]) -> None:
        root = run_dir.resolve()
        (root / "wandb").mkdir(parents=True, exist_ok=True)
        # wandb reads these two from the environment only.
        os.environ.setdefault("WANDB_CACHE_DIR", str(root / "wandb" / "cache"))
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        url = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
        if mode == "online" and not _reachable(url):
            self._warn(
                f"wandb records offline: {url} does not answer; upload later with `wandb sync {root}/wandb/*run-*`"
            )
            mode = "offline"
        run_id = _run_id(root / "wandb" / "mmtrain_run_id")
        settings = {
            "silent": True,
            "console": "off",  # do not capture the terminal, which the live line uses
            "disable_git": True,
            "save_code": False,
            "login_timeout": 1.0,  # never wait for someone to type a key
            "init_timeout": INIT_TIMEOUT_SECONDS,
            "finish_timeout": FINISH_TIMEOUT_SECONDS,
        }
        known = getattr(wandb.Settings, "model_fields", None) or wandb.Settings.__annotations__
        self._run = wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow" if mode == "online" else None,
            config=config,
            dir=str(root),
            mode=mode,
            settings=wandb.Settings(**{key: value for key, value in settings.items() if key in known}),
        )

    def _guard(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            self._run = None
            self._warn(f"wandb is off for this run: {' '.join(str(error).split()) or type(error).__name__}")


def _run_id(path: Path) -> str:
    """Return the wandb id of this run folder, the same after a resume."""
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
