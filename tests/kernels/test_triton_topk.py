"""What a kernel that routes inside selects is written, in the order of other routers."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from moescope_service.capture import triton_topk
from moescope_service.capture.cuda.buffers import RoutingBuffers

TOKENS, EXPERTS, TOP_K = 12, 8, 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def by_id(logits, k):
    """Select as ``triton_kernels`` does: in the order of ids, 16 bits each."""
    ids = logits.topk(k).indices.sort(-1).values
    weights = logits.gather(-1, ids).float().softmax(-1)
    return weights.to(logits.dtype), ids.to(torch.int16)


def as_tuple(logits, k, *, apply_softmax):
    """The version that vLLM brings along."""
    assert apply_softmax
    return *by_id(logits, k), None


def as_matrix(logits, k, *, apply_softmax):
    """Later versions."""
    vals, indx = by_id(logits, k)
    return types.SimpleNamespace(vals=vals, indx=indx)


@pytest.fixture(params=[as_tuple, as_matrix])
def module(request, monkeypatch):
    """Stands in for ``triton_kernels``, which no CPU build of vLLM has."""
    package, module = types.ModuleType("triton_kernels"), types.ModuleType("triton_kernels.topk")
    module.topk = request.param
    monkeypatch.setitem(sys.modules, "triton_kernels", package)
    monkeypatch.setitem(sys.modules, "triton_kernels.topk", module)
    return module


class Experts(torch.nn.Module):
    """The part of vLLM's ``RoutedExperts`` that runs the layer."""

    def forward_monolithic(self, x, router_logits, input_ids=None):
        from triton_kernels.topk import topk

        if x is None:
            raise RuntimeError("the kernel failed")
        return topk(router_logits, TOP_K, apply_softmax=True)


def make_logits(seed=0, num_tokens=5):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, EXPERTS, generator=generator)
    return logits.to(DEVICE, torch.bfloat16)


def values(selected):
    return selected[:2] if isinstance(selected, tuple) else (selected.vals, selected.indx)


def assert_written(buffers, column, logits):
    weights, ids = by_id(logits, TOP_K)
    want, order = weights.float().sort(dim=-1, descending=True, stable=True)
    rows = slice(len(logits))
    torch.testing.assert_close(buffers.topk_weights[column, rows], want, rtol=0, atol=0)
    torch.testing.assert_close(
        buffers.topk_ids[column, rows], ids.gather(-1, order).int(), rtol=0, atol=0
    )


def hook(buffers):
    layers = [Experts() for _ in range(2)]
    for column, layer in enumerate(layers):
        buffers.hook(column, triton_topk.TritonTopk(layer, TOP_K))
    return layers


@pytest.mark.usefixtures("module")
def test_each_layer_writes_its_own_column_and_computes_what_it_did():
    buffers = RoutingBuffers(2, TOKENS, TOP_K, None, DEVICE)
    layers, x = hook(buffers), torch.zeros(5, 4)
    logits = [make_logits(seed) for seed in range(2)]
    for layer, given in zip(layers, logits, strict=True):
        got = values(layer.forward_monolithic(x=x, router_logits=given))
        torch.testing.assert_close(got, by_id(given, TOP_K), rtol=0, atol=0)
    for column, given in enumerate(logits):
        assert_written(buffers, column, given)
    assert (buffers.topk_ids[:, 5:] == -1).all()


def test_a_draft_models_layer_writes_nothing(module):
    buffers = RoutingBuffers(2, TOKENS, TOP_K, None, DEVICE)
    layers, x = hook(buffers), torch.zeros(5, 4)
    Experts().forward_monolithic(x, make_logits())  # not hooked, through the same function
    module.topk(make_logits(), TOP_K, apply_softmax=True)
    with pytest.raises(RuntimeError, match="the kernel failed"):
        layers[0].forward_monolithic(None, make_logits())
    Experts().forward_monolithic(x, make_logits())  # nor is the failed one still running
    assert (buffers.topk_ids == -1).all()


@pytest.mark.usefixtures("module")
def test_padded_logits_are_read_by_their_strides(caplog):
    buffers = RoutingBuffers(2, TOKENS, TOP_K, None, DEVICE)
    layers = hook(buffers)
    padded = torch.cat([make_logits(), make_logits(1)], -1)[:, :EXPERTS]
    layers[1].forward_monolithic(torch.zeros(5, 4), padded)
    assert_written(buffers, 1, padded.contiguous())
    assert not caplog.records
