"""Benchmarks: `python -m tritium.bench kernels`; and `… table`, which writes the README's table of them."""
