"""The capture on NVIDIA GPUs.

Routers write static buffers (`buffers`). Behind each step one Triton kernel (`kernels`, started by
`launch`) packs them into pinned host memory (`sink`, `ring`) or adds them to counts (`counts`).
"""
