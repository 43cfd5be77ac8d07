"""What changes a model's weights is counted, by vLLM's own workers and model runners."""

from __future__ import annotations

import functools
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from moescope.version_runs import MIXED
from moescope_service.capture.weights import WeightsVersion


class Model(torch.nn.Module):
    """A model of one weight."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def load_weights(self, weights):
        loaded = set()
        for name, value in weights:
            self.get_parameter(name).copy_(value)
            loaded.add(name)
        return loaded


class Transfer:
    """What a worker asks of vLLM's weight transfer engines."""

    supports_draft_weight_update = True

    def __init__(self, model):
        self.model, self.fails = model, False

    def start_weight_update(self):
        pass

    def update_weights(self, info):
        self.model.load_weights(info["weights"])
        if self.fails:
            raise ConnectionError("the trainer is gone")

    def finish_weight_update(self):
        self.model.load_weights([])

    def reset_weight_update_target(self):
        pass


class Adapters(LRUCacheWorkerLoRAManager):
    """vLLM's manager of adapters without their tensors."""

    def __init__(self):
        self._adapter_manager = self.loaded = _Loaded()

    def _load_adapter(self, lora_request):
        return SimpleNamespace(id=lora_request.lora_int_id)


class _Loaded(LRUCacheLoRAModelManager):
    capacity = lora_slots = 2

    def __init__(self):
        self.adapters = {}

    def __len__(self):
        return len(self.adapters)

    def list_adapters(self):
        return self.adapters

    def remove_adapter(self, number):
        return self.adapters.pop(number, None) is not None

    def remove_oldest_adapter(self):
        del self.adapters[next(iter(self.adapters))]

    def add_adapter(self, lora):
        self.adapters[lora.id] = lora
        return True

    def get_adapter(self, number):
        return self.adapters.get(number)

    def activate_adapter(self, number):
        pass


class Rig:
    """A worker, and what was told of its weights."""

    def __init__(self, worker_class, runner_class):
        self.model, self.config = Model(), VllmConfig()
        self.config.model_config = SimpleNamespace(quantization=None)
        runner = runner_class.__new__(runner_class)
        runner.vllm_config, runner.model = self.config, self.model
        runner.model_config = self.config.model_config  # until 0.31
        runner.lora_config = runner.speculator = None
        runner.get_model = lambda: self.model
        runner.reset_encoder_cache = runner.reset_mm_cache = lambda: None
        runner.lora_manager = self.adapters = Adapters()
        self.worker = worker = worker_class.__new__(worker_class)
        worker.vllm_config, worker.model_runner = self.config, runner
        worker.parallel_config = self.config.parallel_config
        worker.weight_transfer_engine = self.transfer = Transfer(self.model)
        worker._weight_update_active = worker._weight_update_is_draft = False
        worker._set_draft_weight_update_target = lambda: setattr(self.transfer, "model", Model())
        worker.rank = 0
        self.weights, self.told = WeightsVersion(), []
        self.weights.follow(worker, self.model, self.told.append)

    def step(self):
        return self.weights.of_step()

    def load(self, value=1.0):
        self.model.load_weights([("weight", torch.tensor([value]))])

    def reload(self, weights=(), **kwargs):
        self.worker.reload_weights(weights_iterator=iter(weights), **kwargs)

    def update(self, value=1.0):
        self.worker.update_weights({"weights": [("weight", torch.tensor([value]))]})


@pytest.fixture(
    params=[(Worker, GPUModelRunner), (Worker, GPUModelRunnerV2), (CPUWorker, GPUModelRunner)],
    ids=["V1", "V2", "CPU"],
)
def rig(request, monkeypatch):
    # Tests of one-weight models need none of the layers that are reloaded one by one.
    reload = "vllm.model_executor.model_loader.reload.inplace"
    if importlib.util.find_spec(reload) is None:  # until 0.31
        reload = "vllm.v1.worker.gpu_model_runner"
    for name in ("initialize_layerwise_reload", "finalize_layerwise_reload"):
        monkeypatch.setattr(f"{reload}.{name}", _nothing)
    return Rig(*request.param)


def _nothing(*_):
    pass


def test_it_starts_at_0_and_an_update_counts_once_it_is_finished(rig):
    assert rig.step() == 0
    rig.worker.start_weight_update()
    assert rig.step() == MIXED
    rig.update(1.0)
    rig.update(2.0)
    assert (rig.step(), rig.told) == (MIXED, [])
    rig.worker.finish_weight_update()
    assert (rig.step(), rig.told) == (1, [1])
    assert rig.model.weight.item() == 2.0
    for number in (2, 3):  # without a step between them too
        rig.worker.start_weight_update()
        rig.worker.finish_weight_update()
        assert rig.told[-1] == number


def test_a_reload_counts_once(rig):
    rig.reload([("weight", torch.ones(1))])
    assert (rig.step(), rig.told) == (1, [1])
    rig.reload([("weight", torch.ones(1))], is_checkpoint_format=False)
    assert rig.step() == 2
    rig.worker.model_runner.reload_weights(weights_iterator=iter(()))  # as an extension may
    assert (rig.step(), rig.told) == (3, [1, 2, 3])
    rig.reload()
    rig.reload()
    assert rig.told == [1, 2, 3, 4, 5]


def test_loads_count_once_between_two_steps(rig):
    for value in (1.0, 2.0, 3.0):
        rig.load(value)
    assert (rig.step(), rig.told) == (1, [1])
    rig.load()
    assert (rig.step(), rig.step()) == (2, 2)
    rig.reload()
    rig.load()
    assert rig.told == [1, 2, 3, 4]


def test_a_change_that_fails_halfway_leaves_mixed_weights_until_the_next(rig):
    def broken():
        yield "weight", torch.ones(1)
        raise OSError("the file is cut")

    for fail in (lambda: rig.reload(broken()), lambda: rig.model.load_weights(broken())):
        with pytest.raises(OSError, match="cut"):
            fail()
        assert rig.step() == MIXED
        rig.load()
        assert rig.step() == rig.told[-1]
    assert rig.told == [1, 2]


def test_an_adapter_does_not_mend_weights_that_are_mixed(rig):
    rig.worker.add_lora(lora(1))
    with pytest.raises(TypeError):
        rig.model.load_weights(None)
    rig.worker.add_lora(lora(1, load_inplace=True))
    assert (rig.step(), rig.told) == (MIXED, [1])


def test_an_update_that_fails_is_over_and_the_weights_are_mixed(rig):
    rig.worker.start_weight_update()
    rig.transfer.fails = True
    with pytest.raises(ConnectionError):
        rig.update()
    assert (rig.step(), rig.told) == (MIXED, [])
    rig.reload()
    assert (rig.step(), rig.told) == (1, [1])


def test_what_vllm_refuses_changes_nothing(rig):
    for call in (rig.update, rig.worker.finish_weight_update):
        with pytest.raises(RuntimeError, match="start_weight_update"):
            call()
    rig.worker.weight_transfer_engine = None
    with pytest.raises(RuntimeError, match="not configured"):
        rig.worker.start_weight_update()
    assert (rig.step(), rig.told) == (0, [])


def test_an_update_outside_of_a_start_and_finish_counts(rig):
    """As a vLLM without these calls has it."""
    rig.worker._weight_update_active = True
    rig.update()
    assert (rig.step(), rig.told) == (1, [1])
    rig.transfer.fails = True
    with pytest.raises(ConnectionError):
        rig.update()
    assert rig.step() == MIXED


def test_the_weights_of_a_draft_model_route_nothing(rig):
    rig.worker.start_draft_weight_update()
    rig.update()
    assert rig.step() == 0
    rig.worker.finish_weight_update()
    assert (rig.step(), rig.told) == (0, [])
    rig.worker.start_draft_weight_update()
    rig.transfer.fails = True
    with pytest.raises(ConnectionError):
        rig.update()
    assert rig.step() == 0
    rig.load()
    assert rig.step() == 1


def test_waking_up_without_the_weights_counts(rig, monkeypatch):
    for name in ("sleep", "wake_up", "discard"):
        if hasattr(Worker, name):
            monkeypatch.setattr(Worker, name, _nothing_but(getattr(Worker, name)))
    rig = Rig(Worker, GPUModelRunner)
    rig.worker.sleep(1)
    rig.worker.wake_up()
    assert rig.told == []
    rig.worker.sleep(level=2)
    rig.worker.wake_up(["kv_cache"])
    assert rig.told == []
    rig.worker.wake_up(tags=["weights"])
    rig.worker.wake_up()
    assert rig.told == [1]
    if hasattr(Worker, "discard"):  # since 0.31
        rig.worker.discard(("weights",))
        rig.worker.wake_up()
        assert rig.told == [1, 2]


def _nothing_but(function):
    """Return a stand-in of the same signature: there is no device whose memory could be freed."""
    return functools.wraps(function)(lambda *_, **__: None)


def lora(number, name="a", path="/1", **kwargs):
    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=path, **kwargs)


def needed(rig, *requests):
    """What a step does before it runs the model."""
    rig.adapters._apply_adapters(set(requests))


def test_adapters_that_are_loaded_for_the_first_time_change_nothing(rig):
    rig.worker.add_lora(lora(1))
    rig.worker.add_lora(lora(2, "b", "/2", load_inplace=True))
    needed(rig, lora(1), lora(2, "b", "/2"))
    assert rig.told == []


def test_one_that_made_room_and_comes_back_changes_nothing(rig):
    for number, name in ((1, "a"), (2, "b"), (3, "c"), (1, "a")):
        needed(rig, lora(number, name))
    assert len(rig.adapters.loaded) == 2
    assert rig.told == []


def test_an_adapter_that_is_replaced_counts(rig):
    rig.worker.add_lora(lora(1))
    rig.worker.add_lora(lora(1, load_inplace=True))
    assert rig.told == [1]
    rig.worker.add_lora(lora(1, path="/2", load_inplace=True))
    assert rig.told == [1, 2]
    needed(rig, lora(1, path="/2", load_inplace=True))  # vLLM loads it in each step
    assert rig.told == [1, 2]
    rig.worker.add_lora(lora(5, path="/2"))  # unloaded and loaded by the API server
    assert rig.told == [1, 2, 3]
    rig.worker.remove_lora(5)
    needed(rig, lora(5, path="/2"))
    assert rig.told == [1, 2, 3, 4]
    rig.worker.remove_lora(5)
    rig.worker.add_lora(lora(5, "other", "/2"))
    assert rig.told == [1, 2, 3, 4, 5]


def test_a_worker_that_has_none_of_these_calls_is_left_alone():
    worker = SimpleNamespace(model_runner=SimpleNamespace())
    WeightsVersion().follow(worker, torch.nn.Linear(1, 1), print)
    assert vars(worker) == {"model_runner": SimpleNamespace()}
