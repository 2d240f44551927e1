"""The architecture, for one device: what the MiniMax-01 paper writes, and no process group."""
