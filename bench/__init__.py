"""Benchmarks: `python -m tritium.bench kernels` and `… parallel`; `… table` writes the README's table of kernels."""
