"""Check that every corpus of a run was made with the run's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from mmdata.corpus.open import tokenizer_identity
from mmdata.tokenizer_identity import TokenizerIdentity
from mmtrain.config import DataConfig, PhaseConfig, SourceConfig
from mmtrain.errors import ConfigError


def named_sources(data: DataConfig, phases: Sequence[PhaseConfig]) -> list[tuple[str, SourceConfig]]:
    """Return every source of a run with the option that names it: those of `data`, the phases' own, the long ones."""
    named = common_sources(data)
    for i, phase in enumerate(phases):
        named += [(f"stage.phases[{i}].sources[{j}].path", source) for j, source in enumerate(phase.sources or [])]
    return [*named, *((f"data.long_sources[{i}].path", source) for i, source in enumerate(data.long_sources))]


def common_sources(data: DataConfig) -> list[tuple[str, SourceConfig]]:
    """Return the sources of phases that name none, with the option that names each."""
    return [("data.path" if data.path else f"data.sources[{i}].path", s) for i, s in enumerate(data.all_sources)]


def check_tokenizers(
    sources: Sequence[tuple[str, SourceConfig]], given: str | None, tokenizer: TokenizerIdentity
) -> list[str]:
    """Refuse a corpus that was made with another tokenizer; return one line on those that cannot be checked.

    Args:
        sources: as `named_sources` returns them; the first one's tokenizer is the run's unless one is given.
        given: `data.tokenizer`.
        tokenizer: identity of the run's tokenizer.

    Raises:
        ConfigError: naming both tokenizers and where they come from.
        DataError: a corpus whose manifest and tokenizer.json contradict each other.
    """
    unknown = []
    first_option, first = sources[0]
    for option, source in sources:
        own = tokenizer_identity(source.path)
        if own is None:
            unknown.append(f"{option}={source.path}")
        elif not own.same_as(tokenizer) and given is not None:
            problem = f"is {tokenizer}, but {option}={source.path} was made with {own}"
            raise ConfigError("data.tokenizer", given, problem, "leave it out, or prepare that corpus with it")
        elif not own.same_as(tokenizer):
            problem = f"was made with {own}, but {first_option}={first.path} with {tokenizer}"
            both = f"prepare both with one: launch/prepare.py --tokenizer {first.path}"
            raise ConfigError(option, source.path, problem, both)
    if not unknown:
        return []
    return [f"no tokenizer on record for {_listed(unknown)}: that they were made with {tokenizer} cannot be checked"]


def _listed(names: Sequence[str], most: int = 3) -> str:
    """Return the distinct names in a line, the first few of many."""
    distinct = list(dict.fromkeys(names))
    more = len(distinct) - most
    return ", ".join(distinct[:most]) + (f" and {more} more" if more > 0 else "")
