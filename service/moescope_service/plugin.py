"""The entry points that vLLM loads.

Every process of vLLM calls `register`. It does nothing unless moescope is enabled: vLLM loads
general plugins by default, and a package that is installed but not used must cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moescope_service import settings
from moescope_service.errors import RefusedError

if TYPE_CHECKING:
    from moescope_service.api.plugin import MoescopeEndpoints


def register() -> None:
    """Install moescope in this process; a second call does nothing.

    Source: vLLM 0.32.0, ``plugins/__init__.py`` (group ``vllm.general_plugins``).

    Raises:
        RefusedError: This vLLM is not one that moescope supports, or something that moescope needs
            is not installed.
    """
    if not settings.is_enabled():
        return
    from moescope_service.imports import check_imports

    check_imports(with_endpoints=False)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from moescope_service.capture import loads
    from moescope_service.capture.install import install
    from moescope_service.vllm_contract.compat import keep_warnings
    from moescope_service.vllm_contract.guard import check_internals, check_vllm
    from moescope_service.vllm_contract.internals import FRONT_END
    from moescope_service.vllm_contract.patching import wrap_once

    given = settings.Settings.from_env()
    check_vllm(given)
    check_internals(FRONT_END)
    keep_warnings()
    install(WorkerWrapperBase)
    if given.mode == "routes":
        loads.install(Scheduler)
    wrap_once(EngineArgs, "create_engine_config", _checking)


def endpoint_plugin() -> MoescopeEndpoints:
    """Return the endpoints; vLLM asks for them only where ``VLLM_PLUGINS`` names moescope.

    Source: vLLM 0.32.0, ``plugins/endpoint_plugins/interface.py``.
    """
    from moescope_service.api.plugin import MoescopeEndpoints

    return MoescopeEndpoints()


def check_endpoints(usage_context: Any = None, headless: bool = False) -> None:
    """Refuse a server without moescope's endpoints: nothing would register its requests.

    Takes what ``EngineArgs.create_engine_config`` takes.

    Raises:
        RefusedError: vLLM's server starts and ``VLLM_PLUGINS`` is unset (where it is set it names
            moescope, or this would not run), or the endpoints cannot be loaded.
    """
    from vllm import envs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    from moescope_service.imports import check_imports

    if usage_context != UsageContext.OPENAI_API_SERVER:
        return
    if envs.VLLM_PLUGINS is None:
        raise RefusedError(
            f"{settings.ENABLE} or {settings.LOG_ALIAS} is set, but vLLM loads moescope's "
            "endpoints only where VLLM_PLUGINS names it: set VLLM_PLUGINS=moescope (and name your "
            "other plugins), or start `moescope serve`"
        )
    check_imports(with_endpoints=True, with_cuda=current_platform.is_cuda())


def _find_collector(
    parallel: Any, given: settings.Settings, usage_context: Any = None, headless: bool = False
) -> None:
    """Start the collector, or join the first node's; the rest is as of `check_endpoints`.

    Raises:
        RefusedError: It does not start, it cannot be joined, or a script would join it.
    """
    from vllm.usage.usage_lib import UsageContext

    from moescope_service import runtime
    from moescope_service.vllm_contract.nodes import is_first_node

    if given.bind is None or is_first_node(parallel, headless=headless):
        runtime.ensure_collector()
    elif usage_context != UsageContext.OPENAI_API_SERVER:
        raise RefusedError(
            "a script's vllm.LLM is recorded on the first node alone: start `moescope serve` on "
            f"this one, or leave {settings.flag('bind')} ({settings.variable('bind')}) out"
        )
    else:
        runtime.join(given)


def _checking(create_engine_config: Callable[..., Any]) -> Callable[..., Any]:
    """Check the configuration, start or join the collector, and mark the compile cache's key.

    The compiled graph holds the hook, which vLLM's compile cache does not see.
    """

    def create_and_check(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.v1.engine.llm_engine import LLMEngine

        from moescope import __version__
        from moescope_service import offline
        from moescope_service.capture.refusals import check_config
        from moescope_service.vllm_contract.guard import warn_of_untested

        given = settings.Settings.from_env()
        self.additional_config = {**(self.additional_config or {}), "moescope": __version__}
        check_endpoints(*args, **kwargs)
        config = create_engine_config(self, *args, **kwargs)
        check_config(config, given)
        warn_of_untested()
        _find_collector(config.parallel_config, given, *args, **kwargs)
        offline.install(LLMEngine)
        return config

    return create_and_check
