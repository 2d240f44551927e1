#!/bin/bash
# One rank: on the cores beside its GPU, with a log of its own; its exit code is kept, as torchrun ends with 1 for any.
#
#   rank.sh PROGRAM OPTIONS...
set -uo pipefail

rank=$(printf %05d "${RANK:?torchrun sets it}")
mkdir -p "$MMTRAIN_ATTEMPT/exit"
if [ "${MMTRAIN_BIND:-none}" = numa ] && command -v nvidia-smi >/dev/null; then
  bus=$(nvidia-smi --id="$LOCAL_RANK" --query-gpu=pci.bus_id --format=csv,noheader | tr '[:upper:]' '[:lower:]')
  cores=$(cat "/sys/bus/pci/devices/${bus#0000}/local_cpulist" 2>/dev/null || true)
  [ -z "$cores" ] || taskset --cpu-list --pid "$cores" $$ >/dev/null || true   # not all of them may be the job's
fi

trap : TERM INT USR1   # the program has the signal too; its exit code is waited for
if [ "$RANK" = 0 ]; then
  python -u "$@" > >(trap '' TERM INT USR1; exec tee -a "$MMTRAIN_ATTEMPT/rank-$rank.log") 2>&1
else
  python -u "$@" >>"$MMTRAIN_ATTEMPT/rank-$rank.log" 2>&1
fi
code=$?
echo "$code" >"$MMTRAIN_ATTEMPT/exit/$rank"
exit "$code"
