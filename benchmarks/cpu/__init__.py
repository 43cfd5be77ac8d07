"""What needs no GPU: ``python -m benchmarks.cpu --out DIR`` runs all of it, by plan.toml."""
