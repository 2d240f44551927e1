"""Memory that the processes of a host map from one another, and meeting there without NCCL."""
