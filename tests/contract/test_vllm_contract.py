"""The list of vLLM's internals, the guard that compares it with a vLLM, and the patching."""

from __future__ import annotations

import inspect
import json
import logging
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import moescope_service
from moescope_service.errors import RefusedError
from moescope_service.settings import Settings
from moescope_service.vllm_contract import compat, guard, versions
from moescope_service.vllm_contract.internals import FRONT_END, ROUTING_REPLAY, WEIGHTS, WORKER
from moescope_service.vllm_contract.patching import followed_by, preceded_by, wrap_once

SERVICE = Path(moescope_service.__file__).parent
OPTIONAL = ROUTING_REPLAY if compat.offers_routing_replay() else ()
if Version(versions.vllm_version()).release >= (0, 32):
    OPTIONAL += WEIGHTS
INTERNALS = (*FRONT_END, *WORKER, *OPTIONAL)
NAMES = [(one, name) for one in INTERNALS for name in one.attributes]
PARAMETERS = [
    (one, function, name)
    for one in INTERNALS
    for function, names in one.parameters.items()
    for name in names
]
RETURNED = {"vllm_topk_softmax", "vllm_topk_sigmoid"}
"""Called, but never by these names."""


def title(one) -> str:
    return one if isinstance(one, str) else one.class_name or one.modules[0]


def test_this_vllm_has_all_of_it():
    guard.check_internals(INTERNALS)


def without(owner, name, patch):
    """Take a name from a module or a class, wherever that has it from."""
    for one in inspect.getmro(owner) if inspect.isclass(owner) else (owner,):
        if name in inspect.get_annotations(one):
            patch.delitem(one.__annotations__, name)
        if name in vars(one):
            patch.delattr(one, name)
    if inspect.ismodule(owner):  # some of them look names up when they are asked for
        patch.setattr(owner, "__getattr__", raise_missing, raising=False)
    elif name in guard.declared(owner):
        for constructor in ("__init__", "__post_init__"):
            patch.setattr(owner, constructor, lambda self: None, raising=False)


def raise_missing(name):
    raise AttributeError(name)


@pytest.mark.parametrize(("internal", "name"), NAMES, ids=title)
def test_a_name_that_is_gone_is_named(internal, name, monkeypatch):
    owner = internal.load()
    if isinstance(owner, type(logging)) or not hasattr(owner, "__members__"):
        without(owner, name, monkeypatch)
    else:  # members of an enumeration cannot be taken out
        monkeypatch.setattr(
            sys.modules[owner.__module__], owner.__name__, type(owner.__name__, (), {})
        )
    with pytest.raises(RefusedError, match=rf"{owner.__name__} of this vLLM has no .*{name}"):
        guard.check_internals([internal])


@pytest.mark.parametrize(("internal", "function", "name"), PARAMETERS, ids=title)
def test_a_parameter_that_is_gone_is_named(internal, function, name, monkeypatch):
    monkeypatch.setattr(internal.load(), function, lambda _: None)
    with pytest.raises(RefusedError, match=rf"has no .*\b{name}\b.*, on which"):
        guard.check_internals([internal])


@pytest.mark.parametrize("internal", INTERNALS, ids=title)
def test_a_module_that_is_gone_is_named(internal, monkeypatch):
    for module in internal.modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RefusedError, match=re.escape(internal.modules[-1])):
        guard.check_internals([internal])


@pytest.mark.parametrize("internal", [one for one in INTERNALS if one.class_name], ids=title)
def test_a_class_that_is_gone_is_named(internal, monkeypatch):
    internal.load()
    for module in internal.modules:
        if module in sys.modules:
            monkeypatch.delattr(sys.modules[module], internal.class_name)
    with pytest.raises(RefusedError, match=rf"'{internal.class_name}' from "):
        guard.check_internals([internal])


def test_an_unsupported_version_is_refused_unless_it_is_to_be_tried(monkeypatch):
    for found in ("0.29.2", "0.34.0", "9.8.7"):
        monkeypatch.setattr(guard, "vllm_version", lambda found=found: found)
        with pytest.raises(RefusedError, match=rf"vLLM {re.escape(found)} .*<0\.34.*; install"):
            guard.check_vllm(Settings())
        guard.check_vllm(Settings(allows_untested_vllm=True))


@pytest.mark.parametrize("found", ["0.30.0", "0.31.4", "0.33.1.dev7"])
def test_supported_versions_pass(found, monkeypatch):
    monkeypatch.setattr(guard, "vllm_version", lambda: found)
    guard.check_vllm(Settings())


def test_a_version_without_evidence_is_warned_of(monkeypatch, tmp_path, caplog):
    evidence = tmp_path / "evidence.json"
    whole = {stage: {"passed": 1} for stage in versions.STAGES}
    runs = {"0.31.0": whole, "0.30.0": whole, "0.31.1": {"contract": {"passed": 1}}}
    evidence.write_text(json.dumps([{"vllm": one, "stages": runs[one]} for one in runs]))
    monkeypatch.setattr(versions, "EVIDENCE", evidence)
    for found in ("0.31.0", "0.31.1"):
        monkeypatch.setattr(guard, "vllm_version", lambda found=found: found)
        guard.warn_of_untested()
    (record,) = caplog.records
    assert "tested on vLLM 0.30.0, 0.31.0, 0.32.0, not on 0.31.1" in record.getMessage()


def test_the_package_asks_for_the_supported_versions():
    project = tomllib.loads((SERVICE.parents[1] / "pyproject.toml").read_text())["project"]
    asked = map(Requirement, project["optional-dependencies"]["cuda"])
    assert [one.specifier for one in asked if one.name == "vllm"] == [versions.SUPPORTED_VLLM]


@pytest.mark.parametrize("internal", INTERNALS, ids=title)
def test_the_list_names_what_the_code_uses(internal):
    text = "\n".join((SERVICE / name).read_text() for name in internal.used_by)
    unused = {name for name in internal.attributes if not re.search(rf"\b{name}\b", text)}
    assert unused <= RETURNED
    assert internal.parameters.keys() <= set(internal.attributes)


def test_reading_the_list_imports_nothing_of_vllm():
    code = (
        "import sys\n"
        "from moescope_service.vllm_contract import guard, internals, patching, versions\n"
        "sys.exit('vllm' in sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)


class Greeter:
    def greet(self, name: str, *, loud: bool = False) -> str:
        """Return a greeting."""
        return f"Hello, {name}{'!' if loud else '.'}"


def politely(greet):
    return lambda self, name, **kwargs: greet(self, f"dear {name}", **kwargs)


@pytest.fixture
def greeter():
    return type("Greeter", (Greeter,), {"greet": Greeter.greet})


def test_wrapping_twice_is_wrapping_once(greeter):
    wrap_once(greeter, "greet", politely)
    wrapped = greeter.greet
    wrap_once(greeter, "greet", politely)
    assert greeter.greet is wrapped
    assert greeter().greet("Ana", loud=True) == "Hello, dear Ana!"


def test_a_wrapper_has_the_function_s_name_and_signature(greeter):
    wrap_once(greeter, "greet", politely)
    assert greeter.greet.__name__ == "greet"
    assert greeter.greet.__doc__ == "Return a greeting."
    assert inspect.signature(greeter.greet) == inspect.signature(Greeter.greet)


def test_an_object_is_wrapped_alone(greeter):
    one, other = greeter(), greeter()
    heard = []
    for _ in range(2):
        wrap_once(one, "greet", preceded_by(lambda name: heard.append(f"before {name}")))
    assert one.greet("Ana") == "Hello, Ana."
    assert other.greet("Ben") == "Hello, Ben."
    assert heard == ["before Ana"]


def test_what_follows_gets_the_arguments_and_comes_after(greeter):
    heard = []
    wrap_once(greeter, "greet", followed_by(lambda _, name, **kw: heard.append((name, kw))))
    assert greeter().greet("Ana", loud=True) == "Hello, Ana!"
    assert heard == [("Ana", {"loud": True})]
    with pytest.raises(TypeError):
        greeter().greet()
    assert len(heard) == 1


@pytest.mark.parametrize(("given", "kept"), [(logging.NOTSET, logging.WARNING), (10, 10)])
def test_warnings_are_kept_where_the_root_logger_lets_errors_pass(given, kept, monkeypatch):
    """vLLM's app imports a package that sets the root logger so."""
    monkeypatch.setattr(logging.getLogger(), "level", logging.ERROR)
    logger = logging.getLogger("moescope")
    before = logger.level
    try:
        logger.setLevel(given)
        compat.keep_warnings()
        assert logger.level == kept
        assert logging.getLogger("moescope.capture").isEnabledFor(logging.WARNING)
    finally:
        logger.setLevel(before)
