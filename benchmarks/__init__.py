"""Measured comparisons; their dated results lie in ``benchmarks/results``."""
