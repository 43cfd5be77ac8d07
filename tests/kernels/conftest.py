"""The capture's Triton kernels: on the GPU where there is one, else under Triton's interpreter.

Run them in a process of their own: the interpreter is chosen when the kernels are imported.
"""

from __future__ import annotations

import os
import warnings

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

with warnings.catch_warnings():  # torch's and vLLM's own, at their import
    warnings.simplefilter("ignore")
    import vllm.model_executor.layers.fused_moe.router.fused_topk_router  # noqa: F401
