"""Console entry: ``mmtrain pretrain ARGS`` runs `launch/pretrain.py ARGS` from any folder, and so on.

``torchrun --nproc-per-node N -m mmtrain pretrain ARGS`` does it in N processes. A wheel holds the launchers inside the
package; an editable install has them in the checkout that it was made from.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import importlib.util
import json
import sys
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from mmtrain import __version__
from mmtrain.errors import ConfigError, nearest

COMMANDS = {
    "pretrain": "train a model, alone or as one of torchrun's processes",
    "submit": "train a model in Slurm jobs",
    "prepare": "turn text into a corpus to train on",
    "prepare_images": "turn records with images into a corpus to train on",
    "profile_step": "profile a few steps of a run and say in a page why it is as fast as it is",
    "report": "write what runs recorded as one HTML page",
    "compare": "train a few steps under several layouts and say whether they agree",
    "sweep": "run a grid of architectures, sizes and lengths for scaling laws",
    "generate": "continue a prompt from a checkpoint",
    "serve": "answer OpenAI's HTTP requests from a checkpoint",
    "eval": "evaluate a checkpoint on long text",
    "ask_images": "write a page of pictures with a checkpoint's answers",
    "convert": "export a checkpoint to a Hugging Face folder",
    "checkpoint": "tell what is in a checkpoint, in what two differ, and whether they are whole",
}


def main() -> None:
    """Run the command that the command line names.

    Raises:
        SystemExit: the command's own exit code; 2, after one line on stderr, where there is no such command.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return
    if name == "--version":
        print(f"mmtrain {__version__}")
        return
    try:
        script = launcher(name)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.argv[:2] = [f"mmtrain {name}"]  # as usage lines name it
    spec = importlib.util.spec_from_file_location(f"mmtrain_launch_{name}", script)
    assert spec is not None and spec.loader is not None  # a .py file always has both
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.exit(module.main())


def launcher(name: str) -> Path:
    """Return the script of a command.

    Raises:
        ConfigError: there is no such command, or this installation has no launchers.
    """
    if name not in COMMANDS:
        raise ConfigError("command", name, "not a known command", nearest(name, COMMANDS))
    package = Path(str(importlib.resources.files("mmtrain")))
    folder = package / "launch"
    if not folder.is_dir() and (checkout := _editable_checkout(package)) is not None:
        folder = checkout / "launch"
    if not (folder / f"{name}.py").is_file():
        raise ConfigError("command", name, f"the mmtrain in {package} is not installed, so its launchers are not known",
                          f"pip install it, or run launch/{name}.py of its checkout")  # fmt: skip
    return folder / f"{name}.py"


def _editable_checkout(package: Path) -> Path | None:
    """Return the checkout that `package` is an editable install of; None where it is none."""
    try:
        record = importlib.metadata.distribution("mmtrain").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    if record is None:
        return None
    checkout = Path(url2pathname(urlparse(json.loads(record)["url"]).path))
    return checkout if (checkout / "mmtrain").resolve() == package.resolve() else None


def _help() -> str:
    lines = [f"  {name:<12} {purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join(["usage: mmtrain COMMAND ARGUMENTS", "", *lines, "", "mmtrain COMMAND --help says more."])


if __name__ == "__main__":
    main()
