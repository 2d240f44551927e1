"""Peers of the whole-step bench are named and refused before anything is built; their rows are ours."""

from __future__ import annotations

import importlib

import pytest
import torch

from mmtrain.bench import step_peers
from mmtrain.bench.step_cases import CASES, STEPS, batches, model_config
from mmtrain.bench.step_peers import PEERS, PeerJob, build, parse_peers
from mmtrain.errors import ConfigError
from mmtrain.model.flops import count_parameters
from tests.bench.shapes import tiny

SOFTMAX = "410m-softmax-one-document"


@pytest.fixture
def all_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every package can be imported."""
    monkeypatch.setattr(step_peers, "missing", lambda package: None)


def test_names(all_installed: None) -> None:
    assert parse_peers("") == []
    assert parse_peers(f"{SOFTMAX},megatron:{SOFTMAX},fla:1b") == [
        ("llama", SOFTMAX), ("megatron", SOFTMAX), ("fla", "1b"),
    ]  # fmt: skip
    assert parse_peers("megatron-ep:1b-16experts-softmax-one-document")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (f"apex:{SOFTMAX}", "apex is none of llama, titan, megatron"),
        ("fla:2b", "2b is no case"),
        ("megatron:1b", "no layers of kind L"),
        ("megatron:1b-softmax", "its rows are of one document"),
        ("llama:1b-16experts-softmax-one-document", "it has no experts here"),
        ("fla:1b-16experts", "it has no experts here"),
    ],
)
def test_what_a_peer_cannot_train_is_refused(all_installed: None, given: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_peers(given)


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "fla", PEERS["fla"]._replace(packages=("no_such_package",)))
    with pytest.raises(ConfigError, match=r"no_such_package cannot be imported \(No module.*; install it"):
        parse_peers("fla:1b")


def test_peers_can_be_named_without_their_packages() -> None:
    for peer in PEERS.values():
        assert hasattr(importlib.import_module(f"mmtrain.bench.{peer.module}"), peer.step)
        assert set(peer.options) <= set(PeerJob.__dataclass_fields__)


def test_every_case_is_a_model() -> None:
    for case in CASES.values():
        model_config(case).validate()


def test_ranks_and_steps_have_rows_of_their_own() -> None:
    case, seen = CASES["410m-softmax-one-document"], set()
    for rank in range(2):
        for step in range(STEPS):
            seen |= {int(one.tokens_BS[0, :4] @ torch.tensor([1, 512, 512**2, 512**3]))
                     for one in batches(case, 512, step, rank)}  # fmt: skip
    assert len(seen) == 2 * STEPS * case.micro_batches


@pytest.mark.parametrize(("peer", "package"), [("llama", "transformers"), ("titan", "torchtitan.models.llama3")])
def test_llama_trains(peer: str, package: str) -> None:
    pytest.importorskip(package)
    config, rows = tiny("S", "model.ffn_hidden_size=176")
    with torch.compiler.set_stance("force_eager"):
        step = build(peer, PeerJob(config, rows, torch.device("cpu")))
        assert step.parameters == count_parameters(config).total
        for part in step.optimizer.param_groups:
            part["lr"] = 1e-3
        losses = [step() for _ in range(3)]
    assert losses[2] < losses[1] < losses[0], losses
