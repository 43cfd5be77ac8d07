"""The entry points that vLLM loads.

Every process of vLLM calls `register`. It does nothing at all unless moescope is enabled: vLLM
loads general plugins by default, and an installed but unused package must cost nothing.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from moescope_service import settings
from moescope_service.errors import RefusedError

if TYPE_CHECKING:
    from moescope_service.api.plugin import MoescopeEndpoints

_MARK = "_moescope_wrapped"


def register() -> None:
    """Install moescope in this process; a second call does nothing.

    Source: vLLM 0.32.0, ``plugins/__init__.py`` (group ``vllm.general_plugins``).

    Raises:
        RefusedError: This vLLM is not one that moescope was tested on.
    """
    if not settings.is_enabled():
        return
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from moescope_service.capture.install import install
    from moescope_service.versions import check_internals, check_vllm

    check_vllm(settings.Settings.from_env())
    check_internals()
    install(WorkerWrapperBase)
    _wrap_create_engine_config(EngineArgs)


def endpoint_plugin() -> MoescopeEndpoints:
    """Return the endpoints; vLLM asks for them only where ``VLLM_PLUGINS`` names moescope.

    Source: vLLM 0.32.0, ``plugins/endpoint_plugins/interface.py``.
    """
    from moescope_service.api.plugin import MoescopeEndpoints

    return MoescopeEndpoints()


def check_endpoints(usage_context: Any = None, headless: bool = False) -> None:
    """Refuse a server without moescope's endpoints: nobody would say whose the routes are.

    Takes what ``EngineArgs.create_engine_config`` takes.

    Raises:
        RefusedError: vLLM's server starts and ``VLLM_PLUGINS`` is unset; where it is set it names
            moescope, or this would not run.
    """
    from vllm import envs
    from vllm.usage.usage_lib import UsageContext

    if usage_context == UsageContext.OPENAI_API_SERVER and envs.VLLM_PLUGINS is None:
        raise RefusedError(
            f"{settings.ENABLE} or {settings.LOG_ALIAS} is set, but vLLM loads moescope's "
            "endpoints only where VLLM_PLUGINS names it: set VLLM_PLUGINS=moescope (and name your "
            "other plugins), or start `moescope serve`"
        )


def _wrap_create_engine_config(engine_args_class: Any) -> None:
    """Check the configuration, start the collector, and mark the compile cache's key.

    The compiled graph holds the hook, which vLLM's compile cache does not see.
    """
    create_engine_config = engine_args_class.create_engine_config
    if getattr(create_engine_config, _MARK, False):
        return

    @functools.wraps(create_engine_config)
    def create_and_check(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.v1.engine.llm_engine import LLMEngine

        from moescope import __version__
        from moescope_service import offline, runtime
        from moescope_service.capture.refusals import check_config

        self.additional_config = {**(self.additional_config or {}), "moescope": __version__}
        config = create_engine_config(self, *args, **kwargs)
        check_config(config)
        check_endpoints(*args, **kwargs)
        runtime.ensure_collector()
        offline.install(LLMEngine)
        return config

    setattr(create_and_check, _MARK, True)
    engine_args_class.create_engine_config = create_and_check
