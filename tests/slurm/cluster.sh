#!/usr/bin/env bash
# A Slurm of two nodes on this one machine, for `make test-slurm`; needs root, Debian or Ubuntu, and no systemd.
#
#   cluster.sh ready        install slurm-wlm and munge where they are missing; fails where nodes cannot be made
#   cluster.sh up           the same, and start the daemons
#   cluster.sh down         stop them, and remove all that `up` made but the packages
#   cluster.sh node N       start the slurmd of node N (1 or 2) again
#   cluster.sh lose N       kill the slurmd of node N and every process on the node, as a loss of power does
#
# Each node has its own network namespace, address and host name, so that programs see two hosts which share a file
# system. All of it lies in one folder and has daemons, socket and key of its own: /etc/slurm and /etc/munge are left alone.
set -euo pipefail

STATE=${MMTRAIN_SLURM_STATE:-/run/mmtrain-slurm}
BRIDGE=mmtrain0
NETWORK=10.213.77  # .254 is the controller, .1 and .2 are the nodes
SYSTEM_CONF=${MMTRAIN_SYSTEM_SLURM_CONF:-/etc/slurm/slurm.conf}
export SLURM_CONF=$STATE/slurm.conf

refuse() {
  echo "error: $1" >&2
  exit 2
}

check() {
  [ "$(id -u)" = 0 ] || refuse "tests/slurm/cluster.sh needs root: it starts daemons and makes network namespaces; run it with sudo or in a container"
  [ ! -e "$SYSTEM_CONF" ] || refuse "$SYSTEM_CONF is there: this machine belongs to a Slurm that is not ours; try it in a container"
}

install_packages() {
  command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null &&
    command -v ip >/dev/null && return
  command -v apt-get >/dev/null || refuse "slurmctld, slurmd, munged and ip are missing, and there is no apt-get to install them with"
  apt-get update -qq
  # Their start scripts would start daemons that are not ours.
  printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d.mmtrain && chmod +x /usr/sbin/policy-rc.d.mmtrain
  [ -e /usr/sbin/policy-rc.d ] || ln -s policy-rc.d.mmtrain /usr/sbin/policy-rc.d
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq -o DPkg::Lock::Timeout=120 slurm-wlm munge iproute2 >/dev/null
  [ "$(readlink /usr/sbin/policy-rc.d || true)" != policy-rc.d.mmtrain ] || rm /usr/sbin/policy-rc.d
  rm -f /usr/sbin/policy-rc.d.mmtrain
}

connect() {
  ip link add "$BRIDGE" type bridge
  ip addr add "$NETWORK.254/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  local node
  for node in 1 2; do
    ip netns add "mmtrain-n$node"
    ip link add "mmtrain-v$node" type veth peer name eth0 netns "mmtrain-n$node"
    ip link set "mmtrain-v$node" master "$BRIDGE" up
    ip -n "mmtrain-n$node" addr add "$NETWORK.$node/24" dev eth0
    ip -n "mmtrain-n$node" link set eth0 up
    ip -n "mmtrain-n$node" link set lo up
  done
  printf '127.0.0.1 localhost\n%s n1\n%s n2\n%s %s\n' "$NETWORK.1" "$NETWORK.2" "$NETWORK.254" "$(hostname -s)" \
    >"$STATE/hosts"
}

write_conf() {
  cat >"$SLURM_CONF" <<CONF
ClusterName=mmtrain
SlurmctldHost=$(hostname -s)($NETWORK.254)
AuthType=auth/munge
AuthInfo=socket=$STATE/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PriorityType=priority/basic
SchedulerParameters=sched_interval=2,batch_sched_delay=0,default_queue_depth=20,sched_min_interval=0
SlurmdTimeout=12
KillWait=20
OverTimeLimit=0
MinJobAge=300
ReturnToService=2
StateSaveLocation=$STATE/ctld
SlurmdSpoolDir=$STATE/%n
SlurmctldPidFile=$STATE/slurmctld.pid
SlurmdPidFile=$STATE/slurmd-%n.pid
SlurmctldLogFile=$STATE/slurmctld.log
SlurmdLogFile=$STATE/slurmd-%n.log
NodeName=n1 NodeHostname=n1 NodeAddr=$NETWORK.1 CPUs=1 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname=n2 NodeAddr=$NETWORK.2 CPUs=1 RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime=60 State=UP
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF State=UP
CONF
  # No plugin above uses cgroups, but slurmd looks for them; in a container there may be none.
  echo "CgroupPlugin=cgroup/v1" >"$STATE/cgroup.conf"
}

start_munged() {
  local folder=$STATE/munge
  mkdir -p "$folder" && chmod 700 "$folder"
  (umask 077 && head -c 1024 /dev/urandom >"$folder/key")
  munged --force --key-file="$folder/key" --socket="$STATE/munge.socket" --pid-file="$folder/pid" \
    --log-file="$folder/log" --seed-file="$folder/seed"
}

start_node() {
  # In the node's network, with its name and hosts; slurmd's children, the jobs' processes, stay there.
  mkdir -p "$STATE/n$1"
  nsenter --net="/run/netns/mmtrain-n$1" unshare --uts --mount \
    sh -c "hostname n$1 && mount --bind '$STATE/hosts' /etc/hosts && exec slurmd -N n$1 -f '$SLURM_CONF'"
}

node_pids() {
  ip netns pids "mmtrain-n$1" 2>/dev/null || true
}

lose() {
  local pids
  for _ in 1 2 3; do  # a second time for what was forked meanwhile
    pids=$(node_pids "$1")
    # shellcheck disable=SC2086  # one word a process
    [ -z "$pids" ] || kill -KILL $pids 2>/dev/null || true
  done
}

wait_for_idle() {
  for _ in $(seq 60); do
    [ "$(sinfo -h -N -p debug -o '%t' 2>/dev/null | grep -c '^idle$')" = 2 ] && return
    sleep 0.5
  done
  sinfo -N -l >&2 || true
  tail -n 20 "$STATE"/*.log >&2
  refuse "the nodes did not come up; the daemons' logs are above"
}

ready() {
  check
  install_packages
  unshare --net --uts --mount ip link add mmtrain-trial type bridge ||
    refuse "this container may not make network namespaces and bridges; start it with CAP_SYS_ADMIN and CAP_NET_ADMIN"
}

up() {
  ready
  down
  mkdir -p "$STATE/ctld"
  connect
  write_conf
  start_munged
  slurmctld -f "$SLURM_CONF"
  start_node 1
  start_node 2
  wait_for_idle
  echo "SLURM_CONF=$SLURM_CONF"
}

down() {
  [ ! -s "$STATE/slurmctld.pid" ] || kill "$(cat "$STATE/slurmctld.pid")" 2>/dev/null || true
  local node
  for node in 1 2; do
    lose "$node"
    ip netns del "mmtrain-n$node" 2>/dev/null || true
  done
  ip link del "$BRIDGE" 2>/dev/null || true
  [ ! -s "$STATE/munge/pid" ] || kill "$(cat "$STATE/munge/pid")" 2>/dev/null || true
  rm -rf "$STATE"
}

case "${1:-}" in
  ready) ready ;;
  up) up ;;
  down) check; down ;;
  node) check; start_node "$2" ;;
  lose) check; lose "$2" ;;
  *) sed -n '2,8p' "$0"; exit 2 ;;
esac
