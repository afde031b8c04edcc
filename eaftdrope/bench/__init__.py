"""Benchmarks: ours and the peers, in one process order, with committed results. Each module runs by `python -m`."""
