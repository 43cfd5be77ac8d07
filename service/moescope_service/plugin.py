"""The entry points that vLLM loads.

Every process of vLLM calls `register`. It does nothing at all unless moescope is enabled: vLLM
loads general plugins by default, and an installed but unused package must cost nothing.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from moescope_service import settings

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


def _wrap_create_engine_config(engine_args_class: Any) -> None:
    """Check the configuration, start the collector, and mark the compile cache's key.

    The compiled graph holds the hook, which vLLM's compile cache does not see.
    """
    create_engine_config = engine_args_class.create_engine_config
    if getattr(create_engine_config, _MARK, False):
        return

    @functools.wraps(create_engine_config)
    def create_and_check(self: Any, *args: Any, **kwargs: Any) -> Any:
        from moescope import __version__
        from moescope_service import runtime
        from moescope_service.capture.refusals import check_config

        self.additional_config = {**(self.additional_config or {}), "moescope": __version__}
        config = create_engine_config(self, *args, **kwargs)
        check_config(config)
        runtime.ensure_collector()
        return config

    setattr(create_and_check, _MARK, True)
    engine_args_class.create_engine_config = create_and_check
