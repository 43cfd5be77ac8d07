"""The capture in a worker, from loading its model to its last step."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zmq
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec

from moescope_service.capture.install import WorkerCapture
from moescope_service.capture.ranks import Place
from moescope_service.errors import RefusedError
from moescope_service.messages import unpack, unpack_introduction, unpack_steps
from moescope_service.settings import RUNTIME_DIR, Settings
from tests.waiting import DEADLINE_S

from .test_capture import Model, Runner

PLACE = Place(
    engine=0, num_engines=1, stage=0, num_stages=1, is_sender=True, own_rows=None, is_sharded=False
)


class Worker:
    """What of vLLM's worker and V1 model runner the capture touches."""

    def __init__(self, model):
        self.model, self.device, self.model_runner = model, torch.device("cpu"), self
        self.positions = torch.arange(10, 26)
        self.query_start_loc = SimpleNamespace(np=np.array([0, 3, 3], np.int32))
        self.input_batch = SimpleNamespace(
            num_reqs=1, req_ids=["a"], num_computed_tokens_cpu=np.array([10])
        )
        self.vllm_config = SimpleNamespace(
            use_v2_model_runner=False, num_speculative_tokens=0, max_concurrent_batches=1,
            model_config=SimpleNamespace(
                served_model_name="tiny", seed=7, get_total_num_hidden_layers=lambda: 4
            ),
            device_config=SimpleNamespace(device="cpu"), kv_transfer_config=None,
        )  # fmt: skip

    def get_model(self):
        return self.model

    def load_model(self):
        pass

    def initialize_from_config(self, kv_cache_config):
        pass

    def compile_or_warm_up_model(self):
        self.execute_model(step("warm-up"))

    def shutdown(self):
        pass

    def execute_model(self, scheduler_output, dummy_run=False):
        self.model(torch.randn(3, 8))
        return dummy_run


def step(name):
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = [NewRequestData(name, [1, 2, 3], [], None, None, ([5],), 0, None)]
    output.total_num_scheduled_tokens = 3
    return output


@pytest.fixture
def worker(tmp_path_factory, monkeypatch):
    directory = tmp_path_factory.mktemp("z")
    monkeypatch.setenv(RUNTIME_DIR, str(directory))
    worker = Worker(Model(Runner(1), Runner(3)))
    WorkerCapture(worker, Settings(), PLACE)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(f"ipc://{directory}/collector.sock")
        worker.socket = socket
        yield worker


def receive(worker):
    assert worker.socket.poll(DEADLINE_S * 1000), "no message came"
    frames = worker.socket.recv_multipart()[1:]
    return *unpack(frames), frames


def start(worker):
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
    group = SimpleNamespace(kv_cache_spec=spec)
    worker.load_model()
    worker.initialize_from_config(SimpleNamespace(num_blocks=99, kv_cache_groups=[group]))
    worker.compile_or_warm_up_model()


def test_a_worker_says_what_it_captures_and_ships_its_steps(worker):
    start(worker)
    kind, values, _ = receive(worker)
    spec, is_capturing, worker_state, _ = unpack_introduction(values)
    assert (is_capturing, worker_state) == (True, None)
    assert (kind, spec.layers, spec.num_blocks, spec.block_size) == ("worker", [1, 3], 99, 16)
    assert (spec.num_experts, spec.top_k, spec.num_hidden_layers) == (8, 2, 4)
    worker.execute_model(step("a"))
    worker.shutdown()
    kind, values, frames = receive(worker)
    (got,) = unpack_steps(values, frames, spec)
    assert (kind, got.number, got.lost) == ("steps", 0, None)
    assert [one.internal_id for one in got.admitted] == ["a"]
    assert got.spans.tolist() == [[0, 10, 3]]
    assert got.topk_ids.shape == (3, 2, 2)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_layer_to_log_that_routes_nothing_is_refused_where_one_worker_has_all(num_stages):
    worker = Worker(Model(Runner(1), Runner(3)))
    place = dataclasses.replace(PLACE, num_stages=num_stages)
    WorkerCapture(worker, Settings(log_layers=(2,)), place)
    if num_stages > 1:
        worker.load_model()
        return
    with pytest.raises(RefusedError, match="names layer 2, which routes nothing"):
        worker.load_model()


def test_steps_say_which_weights_computed_them(worker):
    model = worker.model
    model.load_weights = set
    model.load_weights([])  # vLLM's loader
    start(worker)
    worker.execute_model(step("a"))
    model.load_weights([])
    worker.execute_model(step("b"))
    worker.shutdown()
    _, values, _ = receive(worker)
    spec, *_ = unpack_introduction(values)
    steps = []
    while len(steps) < 3:
        _, values, frames = receive(worker)
        steps += unpack_steps(values, frames, spec)
    assert [(len(got.spans), got.weights_version) for got in steps] == [(1, 0), (0, 1), (1, 1)]


def test_steps_of_the_warm_up_and_dummy_runs_are_nobodys(worker):
    start(worker)
    assert worker.execute_model(step("dummy"), dummy_run=True) is True
    assert worker.execute_model(step("a")) is False
    worker.shutdown()
    _, values, _ = receive(worker)
    spec, *_ = unpack_introduction(values)
    _, values, frames = receive(worker)
    steps = unpack_steps(values, frames, spec)
    assert [[one.internal_id for one in got.admitted] for got in steps] == [["a"]]
