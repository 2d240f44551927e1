"""The tracker never raises, never goes online by itself, and writes into the run folder only."""

import sys
import types

import pytest

from mmtrain.config import LogConfig
from mmtrain.errors import ConfigError
from mmtrain.log import wandb_tracker as tracker
from mmtrain.log.wandb_tracker import Tracker, wandb_mode


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_CACHE_DIR", "WANDB_SILENT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


class FakeWandb(types.ModuleType):
    """Records what it is given, and fails where told to."""

    def __init__(self, fail=""):
        super().__init__("wandb")
        self.fail, self.options, self.logged, self.finished = fail, {}, [], False

        class Settings:
            base_url = "http://127.0.0.1:9"  # the discard port: nothing answers
            model_fields = ("silent", "console")

            def __init__(self, **options):
                self.options = options

        self.Settings = Settings

    def init(self, **options):
        if self.fail == "init":
            raise RuntimeError("no\nnetwork")
        self.options = options
        return self

    def log(self, record, step):
        if self.fail == "log":
            raise OSError("broken pipe")
        self.logged.append((step, record))

    def finish(self):
        if self.fail == "finish":
            raise RuntimeError("late")
        self.finished = True


def start(monkeypatch, tmp_path, fail="", **options):
    fake, warnings = FakeWandb(fail), []
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = options.pop("log", LogConfig())
    return Tracker(log, tmp_path / "run", "name", {"a": 1}, warn=warnings.append, **options), fake, warnings


def test_mode(monkeypatch, tmp_path):
    assert wandb_mode(LogConfig()) == "offline"
    (tmp_path / "netrc").write_text("machine example.com login user password x\n")
    assert wandb_mode(LogConfig()) == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert wandb_mode(LogConfig()) == "online"
    assert wandb_mode(LogConfig(wandb="online")) == "online"
    assert wandb_mode(LogConfig(wandb="offline")) == "offline"
    assert wandb_mode(LogConfig(wandb="off")) == "off"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(LogConfig()) == "off"


def test_online_without_a_key_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"log\.wandb=online: there is no API key here; run `wandb login`"):
        wandb_mode(LogConfig(wandb="online"))
    monkeypatch.setenv("WANDB_API_KEY", "key")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ConfigError, match="WANDB_MODE=offline forbids it"):
        wandb_mode(LogConfig(wandb="online"))


def test_records_and_files(monkeypatch, tmp_path):
    track, fake, warnings = start(monkeypatch, tmp_path)
    track.log({"loss": 1.0, "nothing": None, "drop_rate_per_layer": [0.1, 0.2], "router_load": [[1.0, 1.0]]}, step=3)
    track.finish()
    assert fake.options["mode"] == "offline" and fake.options["dir"] == str(tmp_path / "run")
    assert fake.logged == [(3, {"loss": 1.0, "drop_rate_per_layer/layer_00": 0.1, "drop_rate_per_layer/layer_01": 0.2})]
    assert fake.finished and not warnings and not track.on


def test_the_id_stays_after_a_resume(monkeypatch, tmp_path):
    first, second = start(monkeypatch, tmp_path)[1], start(monkeypatch, tmp_path)[1]
    assert first.options["id"] == second.options["id"]


def test_unreachable_server_means_offline_and_one_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.setattr(tracker, "CONNECT_TIMEOUT_SECONDS", 0.5)
    track, fake, warnings = start(monkeypatch, tmp_path)
    assert track.on and fake.options["mode"] == "offline" and len(warnings) == 1


@pytest.mark.parametrize("fail", ["init", "log", "finish"])
def test_any_failure_is_one_warning_line(monkeypatch, tmp_path, fail):
    track, _, warnings = start(monkeypatch, tmp_path, fail)
    for step in range(3):
        track.log({"loss": 1.0}, step)
    track.finish()
    track.finish()
    assert len(warnings) == 1 and "\n" not in warnings[0] and not track.on


def test_off_and_other_ranks_do_not_import_wandb(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    warnings = []
    Tracker(LogConfig(wandb="off"), tmp_path, "n", {}, warn=warnings.append).log({"a": 1}, 1)
    Tracker(LogConfig(), tmp_path, "n", {}, enabled=False, warn=warnings.append).log({"a": 1}, 1)
    assert warnings == []
    Tracker(LogConfig(), tmp_path, "n", {}, warn=warnings.append)
    assert len(warnings) == 1


def test_real_wandb_offline_stays_in_the_run_folder(monkeypatch, tmp_path, capfd):
    pytest.importorskip("wandb")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    warnings = []
    track = Tracker(LogConfig(wandb="offline"), tmp_path / "run", "name", {"a": 1}, warn=warnings.append)
    track.log({"loss": 1.0}, 1)
    track.finish()
    assert warnings == []
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert not list((tmp_path / "cwd").iterdir())
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
