"""The capture on the CPU: the rows of a step in host memory, and their counts."""
