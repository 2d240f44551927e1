"""The processes of a run and the groups they form. The only global state is torch.distributed's own.

Axes, outermost first. Dense view: pp, dp, cp, tp. Expert view of the same processes: pp, edp, ep, etp (MiniMax-01
section 3, eqs. 15 and 16).
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import _redistribute
from torch.distributed.tensor import debug as _debug

from mmtrain.config import ClusterConfig
from mmtrain.config.process_env import join_launcher, read_processes
from mmtrain.errors import ConfigError
from mmtrain.parallel.layout import Layout
from mmtrain.parallel.nccl import all_channels_group

DENSE, EXPERT = ("pp", "dp", "cp", "tp"), ("pp", "edp", "ep", "etp")


@dataclass(frozen=True)
class ParallelContext:
    """Place of this process in the layout.

    Attributes:
        device: where its tensors live.
        layout: sizes of all axes.
        dense: mesh of all processes with axes pp, dp, cp, tp.
        expert: mesh of the same processes with axes pp, edp, ep, etp.
        replicas: dp and cp as one axis: the ranks that hold the same part of the dense parameters.
        world: the processes, which outlive a layout.
    """

    device: torch.device
    layout: Layout
    dense: DeviceMesh
    expert: DeviceMesh
    replicas: DeviceMesh
    world: World

    @property
    def rank(self) -> int:
        """Rank among all processes."""
        return dist.get_rank()

    @property
    def dp_rank(self) -> int:
        """Rank along the data-parallel axis."""
        return self.dense["dp"].get_local_rank()

    @property
    def cp_rank(self) -> int:
        """Rank among those that share a row."""
        return self.dense["cp"].get_local_rank()

    @property
    def dp_size(self) -> int:
        """Number of data-parallel replicas."""
        return self.layout.dp

    @property
    def is_main(self) -> bool:
        """Whether this process writes what only one process may write."""
        return self.rank == 0


def world_size() -> int:
    """Processes that the launcher started; 1 without one. Known before any group is made.

    Raises:
        ConfigError: the launcher's variables make no sense.
    """
    return read_processes().world_size


def pick_device(cluster: ClusterConfig) -> torch.device:
    """The device of this process, by `cluster.device`.

    Raises:
        ConfigError: CUDA is asked for and there is none, more processes than GPUs run on this host, or the launcher
            does not say which of a host's processes this is.
    """
    if cluster.device == "cpu" or (cluster.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    processes, count = read_processes(), torch.cuda.device_count()
    if count == 0 or not torch.cuda.is_available():
        built = "finds no GPU here" if torch.version.cuda else "is a build without CUDA"
        raise ConfigError("cluster.device", cluster.device, f"torch {torch.__version__} {built}",
                          "give cluster.device=cpu, or leave it out")  # fmt: skip
    if processes.own_gpu and count == 1:
        return torch.device("cuda", 0)
    if processes.local_rank is None:
        problem = f"rank {processes.rank} does not know which of {count} GPUs is its own"
        raise ConfigError("LOCAL_RANK", "(missing)", problem, "set it in each process to its number on its host")
    if processes.local_rank >= count:
        problem = f"local rank {processes.local_rank} has no GPU: this host shows {count}"
        fix = f"start as many processes a host as GPUs (torchrun --nproc-per-node {count}), or give cluster.device=cpu"
        raise ConfigError("cluster.device", cluster.device, problem, fix)
    return torch.device("cuda", processes.local_rank)


@dataclass(frozen=True)
class World:
    """The processes of a run, which lay themselves out in groups, one layout after another.

    Attributes:
        device: of this process.
        timeout_minutes: of collectives.
        store: in which the processes meet; None for a process that is alone. The heartbeat meets in it too, so it must
            live as long as the run.
    """

    device: torch.device
    timeout_minutes: float
    store: dist.Store | None

    def of_main(self, name: str, mine: str) -> str:
        """Return what the main process gives under a name that all processes ask for once, before any group is made."""
        if self.store is None:
            return mine
        # One store may serve several launches in these processes.
        rank = read_processes().rank
        key = f"{name}{self.store.add(f'{name}/{rank}', 1)}"
        if rank == 0:
            self.store.set(key, mine)
            return mine
        return self.store.get(key).decode()

    def lay_out(self, layout: Layout | None = None) -> ParallelContext:
        """Make the process group and the meshes of a layout, after :func:`stop` if there was one before. Collective.

        NCCL connects GPUs and gloo CPUs; everything above is the same code.

        Args:
            layout: sizes of all axes, of `plan_layout`; None is data parallelism over all processes.
        """
        if self.store is None:
            place: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        else:
            rank, world = read_processes().rank, world_size()
            # One store serves all layouts, and all points of a sweep: addresses of the last one's group are not this
            # one's.
            store = dist.PrefixStore(f"group{self.store.add(f'starts/{rank}', 1)}", self.store)
            place = {"store": store, "rank": rank, "world_size": world}
        timeout = timedelta(minutes=self.timeout_minutes)
        # No `device_id`: torch would make meshes by `split_group`, which up to 2.13 ends a process by a segmentation
        # fault from its second process group on, as at a phase of another layout (pytorch #192106, #192109).
        dist.init_process_group(backend=_backend(self.device), timeout=timeout, **place)
        world = dist.get_world_size()
        layout = layout or Layout(pp=1, dp=world, cp=1, tp=1, edp=world, ep=1, etp=1)
        dense, expert = _meshes(self.device, layout, self.timeout_minutes)
        replicas = dense["dp", "cp"]._flatten("replicas")
        for axis in ("pp", "cp"):  # messages of a few ranks connect NCCL's group only if all have met in it before
            if dense[axis].size() > 1:
                dist.all_reduce(torch.zeros(1, device=self.device), group=dense[axis].get_group())
        dist.all_reduce(torch.zeros(1))  # a rank that left now would break connections which a slow one still makes
        return ParallelContext(self.device, layout, dense, expert, replicas, self)


def join(cluster: ClusterConfig) -> World:
    """Meet the other processes that the launcher started; a process that is alone meets nobody."""
    device = pick_device(cluster)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if join_launcher().address is None:  # plain `python launch/pretrain.py`
        return World(device, cluster.timeout_minutes, None)
    timeout = timedelta(minutes=cluster.timeout_minutes)
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return World(device, cluster.timeout_minutes, store)


def start(cluster: ClusterConfig, layout: Layout | None = None) -> ParallelContext:
    """Join the other processes and lay them out: :func:`join` and :meth:`World.lay_out`."""
    return join(cluster).lay_out(layout)


def stop() -> None:
    """Leave the process group, and all that knows it: another layout may follow in the same processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if (megatron := sys.modules.get("megatron.core.parallel_state")) is not None:
        megatron.destroy_model_parallel()  # it would hold the groups, and gloo's threads are theirs
    # DTensor's caches take a mesh of destroyed groups for an equal new one, and would use its groups.
    for owner, name in ((_debug, "_clear_sharding_prop_cache"), (_redistribute, "clear_redistribute_planner_cache")):
        getattr(owner, name, lambda: None)()
    if (infos := getattr(_redistribute, "_gen_transform_infos", None)) is not None:
        infos.cache_clear()


def _meshes(device: torch.device, layout: Layout, timeout_minutes: float) -> tuple[DeviceMesh, DeviceMesh]:
    """Meshes of both views; their groups have the ranks of megatron-core's, and nearly all are its own."""
    dense = (layout.pp, layout.dp, layout.cp, layout.tp)
    expert = (layout.pp, layout.edp, layout.ep, layout.etp)
    if layout.dp == layout.edp == layout.world:  # importing megatron-core's parallel state takes three seconds
        return init_device_mesh(device.type, dense, mesh_dim_names=DENSE), init_device_mesh(
            device.type, expert, mesh_dim_names=EXPERT
        )
    with warnings.catch_warnings():  # on optimizers of its own, which are not used here
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        order="tp-cp-ep-dp-pp",
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
        # Products take all multiprocessors: NCCL's copies, which they are to hide, would begin only when they end. On
        # two H200s the states of a lightning layer waited for the gate's product, and the layer then for the states.
        high_priority_stream_groups=["cp"] if device.type == "cuda" else None,
    )
    dense_groups = [
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_data_parallel_group(),
        parallel_state.get_context_parallel_group(),
        all_channels_group(parallel_state.get_tensor_model_parallel_group(), device),
    ]
    expert_groups = [
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_expert_data_parallel_group(),
        parallel_state.get_expert_model_parallel_group(),
        parallel_state.get_expert_tensor_parallel_group(),
    ]
    ranks = torch.arange(layout.world)
    return (
        DeviceMesh.from_group(dense_groups, device.type, mesh=ranks.view(dense), mesh_dim_names=DENSE),
        DeviceMesh.from_group(expert_groups, device.type, mesh=ranks.view(expert), mesh_dim_names=EXPERT),
    )


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
