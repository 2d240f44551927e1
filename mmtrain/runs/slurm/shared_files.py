"""Folders of a job on several nodes: whether the nodes share them, as far as this one can tell, and their room."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from mmtrain.config import PretrainConfig
from mmtrain.errors import ConfigError
from mmtrain.model.flops import count_parameters

BYTES_PER_PARAMETER = 12  # of a checkpoint: weights and two moments, fp32 each
CHECKPOINTS = 2  # that there has to be room for: the newest, and the one being written
GIB = 2**30
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs", "ramfs", "devtmpfs", "squashfs"}
_SCRATCH = ("/tmp", "/var/tmp", "/dev/shm", "/run")


def file_system(path: Path, mounts: str | None = None) -> tuple[str, str]:
    """Return the mount point that a path lies below, and the type of its file system.

    Args:
        path: need not exist.
        mounts: text of /proc/mounts; None reads it.
    """
    text = Path("/proc/mounts").read_text() if mounts is None else mounts
    real, found = path.absolute().resolve(), ("/", "unknown")
    for line in text.splitlines():
        _, point, kind, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if real.is_relative_to(point) and len(point) >= len(found[0]):  # of two at one place the later one is seen
            found = point, kind
    return found


def check_shared(option: str, path: str | Path, roots: Sequence[str], mounts: str | None = None) -> str:
    """Return a line on where a path lies, or refuse one that other nodes cannot see.

    Args:
        option: that the path came from.
        path: that all nodes of a job read or write.
        roots: `cluster.shared_roots`.
        mounts: text of /proc/mounts; None reads it.

    Raises:
        ConfigError: it lies below none of `roots`; without any, on a file system of this host alone.
    """
    real = Path(path).absolute().resolve()
    point, kind = file_system(real, mounts)
    if roots:
        if not any(real.is_relative_to(Path(root).resolve()) for root in roots):
            raise ConfigError(option, path, f"lies below none of cluster.shared_roots ({', '.join(roots)})",
                              "put it below one, or add its folder there if all nodes share it")  # fmt: skip
        return f"{option}: {real}, below cluster.shared_roots"
    scratch = next((folder for folder in _SCRATCH if real.is_relative_to(folder)), None)
    if scratch is not None or kind in _LOCAL:
        where = f"{scratch} is each node's own" if scratch else f"{point} is {kind}, a disk of this host"
        raise ConfigError(option, path, f"other nodes do not see it: {where}",
                          "give a folder that all nodes share, or, where they do share this one, "
                          f"cluster.shared_roots=[{real.parent}]")  # fmt: skip
    return f"{option}: {real}, on {point} ({kind})"


def check_room(config: PretrainConfig, free: int | None = None) -> str:
    """Return a line on the room for checkpoints, or refuse a disk that cannot hold two.

    Args:
        config: of the run.
        free: bytes; None asks the file system.

    Raises:
        ConfigError: there is less.
    """
    folder = Path(config.run.dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free if free is None else free
    one = count_parameters(config.model).total * BYTES_PER_PARAMETER
    if free < CHECKPOINTS * one:
        raise ConfigError("run.dir", config.run.dir, f"has room for {free / GIB:.2f} GiB; a checkpoint takes "
                          f"{one / GIB:.2f}, and there are {CHECKPOINTS} while one is written",
                          "make room there, or give another run.dir")  # fmt: skip
    return f"a checkpoint takes {one / GIB:.2f} GiB, and {free / GIB:.0f} GiB are free in {folder}"
