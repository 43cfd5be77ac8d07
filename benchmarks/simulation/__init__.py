"""A simulated engine and what stands around it, for benchmarks and tests."""
