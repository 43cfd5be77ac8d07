"""What needs a GPU: ``python -m benchmarks.gpu.run --out DIR`` runs all of it, by plan.toml."""
