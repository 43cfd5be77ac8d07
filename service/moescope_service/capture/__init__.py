"""Capture in vLLM's workers: knows tensors and batch layouts, nothing of HTTP.

`install` puts it in place and `routers` finds what is hooked. ``sink_cpu`` and ``sink_cuda`` hold
the rows of a step (on the GPU with `buffers`, `kernels`, `launch` and `ring`); ``layout_v1`` and
``layout_v2`` say which row is whose. `recorder` takes notes on the worker's thread, `control` makes
messages of them in the link's. `rows` is what they hand each other.
"""
