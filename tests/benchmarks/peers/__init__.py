"""The peers that `tests/benchmarks/peers.py` compares, one process each."""
