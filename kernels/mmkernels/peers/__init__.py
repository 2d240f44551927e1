"""Rows read out of the memory of other GPUs of the same host. See README.md here."""

from mmkernels.peers.api import meet, take_from_peers
from mmkernels.peers.memory import PeerMemory

__all__ = ["PeerMemory", "meet", "take_from_peers"]
