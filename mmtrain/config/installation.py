"""What is installed here: the commit of the checkout, and versions of packages."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

COMMAND_SECONDS = 20.0
_PACKAGES = ("torch", "triton", "megatron-core", "hydra-core", "numpy", "safetensors", "tokenizers")


def commit_of(folder: Path) -> str:
    """Return the commit of a checkout, with `+` where files differ from it; "unknown" without git."""
    commit = output_of("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    changed = commit and output_of("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}{'+' if changed else ''}" if commit else "unknown"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def output_of(*command: str) -> str:
    """Return what a command prints; nothing where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
