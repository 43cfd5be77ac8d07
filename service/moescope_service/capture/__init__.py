"""Capture in vLLM's workers: knows tensors and batch layouts, nothing of HTTP.

`install` puts it in place, `routers` finds what is hooked, and `sinks` chooses what holds the rows
of a step: ``cpu/`` or ``cuda/``. ``layout_v1`` and ``layout_v2`` say which row belongs to which
sequence. `recorder` takes notes on the worker's thread, `control` makes messages of them in the
link's thread. `rows` defines what these parts hand to each other.
"""
