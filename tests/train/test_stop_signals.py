"""Signals that ask for a stop: the first is remembered, a second request ends the process, and handlers come back."""

from __future__ import annotations

import os
import signal

import pytest

from mmtrain.train import stop_signals
from mmtrain.train.stop_signals import ASKING, SAME_REQUEST_SECONDS, StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered_and_handlers_come_back(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {asking: signal.getsignal(asking) for asking in ASKING}
    with StopSignals(speaks=True) as signals:
        assert signals.received is None and number in ASKING
        signal.raise_signal(number)
        assert signals.received is number
    assert {asking: signal.getsignal(asking) for asking in ASKING} == before
    assert capfd.readouterr().err == f"\n{number.name}: stopping after this step; once more ends at once\n"


def test_a_second_request_ends_the_process_and_the_same_one_twice_does_not(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Under torchrun a Ctrl-C comes from the terminal and, a moment later, as SIGTERM from torchrun."""
    now, sent = [100.0], []
    monkeypatch.setattr(stop_signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stop_signals.os, "kill", lambda *given: sent.append(given))
    with StopSignals(speaks=False) as signals:
        signal.raise_signal(signal.SIGINT)
        now[0] += SAME_REQUEST_SECONDS - 0.1
        signal.raise_signal(signal.SIGTERM)
        assert signals.received is signal.SIGINT and sent == []
        now[0] += 0.2
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert sent == [(os.getpid(), signal.SIGTERM)] and signals.received is signal.SIGINT
    assert capfd.readouterr().err == ""
