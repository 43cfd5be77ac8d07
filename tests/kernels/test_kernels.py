"""Rows and layers that come out of the kernels are those that went in."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from moescope_service.capture.cuda import counts as cuda_counts
from moescope_service.capture.cuda import kernels
from moescope_service.capture.cuda.buffers import copy_routing
from moescope_service.capture.cuda.counts import CudaCounts
from moescope_service.histogram import count_selections

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_routing(num_tokens, top_k, num_experts, dtype=torch.int32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    weights, ids = logits.softmax(-1).topk(top_k)
    return weights.to(DEVICE), ids.to(DEVICE, dtype)


@pytest.mark.parametrize("num_tokens", [1, 3, 700])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_a_layers_routing_is_copied(num_tokens, dtype, weights_dtype):
    weights, ids = random_routing(num_tokens, 6, 40, dtype)
    weights = weights.to(weights_dtype)
    to_ids = torch.full((1024, 6), -7, dtype=torch.int32, device=DEVICE)
    to_weights = torch.full((1024, 6), -7.0, device=DEVICE)
    copy_routing(ids, weights, to_ids, to_weights)
    torch.testing.assert_close(to_ids[:num_tokens], ids.int(), rtol=0, atol=0)
    torch.testing.assert_close(to_weights[:num_tokens], weights.float(), rtol=0, atol=0)
    assert (to_ids[num_tokens:] == -7).all()
    assert (to_weights[num_tokens:] == -7.0).all()


def test_strides_and_further_columns_are_minded():
    """Some routers return transposed tensors, or columns of fused shared experts."""
    weights, ids = random_routing(50, 8, 40)
    to_ids = torch.zeros((64, 4), dtype=torch.int64, device=DEVICE)
    to_weights = torch.zeros((64, 4), device=DEVICE)
    copy_routing(ids.t().contiguous().t(), weights[:, ::2], to_ids, to_weights)
    torch.testing.assert_close(to_ids[:50], ids[:, :4].long(), rtol=0, atol=0)
    torch.testing.assert_close(to_weights[:50], weights[:, ::2][:, :4], rtol=0, atol=0)


@pytest.mark.parametrize("num_tokens", [1, 700])
def test_a_row_is_sorted_by_weight(num_tokens):
    """Equal weights, as bfloat16 has many, keep their order."""
    weights, ids = random_routing(num_tokens, 8, 40)
    ids, order = ids.sort(-1)  # as triton_kernels gives them
    weights = (weights.gather(-1, order).float() * 64).round().to(torch.bfloat16)
    to_ids = torch.full((1024, 8), -7, dtype=torch.int32, device=DEVICE)
    to_weights = torch.full((1024, 8), -7.0, device=DEVICE)
    copy_routing(ids.to(torch.int16), weights, to_ids, to_weights, by_weight=True)
    want, order = weights.float().sort(dim=-1, descending=True, stable=True)
    torch.testing.assert_close(to_weights[:num_tokens], want, rtol=0, atol=0)
    torch.testing.assert_close(to_ids[:num_tokens], ids.gather(-1, order), rtol=0, atol=0)
    assert (to_ids[num_tokens:] == -7).all()


def test_more_tokens_than_fit_are_left_out():
    weights, ids = random_routing(9, 2, 8)
    to_ids = torch.full((4, 2), -7, dtype=torch.int32, device=DEVICE)
    to_weights = torch.zeros((4, 2), device=DEVICE)
    copy_routing(ids, weights, to_ids, to_weights)
    torch.testing.assert_close(to_ids, ids[:4], rtol=0, atol=0)


class Buffers:
    """Static buffers of a model, filled with a step's routing, and where it is packed to."""

    def __init__(self, num_layers, top_k, num_experts, id_dtype, weights_dtype, max_tokens=128):
        self.num_experts = num_experts
        routing = [
            random_routing(max_tokens, top_k, num_experts, seed=seed) for seed in range(num_layers)
        ]
        self.weights, self.ids = (
            torch.stack([layer[i] for layer in routing]).contiguous() for i in (0, 1)
        )
        self.positions = torch.randint(0, 1 << 20, (max_tokens,)).to(DEVICE)
        self.to_ids = torch.full((200, num_layers, top_k), 99, dtype=id_dtype, device=DEVICE)
        self.to_weights = torch.zeros(200, num_layers, top_k, dtype=weights_dtype, device=DEVICE)
        self.to_positions = torch.full((200,), -7, dtype=torch.int32, device=DEVICE)

    def pack(self, first_slot, num_rows):
        num_layers, max_tokens, top_k = self.ids.shape
        constants = kernels.pack_blocks(num_layers, top_k)
        kernels.pack_rows[(-(-num_rows // constants["BLOCK_ROWS"]),)](
            self.ids, self.weights, self.positions, self.to_ids, self.to_weights,
            self.to_positions, first_slot, num_rows, max_tokens * top_k, self.num_experts,
            **constants,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("num_layers", "top_k", "num_experts", "id_dtype", "weights_dtype"),
    [
        (24, 4, 60, torch.uint8, torch.float16),
        (5, 3, 256, torch.uint8, torch.float32),
        (58, 8, 512, torch.uint16, torch.float16),
    ],
)
@pytest.mark.parametrize("num_rows", [1, 16, 77])
def test_rows_are_packed(num_layers, top_k, num_experts, id_dtype, weights_dtype, num_rows):
    buffers = Buffers(num_layers, top_k, num_experts, id_dtype, weights_dtype)
    ids, weights = buffers.ids.clone(), buffers.weights.clone()
    buffers.pack(50, num_rows)
    there = slice(50, 50 + num_rows)
    want = ids[:, :num_rows].transpose(0, 1).cpu().numpy()
    np.testing.assert_array_equal(buffers.to_ids[there].cpu().numpy(), want)
    torch.testing.assert_close(
        buffers.to_weights[there],
        weights[:, :num_rows].transpose(0, 1).to(weights_dtype), rtol=0, atol=0,
    )  # fmt: skip
    assert buffers.to_positions[there].tolist() == buffers.positions[:num_rows].tolist()
    # Nothing beside them, and the next step finds no old rows.
    assert (buffers.to_positions[:50] == -7).all()
    assert (buffers.to_positions[50 + num_rows :] == -7).all()
    assert (buffers.ids[:, :num_rows] == -1).all()
    torch.testing.assert_close(buffers.ids[:, num_rows:], ids[:, num_rows:], rtol=0, atol=0)
    torch.testing.assert_close(buffers.weights, weights, rtol=0, atol=0)


def test_a_row_of_a_layer_that_did_not_write_has_no_position():
    buffers = Buffers(5, 3, 60, torch.uint8, torch.float16)
    positions = buffers.positions.clone()
    buffers.pack(0, 40)
    for layer in (0, 1, 2, 4):  # the next step, in which layer 3 writes three rows only
        buffers.ids[layer, :40] = layer
    buffers.ids[3, :3] = 59
    buffers.pack(100, 40)
    assert buffers.to_positions[100:103].tolist() == positions[:3].tolist()
    assert (buffers.to_positions[103:140] == -1).all()


def test_an_id_that_is_no_expert_has_no_position():
    buffers = Buffers(2, 2, 8, torch.uint8, torch.float16)
    buffers.ids[1, 2, 1] = 8
    buffers.pack(0, 4)
    assert buffers.to_positions[:4].tolist() == [
        *buffers.positions[:2].tolist(), -1, int(buffers.positions[3]),
    ]  # fmt: skip


@pytest.mark.parametrize("num_experts", [60, 512])
def test_rows_are_counted(num_experts):
    num_layers, top_k, start, num_rows = 5, 4, 30, 61
    buffers = Buffers(num_layers, top_k, num_experts, torch.uint16, torch.float16)
    ids = buffers.ids.clone()
    buffers.ids[2, start + 7, 1] = -1  # a layer did not write this row
    counts = torch.zeros(2 * num_layers * num_experts + 1, dtype=torch.int64, device=DEVICE)
    constants = kernels.pack_blocks(num_layers, top_k)
    for phase in (1, 1, 0):  # the second time nobody has written
        kernels.count_rows[(-(-num_rows // constants["BLOCK_ROWS"]),)](
            buffers.ids, counts, start, num_rows, 128 * top_k, num_experts, phase, **constants
        )
    kept = [row for row in range(start, start + num_rows) if row != start + 7]
    want = count_selections(
        ids[:, kept].transpose(0, 1).cpu().numpy(), np.ones(len(kept), np.bool_), num_experts
    )
    np.testing.assert_array_equal(counts[:-1].cpu().numpy().reshape(want.shape), want)
    assert int(counts[-1]) == 1 + 2 * num_rows
    assert (buffers.ids[:, start : start + num_rows] == -1).all()
    assert (buffers.ids[:, :start] == ids[:, :start]).all()


def interpreted(kernel, tensors, num_scalars, constants):
    """What stands in for a `KernelLauncher` where there is no GPU: it compiles."""

    def launch(first, num_rows, *more):
        assert 2 + len(more) == num_scalars
        grid = (-(-num_rows // constants["BLOCK_ROWS"]),)
        kernel[grid](*tensors, first, num_rows, *more, *constants.values())

    return launch


def test_counts_of_the_gpu_are_those_of_its_buffers(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(cuda_counts, "KernelLauncher", interpreted)
    counts = CudaCounts(
        positions=torch.zeros(64, dtype=torch.int64, device=DEVICE), num_layers=3, top_k=2,
        num_experts=8, index_dtype=torch.int32,
    )  # fmt: skip
    ids = torch.randint(0, 8, (3, 64, 2), dtype=torch.int32, device=DEVICE)
    counts.buffers.topk_ids.copy_(ids)
    counts.count(np.array([0, 2, 20], np.int32), np.array([True, False]))
    by_row = np.repeat([True, False], [2, 18])
    want = count_selections(ids[:, :20].transpose(0, 1).cpu().numpy(), by_row, 8)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    np.testing.assert_array_equal(counts.totals().selections, want)
    counts.buffers.topk_ids.copy_(ids)
    counts.skip(5)
    counts.count(np.array([0, 5], np.int32), np.array([True]))
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    np.testing.assert_array_equal(counts.totals().selections, want)
    assert counts.totals().rows_missed == 5


SIGNATURES = {
    "count_rows": (
        ["*i32", "*i64", "i32", "i32", "i32", "i32", "i32"],
        kernels.pack_blocks(24, 4),
    ),
    "pack_rows": (
        ["*i32", "*fp32", "*i64", "*u8", "*fp16", "*i32", "i32", "i32", "i32", "i32"],
        kernels.pack_blocks(24, 4),
    ),
    "copy_routing": (
        ["*i64", "*bf16", "*i32", "*fp32", *["i32"] * 5],
        {"TOP_K": 4, "BY_WEIGHT": True, "BLOCK": kernels.COPY_BLOCK},
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_they_compile_for_hopper(name):
    """The interpreter takes Python that the compiler does not; compiling needs no GPU."""
    types, constants = SIGNATURES[name]
    code = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moescope_service.capture.cuda import kernels
kernel = kernels.{name}
signature = dict(zip(kernel.arg_names, {types!r})) | dict.fromkeys({list(constants)!r}, "constexpr")
source = ASTSource(fn=kernel, signature=signature, constexprs={constants!r})
print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=env, capture_output=True, check=False, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
