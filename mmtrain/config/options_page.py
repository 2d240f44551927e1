"""All options as text for ``--help``, and as the page docs/options.md.

``python -m mmtrain.config.options_page configs docs/options.md`` writes the page (`make docs`).
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path

from mmtrain.config.machine import under_torchrun
from mmtrain.config.option_docs import OptionDoc, group_docs

_HEAD = """\
# Options

Every option of `launch/pretrain.py`, written `group.option=value` on the command line. This page is made from the code
by `make docs`; `python launch/pretrain.py --help` prints the same.

- A **count** of tokens may have a suffix: K M B T are powers of ten, Ki Mi Gi Ti powers of two (`8Ki`, `1.5B`).
- A **number** may be a fraction: `stage.scale=1/64`.
- **Text** stays as typed: `run.name=2026_11_28` is a name, not a number. Where Hydra's grammar needs quotes, put them
  inside the shell's: `"run.name='a,b'"`. `${group.option}` refers to another option.
- `null` turns off what may be null. Positions in lists count from 0: `stage.phases[0].seq_len=4096`.
- `-m` with values between commas runs one after another: `-m model.top_k=1,2 'run.name=k${model.top_k}'`.
- `--cfg job` prints the configuration that a command line makes, and runs nothing.
"""
_USAGE = """\
usage: torchrun --nproc-per-node N {script} GROUP=FILE ... GROUP.OPTION=VALUE ...
       {alone} ...    (one process)
       srun {alone} ...    (the tasks of a Slurm step)

Pretrain a MiniMax-01-style model. Required: data.path=DIR (made by launch/prepare.py) and run.name=NAME.

  -m            sweep over values between commas: -m model=tiny,proxy_100m 'run.name=width_${{model.name}}'
  --cfg job     print the configuration that this command line makes
  --help        this list; docs/options.md is the same as a page

Counts of tokens take K M B T and Ki Mi Gi Ti; numbers may be fractions (1/64); text stays as typed; positions in
lists count from 0: stage.phases[0].seq_len=4096.
"""


def help_text(config_dir: Path, program: str, width: int | None = None) -> str:
    """Return the text of ``--help``.

    Args:
        config_dir: the folder of YAML groups.
        program: how the program is called.
        width: columns; None takes the terminal's.
    """
    width = width or min(120, shutil.get_terminal_size((100, 24)).columns)
    docs = group_docs(config_dir)
    alone = program if program.startswith("mmtrain ") else f"python {program}"
    lines = [
        _USAGE.format(script=under_torchrun(program), alone=alone),
        "Files of the groups (the first is taken when none is named):",
    ]
    for doc in docs:
        if doc.choices:
            others = [choice for choice in doc.choices if choice != doc.chosen]
            lines += _wrapped(f"  {doc.name}=".ljust(14) + ", ".join([str(doc.chosen), *others]), width, 14)
    for doc in docs:
        lines += ["", *_wrapped(f"{doc.name}: {doc.summary}", width, 2)]
        for option in doc.options:
            lines.append(f"  {option.name}  ({_facts(option)})")
            lines += _wrapped(f"      {option.meaning}".replace("`", ""), width, 6)
    return "\n".join(lines)


def page(config_dir: Path) -> str:
    """Return docs/options.md."""
    lines = [_HEAD]
    for doc in group_docs(config_dir):
        lines += [f"## {doc.name}", "", doc.summary, ""]
        if doc.choices:
            names = ", ".join(f"`{choice}`" for choice in doc.choices)
            lines += [f"Files: {names}. Without `{doc.name}=...`: `{doc.chosen}`, whose defaults are shown.", ""]
        lines += ["| option | type | default | allowed | meaning |", "|---|---|---|---|---|"]
        lines += [_row(option) for option in doc.options]
        lines.append("")
    return "\n".join(lines)


def _facts(option: OptionDoc) -> str:
    default = "required" if option.default is None else f"default {option.default or repr('')}"
    return "; ".join(part for part in (option.type, option.allowed, default) if part)


def _row(option: OptionDoc) -> str:
    default = "required" if option.default is None else f"`{option.default}`"
    cells = (f"`{option.name}`", option.type, default, option.allowed, option.meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _wrapped(text: str, width: int, indent: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False)


def main() -> None:
    """Write the page: ``options_page CONFIGS FILE``."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m mmtrain.config.options_page CONFIGS FILE")
    Path(sys.argv[2]).parent.mkdir(parents=True, exist_ok=True)
    Path(sys.argv[2]).write_text(page(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
