"""Report of what a job runs on: machine, driver, NCCL, topology, versions, commit and the configuration's hash."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
from dataclasses import asdict
from pathlib import Path

from mmtrain.config import PretrainConfig
from mmtrain.config.installation import commit_of, output_of, versions

_VARIABLES = ("NCCL_", "TORCH_", "CUDA_", "OMP_", "UCX_", "MMTRAIN_BIND")


def config_hash(config: PretrainConfig) -> str:
    """Return 12 hex digits that differ between configurations, whatever their order of options."""
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:12]


def report_lines(config: PretrainConfig, root: Path) -> list[str]:
    """Return the report, a line a fact.

    Args:
        config: of the run.
        root: the checkout, or the folder that the programs lie in.
    """
    slurm = {name: os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "JOB_NODELIST", "JOB_PARTITION")}
    lines = [
        f"job           {slurm['JOB_ID']} on {slurm['JOB_NODELIST']} ({slurm['JOB_PARTITION']}), "
        f"restart {os.environ.get('SLURM_RESTART_COUNT', '0')}, this is {socket.gethostname()}",
        f"commit        {commit_of(root)}",
        f"configuration {config_hash(config)} ({config.run.name})",
        f"versions      {', '.join(f'{name} {version}' for name, version in versions().items())}",
        f"system        {platform.platform()}, {os.cpu_count()} cores, {len(os.sched_getaffinity(0))} for this job",
        f"NCCL          {nccl_version()}",
    ]
    gpus = output_of("nvidia-smi", "--query-gpu=index,name,driver_version,memory.total", "--format=csv,noheader")
    lines += [f"GPU           {line}" for line in gpus.splitlines()] or ["GPU           none"]
    set_here = sorted(name for name in os.environ if name.startswith(_VARIABLES))
    lines += [f"variable      {name}={os.environ[name]}" for name in set_here]
    if gpus:
        lines += ["topology", *output_of("nvidia-smi", "topo", "-m").splitlines()]
    return lines


def nccl_version() -> str:
    """Return the version of NCCL that torch brings; "none" for a build without CUDA."""
    import torch

    if not torch.cuda.is_available():
        return "none"
    return ".".join(str(part) for part in torch.cuda.nccl.version())
