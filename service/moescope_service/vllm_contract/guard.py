"""Refuses a vLLM that moescope does not support, or whose internals are not those it relies on."""

from __future__ import annotations

import dis
import inspect
import logging
from collections.abc import Collection, Sequence
from typing import Any

import moescope
from moescope_service.errors import RefusedError
from moescope_service.settings import Settings, flag, variable
from moescope_service.vllm_contract.internals import Internal
from moescope_service.vllm_contract.versions import SUPPORTED_VLLM, tested_versions, vllm_version

logger = logging.getLogger("moescope")


def check_vllm(settings: Settings) -> None:
    """Refuse a vLLM that is not among `SUPPORTED_VLLM`, unless told otherwise.

    Raises:
        RefusedError: The version is not supported.
    """
    found = vllm_version()
    if found not in SUPPORTED_VLLM and not settings.allows_untested_vllm:
        name = "allow_untested_vllm"
        raise RefusedError(
            f"vLLM {found} is installed, but moescope {moescope.__version__} relies on internals "
            f"of vLLM {SUPPORTED_VLLM}; install one of these, or try it with {flag(name)} on "
            f"({variable(name)}=on)"
        )


def warn_of_untested() -> None:
    """Say in the log that nothing was tested on this vLLM, if so; `check_internals` let it pass."""
    found, tested = vllm_version(), tested_versions()
    if found not in tested:
        logger.warning(
            "moescope %s was tested on vLLM %s, not on %s: check the routes with `moescope verify`",
            moescope.__version__,
            ", ".join(tested),
            found,
        )


def check_internals(internals: Sequence[Internal]) -> None:
    """Refuse a vLLM that lacks something of what is relied on.

    The version alone does not tell: `check_vllm` can be switched off, and forks keep the number.

    Args:
        internals: `FRONT_END`, `WORKER` or `ROUTING_REPLAY`.

    Raises:
        RefusedError: A module, an attribute or a parameter is missing; the message names it.
    """
    try:
        for internal in internals:
            _check(internal)
    except ImportError as error:
        raise RefusedError(
            f"{error}: moescope {moescope.__version__} relies on internals of vLLM {SUPPORTED_VLLM}"
        ) from error


def _check(internal: Internal) -> None:
    owner = internal.load()
    _refuse_without(owner, [name for name in internal.attributes if not has(owner, name)])
    for name, parameters in internal.parameters.items():
        function = getattr(owner, name)
        _refuse_without(function, set(parameters) - set(inspect.signature(function).parameters))


def has(owner: Any, name: str) -> bool:
    """Whether a module or class has an attribute, or the class's instances do.

    An abstract method that a class inherits does not count.
    """
    if name in vars(owner) or (inspect.isclass(owner) and name in declared(owner)):
        return True
    return hasattr(owner, name) and not getattr(getattr(owner, name), "__isabstractmethod__", False)


def declared(owner: Any) -> set[str]:
    """Return the attributes that a class annotates, or that its constructor sets."""
    names = {name for one in inspect.getmro(owner) for name in inspect.get_annotations(one)}
    for constructor in (owner.__init__, getattr(owner, "__post_init__", None)):
        code = getattr(inspect.unwrap(constructor), "__code__", None) if constructor else None
        names |= {
            instruction.argval
            for instruction in (dis.get_instructions(code) if code is not None else ())
            if instruction.opname == "STORE_ATTR"
        }
    return names


def _refuse_without(owner: Any, missing: Collection[str]) -> None:
    if missing:
        name = owner.__name__
        if not inspect.ismodule(owner):
            name = f"{owner.__module__}.{owner.__qualname__}"
        raise RefusedError(
            f"{name} of this vLLM has no {', '.join(sorted(missing))}, on which moescope "
            f"{moescope.__version__} relies"
        )
