"""What preference training asks of a run's options and corpora, checked before anything is started."""

from __future__ import annotations

from mmdata.corpus.split import Split
from mmdata.images.corpus import ImageCorpus
from mmtrain.config import PretrainConfig
from mmtrain.config.checks import require
from mmtrain.errors import ConfigError
from mmtrain.train.inputs import RunInputs


def check_preference(config: PretrainConfig) -> None:
    """Refuse options that preference training cannot go with; nothing where a run trains on next tokens.

    Raises:
        ConfigError: the first of them.
    """
    preference = config.stage.preference
    if preference is None:
        return
    phase, vision = config.stage.phases[0], config.model.vision
    require(config.run.init_eyes is None, "run.init_eyes", config.run.init_eyes, "preference training measures a model "
            "by the weights that it starts from, which are one checkpoint", "give run.init_from alone")  # fmt: skip
    contrastive = None if vision is None else vision.contrastive
    require(contrastive is None, "model.vision.contrastive", contrastive,
            "preference pairs have no captions to tell apart", "give model.vision.contrastive=null")  # fmt: skip
    if preference.patience is not None:
        for option, value in (("log.valid_interval", config.log.valid_interval),
                              ("data.valid_rows", config.data.valid_rows)):  # fmt: skip
            require(value > 0, option, value, "stage.preference.patience counts validations, and there are none",
                    "give a number above 0, or stage.preference.patience=null")  # fmt: skip
    for name, given in (("buckets", phase.buckets), ("long_share", phase.long_share)):
        require(not given, f"stage.phases[0].{name}", given, "preference pairs are mixed row by row, by the weights of "
                "their sources", "leave it out")  # fmt: skip
    require(not phase.transition, "stage.phases[0].transition", phase.transition,
            "preference pairs are mixed row by row, by the weights of their sources", "give 0")  # fmt: skip


def preference_lines(config: PretrainConfig, inputs: RunInputs) -> list[str]:
    """Return lines for the header on a run's pairs; of corpora without any there are none.

    Raises:
        ConfigError: a corpus has no pairs, or nothing is held out for an early stop.
    """
    lines = []
    for option, path, split in inputs.training_splits():
        pairs, others = count_pairs(split)
        if not pairs:
            raise ConfigError(option, path, "has no preference pairs", "prepare records of prompt, chosen and rejected "
                              "with launch/prepare_images.py")  # fmt: skip
        lines.append(f"pairs   {path}: {pairs:,} preference pairs")
        if others:
            lines.append(f"warning: {option}={path}: {others:,} documents are no preference pairs: nothing of them is "
                         "learned")  # fmt: skip
    preference, phase = config.stage.preference, inputs.phases[0]
    if preference is not None and preference.patience is not None:
        held_out = inputs.held_out
        if inputs.valid_stream(phase.seq_len) is None or held_out is None or not count_pairs(held_out)[0]:
            raise ConfigError("stage.preference.patience", preference.patience, "the first corpus holds out no pairs",
                              "prepare it with --valid-fraction, or give null")  # fmt: skip
        if not config.checkpoint.keep_best:
            lines.append("warning: checkpoint.keep_best=0: the checkpoint of the lowest held-out loss may be deleted; "
                         "give 1")  # fmt: skip
    if config.model.num_experts and config.model.capacity_factor is not None:
        lines.append(f"warning: model.capacity_factor={config.model.capacity_factor:g}: steps drop tokens of experts "
                     "where the reference dropped none; null drops none")  # fmt: skip
    return lines


def unused_pairs_lines(inputs: RunInputs) -> list[str]:
    """Return a warning for each corpus of preference pairs of a run that trains on next tokens."""
    counts = ((f"{option}={path}", count_pairs(split)[0]) for option, path, split in inputs.training_splits())
    told = "are preference pairs, and this stage learns both answers as text, the rejected one too"
    return [
        f"warning: {corpus}: {pairs:,} documents {told}; give stage.preference={{beta: 0.1}}"
        for corpus, pairs in counts
        if pairs
    ]


def count_pairs(split: Split) -> tuple[int, int]:
    """Return the preference pairs among a split's documents, and its other documents."""
    if not isinstance(split.corpus, ImageCorpus):
        return 0, split.corpus.num_documents
    halves = split.corpus.halves
    chosen = halves if split.documents is None else halves[split.documents]
    pairs = int((chosen > 0).sum())
    return pairs, len(chosen) - pairs
