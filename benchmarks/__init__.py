"""Everything that measures and is no test; see benchmarks/README.md."""
