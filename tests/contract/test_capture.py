"""Routers, refusals and the sink, on modules without a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.platforms import current_platform

from moescope_service.capture.kv_cache import full_attention_group
from moescope_service.capture.refusals import check_config
from moescope_service.capture.routers import check_runner, find_routed_layers
from moescope_service.errors import RefusedError
from moescope_service.parsers import HostPort
from moescope_service.settings import Settings

from .routed_model import Model, Router, Runner, hook, make_sink


def test_routed_layers_come_in_the_models_order():
    found = find_routed_layers(Model(Runner(7), Runner(2), Runner(5)))
    assert [one.layer for one in found] == [2, 5, 7]


def test_a_model_without_experts():
    with pytest.raises(RefusedError, match=r"Model has no mixture-of-experts layer"):
        find_routed_layers(Model())


def test_what_the_kernels_want_ids_to_be():
    runner = Runner(3)
    runner.routed_experts.quant_method.topk_indices_dtype = torch.int64
    assert check_runner(runner).index_dtype is torch.int64


def test_experts_are_those_that_ids_name():
    # With the expert-parallel load balancer's redundant ones the router has more.
    runner = Runner(3, Router(num_experts=8 + 2))
    assert check_runner(runner).num_experts == 8


def test_layers_that_differ():
    with pytest.raises(RefusedError, match=r"\(2, 8\), \(4, 8\)"):
        find_routed_layers(Model(Runner(0), Runner(1, Router(top_k=4))))


class Changed(Router):
    def _compute_routing(self, hidden_states, router_logits, extra):
        return super()._compute_routing(hidden_states, router_logits, None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"is_monolithic": True}, "layer 3 runs a monolithic kernel"),
        ({"enable_dbo": True}, "--enable-dbo"),
        ({"router": torch.nn.Identity()}, "router Identity"),
        ({"router": Changed()}, "router Changed"),
    ],
)
def test_a_layer_whose_routing_cannot_be_seen(change, words, monkeypatch):
    runner = Runner(3)
    for name, value in change.items():
        if name == "router":
            runner.router = value
        else:
            monkeypatch.setattr(Runner, name, value)
    with pytest.raises(RefusedError, match=words):
        check_runner(runner)


def make_config(**changes):
    model = {"is_moe": True, "model": "m", "architectures": ["A"], "runner_type": "generate"}
    parallel = dict.fromkeys(
        ["data_parallel_size", "data_parallel_size_local", "nnodes",
         "prefill_context_parallel_size", "decode_context_parallel_size",
         "tensor_parallel_size", "pipeline_parallel_size"], 1,
    ) | dict.fromkeys(
        ["data_parallel_backend", "distributed_executor_backend"], "mp"
    ) | dict.fromkeys(
        ["use_ubatching", "enable_elastic_ep", "data_parallel_external_lb",
         "data_parallel_hybrid_lb", "use_sequence_parallel_moe"], False,
    )  # fmt: skip
    top = {"use_v2_model_runner": False}
    groups = {
        "model_config": model,
        "parallel_config": parallel,
        "device_config": {"device_type": "cpu"},
        "kernel_config": {"moe_backend": "auto"},
        "scheduler_config": {"policy": "fcfs"},
        "cache_config": {"kv_sharing_fast_prefill": False},
        "speculative_config": {"enable_adaptive_verification": False},
    }
    for name, value in changes.items():
        next(group for group in (*groups.values(), top) if name in group)[name] = value
    return SimpleNamespace(**{n: SimpleNamespace(**g) for n, g in groups.items()}, **top)


def test_a_configuration_that_can_be_captured():
    check_config(make_config(), Settings())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("is_moe", False, "m (A) is a dense model"),
        ("runner_type", "pooling", "'pooling'"),
        ("data_parallel_size", 2, "workers of other machines"),
        ("nnodes", 2, "workers of other machines"),
        ("prefill_context_parallel_size", 2, "--prefill-context-parallel-size is 2"),
        ("decode_context_parallel_size", 2, "--decode-context-parallel-size is 2"),
        ("enable_elastic_ep", True, "--enable-elastic-ep"),
        ("use_ubatching", True, "--enable-dbo"),
        ("device_type", "xpu", "'xpu'"),
        ("policy", "priority", "--scheduling-policy is 'priority'"),
        ("kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill"),
        ("enable_adaptive_verification", True, "adaptive verification"),
        ("use_v2_model_runner", True, "VLLM_USE_V2_MODEL_RUNNER=0"),
    ],
)
def test_a_configuration_that_cannot_be_captured(name, value, words):
    with pytest.raises(RefusedError) as caught:
        check_config(make_config(**{name: value}), Settings())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("nnodes", 2), ("data_parallel_size", 2), ("distributed_executor_backend", "ray")],
)
def test_an_engine_over_several_nodes_needs_an_address_that_names_one(name, value):
    config = make_config(**{name: value})
    check_config(config, Settings(bind=HostPort("head", 5570), key_file=Path("key")))
    with pytest.raises(RefusedError, match=r"--routes-bind is 0\.0\.0\.0:5570, which names no"):
        check_config(config, Settings(bind=HostPort("0.0.0.0", 5570), key_file=Path("key")))


MEGA_MOE = {"moe_backend": "deep_gemm_mega_moe", "tensor_parallel_size": 4}


def test_workers_that_route_shards_of_a_step():
    with pytest.raises(RefusedError, match=r"deep_gemm_mega_moe .*-parallel-size 4 workers; use"):
        check_config(make_config(**MEGA_MOE), Settings())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moe_backend", "triton"),
        ("use_sequence_parallel_moe", True),  # data parallel: the shards are gathered
        ("tensor_parallel_size", 1),
        ("pipeline_parallel_size", 2),
    ],
)
def test_workers_whose_shards_are_gathered_or_that_have_none(name, value):
    check_config(make_config(**MEGA_MOE | {name: value}), Settings())


@pytest.mark.parametrize(("device", "v2"), [("cuda", True), ("cuda", False), ("cpu", False)])
def test_where_it_can_be_captured(device, v2):
    check_config(make_config(device_type=device, use_v2_model_runner=v2), Settings())


def test_amd_gpus_call_themselves_cuda(monkeypatch):
    monkeypatch.setattr(current_platform, "is_rocm", lambda: True)
    with pytest.raises(RefusedError, match="the device is 'rocm'"):
        check_config(make_config(device_type="cuda"), Settings())


def test_the_group_that_attends_to_everything():
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    shape = {"block_size": 32, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    window, full = SlidingWindowSpec(**shape, sliding_window=64), FullAttentionSpec(**shape)

    def config(*specs):
        return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=s) for s in specs])

    assert full_attention_group(config(window, full)) == (1, 32)
    with pytest.raises(RefusedError, match="attends to the whole sequence"):
        full_attention_group(config(window))


@pytest.fixture
def hooked():
    model = Model(Runner(4), Runner(1))
    layers = find_routed_layers(model)
    sink = make_sink()
    plain = [one.router._compute_routing for one in layers]
    hook(layers, sink)
    return model, sink, plain


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_every_call_fills_each_layers_column(hooked, backend):
    """Compiled too: a Python side effect would run once, at the trace, and never again."""
    model, sink, plain = hooked
    run = torch.compile(model, backend=backend, dynamic=True) if backend else model
    torch.manual_seed(0)
    with torch.no_grad():
        for num_tokens in (5, 3, 16, 2):
            x = torch.randn(num_tokens, 8)
            sink.start_step()
            run(x.clone())
            rows = sink.take(num_tokens)
            ids, weights = rows.topk_ids, rows.topk_weights
            assert rows.positions.tolist() == list(range(num_tokens))
            assert (ids.shape, ids.dtype, weights.dtype) == (
                (num_tokens, 2, 2),
                np.uint8,
                np.float16,
            )
            for column in (1, 0):  # the model runs layer 4 first
                want_weights, want_ids = plain[column](x, x, torch.int32)
                np.testing.assert_array_equal(ids[:, column], want_ids.numpy())
                np.testing.assert_allclose(weights[:, column], want_weights.numpy(), atol=1e-3)
                x = x + want_weights.sum(-1, keepdim=True) + want_ids.sum(-1, keepdim=True)


def test_the_model_computes_the_same_with_the_hook(hooked):
    model, _, _ = hooked
    x = torch.randn(4, 8)
    torch.testing.assert_close(model(x), Model(Runner(4), Runner(1))(x))


def test_a_layer_that_did_not_write_or_wrote_twice(hooked):
    model, sink, _ = hooked
    x = torch.randn(4, 8)
    sink.start_step()
    model.runners[0].router(x, x)
    assert sink.take(4) == "hook_missed"
    model.runners[1].router(x, x)
    ids = sink.take(4).topk_ids
    model.runners[0].router(x, x)
    assert sink.take(4) == "hook_missed"
    sink.start_step()
    assert sink.take(4) == "hook_missed"
    before = ids.copy()
    model(torch.randn(4, 8))
    np.testing.assert_array_equal(ids, before)  # what was taken is a copy


def test_a_layer_that_routed_fewer_tokens_than_the_step_has(hooked):
    """What stands behind its rows is an earlier step's."""
    model, sink, _ = hooked
    sink.start_step()
    model(torch.randn(4, 8))
    sink.start_step()
    for runner, num_tokens in zip(model.runners, (4, 1), strict=True):
        x = torch.randn(num_tokens, 8)
        runner.router(x, x)
    assert sink.take(4) == "hook_missed"
    assert len(sink.take(1).positions) == 1


def test_only_the_instances_found_are_hooked(hooked):
    other = Router()
    assert "_compute_routing" not in vars(other)
    assert "_compute_routing" in vars(hooked[0].runners[0].router)


def test_two_sinks_do_not_mix(hooked):
    _, sink, _ = hooked
    other_model = Model(Runner(0))
    other = make_sink(max_tokens=4, num_layers=1, weights_dtype="float32")
    hook(find_routed_layers(other_model), other)
    sink.start_step()
    other.start_step()
    other_model(torch.randn(2, 8))
    assert sink.take(2) == "hook_missed"
    assert other.take(2).topk_weights.dtype == np.float32


def test_a_graph_of_an_earlier_worker_writes_for_the_one_that_runs(hooked):
    """vLLM's compile cache hands a graph to any worker of the same configuration."""
    model, first, _ = hooked
    run = torch.compile(model, backend="eager", dynamic=True)
    first.start_step()
    run(torch.randn(3, 8))
    kept = first.take(3).topk_ids.copy()
    second = make_sink()
    second.start_step()
    run(torch.randn(5, 8))
    assert len(second.take(5).topk_ids) == 5
    np.testing.assert_array_equal(first.take(3).topk_ids, kept)


def test_an_expert_weighs_what_it_does_on_all_workers_that_share_it():
    runner = Runner(0)
    runner.moe_config.tp_size = 2
    for name, shape in (("w13", (8, 6, 4)), ("w2", (8, 4, 3)), ("of_all", (5, 7)), ("scale", (8,))):
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
        runner.routed_experts.register_parameter(name, parameter)
    assert check_runner(runner).expert_bytes == 2 * (6 * 4 + 4 * 3) * 2
    assert check_runner(Runner(1)).expert_bytes == 0
