# shellcheck shell=bash
# Settings of nodes without GPUs.

# Ranks of a node share its cores; more threads than cores wait for each other at every product.
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-1} > PROCESSES ? ${SLURM_CPUS_PER_TASK:-1} / PROCESSES : 1))
