"""Capture in vLLM's workers: knows tensors and batch layouts, nothing of HTTP.

`install` puts it in place; `routers` finds and hooks the model's routers; ``sink_*`` hold the rows
of a step; ``layout_*`` say which row is whose; `recorder` ships them.
"""
