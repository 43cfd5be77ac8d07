"""A long load with faults: ``python -m benchmarks.soak`` shows that nothing lies or grows."""
