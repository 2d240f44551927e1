"""Which weights are the frozen reference of preference training, and whether what a run folder holds is of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmtrain.checkpoint.listing import find_checkpoint
from mmtrain.checkpoint.progress import read_meta
from mmtrain.checkpoint.run_folder import Start
from mmtrain.config import PretrainConfig
from mmtrain.errors import ConfigError
from mmtrain.hf.folder import is_hf_folder
from mmtrain.train.between_steps import REFERENCE
from mmtrain.train.inputs import RunInputs
from mmtrain.train.reference_pass import ReferencePass
from mmtrain.train.reference_store import fingerprint_of

_ANEW = "give the checkpoint that the run started from, or start another run"


@dataclass(frozen=True)
class Reference:
    """The frozen reference of a run.

    Attributes:
        fingerprint: of its checkpoint.
        weights: where it lies; None where a resumed run does not need it any more.
    """

    fingerprint: str
    weights: Path | None


def find_reference(config: PretrainConfig, inputs: RunInputs, start: Start, run: Path) -> Reference:
    """Return the weights that a run started from, by which its pairs are measured.

    Args:
        config: every option.
        inputs: of the run.
        start: what this launch begins with.
        run: the run's folder; nothing is written.

    Raises:
        ConfigError: the run starts from no weights, the folder holds log-probabilities of others, or some are missing
            and the weights were not given.
    """
    given = start.weights if start.resume is None else _given(config)
    if start.resume is None:
        if given is None:
            raise ConfigError("run.init_from", None, "preference training measures a model by the weights that it "
                              "starts from, and this run starts from none",
                              "give the run or the checkpoint of the stage before")  # fmt: skip
        fingerprint = fingerprint_of(given)
    else:
        fingerprint = _recorded(start.resume)
        if given is not None and fingerprint_of(given) != fingerprint:
            raise ConfigError("run.init_from", given, f"{start.resume} was trained with another checkpoint as its "
                              "reference", _ANEW)  # fmt: skip
    work = ReferencePass(config, inputs, run, fingerprint)
    if (name := work.store.difference()) is not None:
        what = "another checkpoint" if name == "checkpoint" else f"other rows ({name} differs)"
        option, value = ("run.init_from", given) if name == "checkpoint" else ("run.name", config.run.name)
        raise ConfigError(option, value, f"{work.store.folder} holds log-probabilities of {what}",
                          f"{_ANEW} under another run.name, or delete that folder")  # fmt: skip
    if given is None and work.store.missing():
        raise ConfigError("run.init_from", None, f"{work.store.folder} lacks log-probabilities of the reference",
                          "give the checkpoint that the run started from")  # fmt: skip
    return Reference(fingerprint, given)


def _given(config: PretrainConfig) -> Path | None:
    """Return the checkpoint that `run.init_from` names, where a resumed run's still lies there."""
    path = config.run.init_from
    if path is None:
        return None
    if is_hf_folder(path):
        return Path(path)
    try:
        return find_checkpoint("run.init_from", path, lambda line: None)
    except ConfigError:
        return None


def _recorded(checkpoint: Path) -> str:
    found = read_meta(checkpoint).get(REFERENCE)
    if not isinstance(found, str):
        raise ConfigError("run.resume", checkpoint, "its record names no reference: it is not of preference training",
                          "start another run from its weights with run.init_from")  # fmt: skip
    return found
