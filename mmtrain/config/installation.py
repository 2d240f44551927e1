"""What is installed here: the commit of the checkout, and versions of packages."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

COMMAND_SECONDS = 10.0
_PACKAGES = ("torch", "triton", "megatron-core", "hydra-core", "numpy", "safetensors", "tokenizers")


def commit_of(checkout: Path) -> str:
    """Return the first digits of a checkout's commit, with `+` where git says that files differ; "unknown" for none."""
    commit = head_of(checkout)
    if commit is None:
        return "unknown"
    changed = output_of("git", "-C", str(checkout), "status", "--porcelain", "--untracked-files=no")
    return f"{commit[:12]}{'+' if changed else ''}"


def head_of(folder: Path) -> str | None:
    """Return the commit that a folder, or the one around it, has checked out; None where neither is a checkout.

    Read from git's own files: a machine that trains may have no git.
    """
    try:
        git = next(path for path in (folder / ".git", folder.parent / ".git") if path.exists())
        if git.is_file():  # of a work tree: a line that names its folder
            git = Path(git.read_text().removeprefix("gitdir:").strip())
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name, common = head.removeprefix("ref: "), git
        if (git / "commondir").exists():
            common = git / (git / "commondir").read_text().strip()
        if (common / name).exists():
            return (common / name).read_text().strip()
        packed = (line.split() for line in (common / "packed-refs").read_text().splitlines())
        return next((words[0] for words in packed if words[1:] == [name]), None)
    except (OSError, ValueError, StopIteration):
        return None


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
