"""Where the console entry finds launchers that are not in the package: an editable install's checkout, or nowhere."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmtrain.__main__ import launcher
from mmtrain.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def install(monkeypatch: pytest.MonkeyPatch, direct_url: dict | None) -> None:
    """Let mmtrain's distribution be one that was installed from there."""
    text = None if direct_url is None else json.dumps(direct_url)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: text))


@pytest.mark.parametrize(
    "name",
    [
        "pretrain",
        "submit",
        "prepare",
        "prepare_images",
        "compare",
        "profile_step",
        "report",
        "generate",
        "serve",
        "eval",
        "checkpoint",
        "sweep",
    ],
)
def test_an_editable_install_runs_its_checkout_s_launchers(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    install(monkeypatch, {"url": ROOT.as_uri(), "dir_info": {"editable": True}})
    assert launcher(name) == ROOT / "launch" / f"{name}.py"


def test_without_launchers_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/prepare.py").touch()
    elsewhere = {"url": tmp_path.as_uri(), "dir_info": {"editable": True}}  # another checkout than the one imported
    for record in (None, elsewhere):
        install(monkeypatch, record)
        with pytest.raises(ConfigError, match=r"command=prepare: .* is not installed.*launch/prepare\.py"):
            launcher("prepare")
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(ConfigError, match="is not installed"):
        launcher("prepare")
