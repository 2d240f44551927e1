"""Backend ``chunked``: lightning attention in torch alone, the fast path on CPUs."""
