# shellcheck shell=bash
# Settings of nodes with eight H800s (or other Hopper GPUs), NVLink within a node and InfiniBand or RoCE between nodes.
# What is set already, by the site's modules or by hand, stays. NCCL's own choices are left alone but for these.

# An H800 has 400 GB/s of NVLink where an H100 has 900, so that traffic between nodes, one network adapter a GPU, is
# nearer to it: a rank's adapter has to be the one on its own PCIe switch. NCCL reads that from the system; ranks have
# to be on the same side of the host's memory to profit from it.
export MMTRAIN_BIND=${MMTRAIN_BIND:-numa}

# A collective whose peer is gone must end as an error that names it, not hang until the watchdog kills the process.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}

# Of the last collectives of each rank, what a hang is explained by (RUN/stacks); some kilobytes of host memory.
export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}

# Warnings alone: at INFO a thousand ranks write a gigabyte at their start.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# InfiniBand sends a lost packet again 7 times, each after 4.1 us x 2^N; NCCL's N of 20 gives up after half a minute, less
# than a switch takes to bring a link up again. 22 waits for two minutes, far less than cluster.timeout_minutes.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}

# Products on the host are small; threads of eight ranks would only push each other off the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
