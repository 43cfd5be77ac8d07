"""Replaces functions of vLLM's classes and objects, each at most once.

The only place of the service that marks what it has replaced. vLLM calls moescope's plugin several
times in one process; the second call must find its own work and leave it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MARK = "_moescope_wrapped"

Function = Callable[..., Any]


def wrap_once(owner: Any, name: str, make_wrapper: Callable[[Function], Function]) -> None:
    """Replace a function by a wrapper; where that was done already, do nothing.

    Args:
        owner: A class, or an object of which only this one is to change.
        name: The function's name.
        make_wrapper: Takes the function and returns what stands in its place; name, docstring and
            signature are copied to it.
    """
    function = getattr(owner, name)
    if getattr(function, _MARK, False):
        return
    wrapper = functools.wraps(function)(make_wrapper(function))
    setattr(wrapper, _MARK, True)
    setattr(owner, name, wrapper)


def preceded_by(action: Function) -> Callable[[Function], Function]:
    """Return what makes a wrapper (see `wrap_once`) that first calls an action, then the function.

    The action gets the function's arguments.
    """

    def make_wrapper(function: Function) -> Function:
        def act_and_call(*args: Any, **kwargs: Any) -> Any:
            action(*args, **kwargs)
            return function(*args, **kwargs)

        return act_and_call

    return make_wrapper


def followed_by(action: Function) -> Callable[[Function], Function]:
    """Return what makes a wrapper (see `wrap_once`) that calls the function, then an action.

    The action gets the function's arguments; what it returns is dropped.
    """

    def make_wrapper(function: Function) -> Function:
        def call_and_act(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            action(*args, **kwargs)
            return result

        return call_and_act

    return make_wrapper
