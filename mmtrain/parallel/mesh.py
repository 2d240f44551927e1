"""The processes of a run and the groups they form. The only global state is torch.distributed's own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mmtrain.config import ClusterConfig
from mmtrain.errors import ConfigError


@dataclass(frozen=True)
class ParallelContext:
    """This process's place.

    Attributes:
        device: where its tensors live.
        mesh: named mesh of all processes; axis ``dp`` is data parallelism.
    """

    device: torch.device
    mesh: DeviceMesh

    @property
    def rank(self) -> int:
        """Rank among all processes."""
        return dist.get_rank()

    @property
    def dp_rank(self) -> int:
        """Rank along the data-parallel axis."""
        return self.mesh["dp"].get_local_rank()

    @property
    def dp_size(self) -> int:
        """Number of data-parallel replicas."""
        return self.mesh["dp"].size()

    @property
    def is_main(self) -> bool:
        """Whether this process writes what only one process may write."""
        return self.rank == 0


def world_size() -> int:
    """Processes that the launcher started; 1 without one. Known before any group is made."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def pick_device(cluster: ClusterConfig) -> torch.device:
    """The device of this process, by `cluster.device`.

    Raises:
        ConfigError: CUDA is asked for and there is none, or more processes than GPUs run on this host.
    """
    if cluster.device == "cpu" or (cluster.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError("cluster.device", cluster.device, f"local rank {local_rank} finds {count} CUDA devices here",
                          f"start at most {count} processes a host, or give cluster.device=cpu")  # fmt: skip
    return torch.device("cuda", local_rank)


def start(cluster: ClusterConfig) -> ParallelContext:
    """Join the process group (one process forms a group of its own) and make the mesh.

    NCCL connects GPUs and gloo CPUs; everything above is the same code.
    """
    device = pick_device(cluster)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:  # plain `python launch/pretrain.py`
        dist.init_process_group(
            backend=_backend(device), store=dist.HashStore(), rank=0, world_size=1, device_id=_device_id(device)
        )
    else:
        timeout = timedelta(minutes=cluster.timeout_minutes)
        dist.init_process_group(backend=_backend(device), timeout=timeout, device_id=_device_id(device))
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp",))
    return ParallelContext(device, mesh)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _device_id(device: torch.device) -> torch.device | None:
    return device if device.type == "cuda" else None
