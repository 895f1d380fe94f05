"""Benchmarks: `intscale bench gemm` times one linear layer beside every peer's kernel."""
