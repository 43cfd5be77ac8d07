"""The guard against a vLLM whose internals are not those that moescope relies on."""

from __future__ import annotations

import sys

import pytest

from moescope_service import versions
from moescope_service.errors import RefusedError

OWN = [
    (owner, name)
    for owner, names in versions._attributes().items()
    for name in names
    if name in vars(owner) and name not in versions._set_by_constructor(owner)
]
SET = [("OutputProcessor", "request_states"), ("MoERunner", "enable_dbo"), ("BaseRouter", "top_k"),
       ("FusedTopKRouter", "scoring_func"), ("SchedulerOutput", "finished_req_ids")]  # fmt: skip


def test_this_vllm_has_all_of_it():
    versions.check_internals()


@pytest.mark.parametrize(("owner", "name"), OWN, ids=lambda one: getattr(one, "__name__", one))
def test_an_attribute_that_is_gone_is_named(owner, name, monkeypatch):
    monkeypatch.delattr(owner, name)
    with pytest.raises(RefusedError, match=rf"{owner.__name__} of this vLLM has no .*{name}"):
        versions.check_internals()


def test_what_is_wrapped_and_called_is_among_them():
    names = {f"{getattr(owner, '__name__', owner)}.{name}" for owner, name in OWN}
    assert names >= {"OutputProcessor.has_request", "OutputProcessor.abort_requests",
                     "MoERunner.is_monolithic", "NewRequestData.prompt_len", "LLMEngine.step",
                     "WorkerBase.shutdown", "WorkerWrapperBase.initialize_from_config"}  # fmt: skip


@pytest.mark.parametrize(("owner", "name"), SET)
def test_an_attribute_that_no_constructor_sets_is_named(owner, name, monkeypatch):
    (found,) = (one for one in versions._attributes() if one.__name__.endswith(owner))
    monkeypatch.setattr(found, "__init__", lambda self: None)
    with pytest.raises(RefusedError, match=rf"{owner} of this vLLM has no .*{name}"):
        versions.check_internals()


def test_a_parameter_that_is_gone_is_named(monkeypatch):
    from vllm.v1.engine.output_processor import OutputProcessor

    monkeypatch.setattr(OutputProcessor, "abort_requests", lambda self, request_ids: [])
    with pytest.raises(RefusedError, match="has no internal, on which"):
        versions.check_internals()


def test_a_module_that_is_gone_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.parallel_sampling", None)
    with pytest.raises(RefusedError, match=r"vllm\.v1\.engine\.parallel_sampling"):
        versions.check_internals()
