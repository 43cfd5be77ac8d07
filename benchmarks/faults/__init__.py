"""Faults in the transport: ``python -m benchmarks.faults`` shows that no trace lies."""
