"""Counts how often the weights of a worker's model change.

vLLM hands RPCs and steps to the worker's thread from one ordered queue, and the wrappers here run
on that thread: the number right after a step is that of the weights that computed its rows, to the
step. It may even change within one, before the model runs: an adapter is loaded when it is needed.

Relies on vLLM 0.32.0: ``v1/worker/gpu_worker.py`` and ``cpu_worker.py`` (updates, sleep),
``v1/worker/gpu_model_runner.py`` and ``v1/worker/gpu/model_runner.py`` (``reload_weights``),
``v1/worker/lora_model_runner_mixin.py`` and ``lora/worker_manager.py`` (adapters). What another
version does not have is not wrapped. What writes into parameters by itself is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from moescope.version_runs import MIXED
from moescope_service.vllm_contract.patching import Function, followed_by, wrap_once


class WeightsVersion:
    """The number of one worker's weights: how often they have changed since its start.

    Calls within calls count once: ``update_weights`` calls the model's ``load_weights``. So do
    several ``load_weights`` without a step between them: they are parts of one update. After a
    call that failed halfway the weights are `MIXED`, until the next one that succeeds.
    """

    def __init__(self) -> None:
        self._number = 0
        self._on_change: Callable[[int], None] = lambda _: None
        self._update: Literal["model", "draft"] | None = None
        """Of what an update has started and not finished."""
        self._has_failed = False
        self._depth = 0
        self._num_loads = 0
        self._is_loading = False
        """Whether ``load_weights`` was counted since the last step."""
        self._is_lost = False
        """Whether a sleep has discarded the weights."""
        self._adapters: dict[str | int, tuple[str, int, str] | None] = {}
        """(name, id, path) of adapters that were loaded, by name and by id; None: removed."""

    def of_step(self) -> int:
        """Return the number of the weights that computed the step that just ran, or `MIXED`."""
        self._is_loading = False
        return MIXED if self._update == "model" or self._has_failed else self._number

    def follow(self, worker: Any, model: Any, on_change: Callable[[int], None]) -> None:
        """Count the changes from here on.

        Args:
            worker: A vLLM ``Worker`` that is ready to serve.
            model: Its model.
            on_change: Is told each new number, on the worker's thread, between two steps or within
                one, before the model runs.
        """
        self._on_change = on_change
        runner = worker.model_runner
        _wrap(worker, "start_weight_update", followed_by(self._start))
        _wrap(worker, "start_draft_weight_update", followed_by(self._start_draft))
        _wrap(worker, "finish_weight_update", self._finishing)
        _wrap(worker, "update_weights", self._updating)
        _wrap(worker, "reload_weights", self._changing)
        _wrap(runner, "reload_weights", self._changing)
        _wrap(model, "load_weights", self._loading)
        _wrap(worker, "sleep", followed_by(self._sleep))
        _wrap(worker, "discard", followed_by(self._discard))
        _wrap(worker, "wake_up", followed_by(self._wake_up))
        _wrap(worker, "add_lora", self._adding_lora)
        _wrap(worker, "remove_lora", followed_by(self._remove_lora))
        _wrap(getattr(runner, "lora_manager", None), "_load_adapter", followed_by(self._load_lora))

    def _count(self) -> None:
        self._number += 1
        self._is_loading = False
        self._on_change(self._number)

    def _start(self, *_: Any, **__: Any) -> None:
        self._update = "model"

    def _start_draft(self, *_: Any, **__: Any) -> None:
        self._update = "draft"  # the weights that draft tokens are from route no row that is kept

    def _finishing(self, finish: Function) -> Function:
        def finish_and_count(*args: Any, **kwargs: Any) -> Any:
            result = finish(*args, **kwargs)
            is_model, self._update = self._update != "draft", None
            if is_model:
                self._has_failed = False
                self._count()
            return result

        return finish_and_count

    def _updating(self, update: Function) -> Function:
        change = self._changing(update, may_refuse=True)  # as vLLM does, outside of an update

        def update_and_count(*args: Any, **kwargs: Any) -> Any:
            if self._update is None:
                return change(*args, **kwargs)
            try:
                return update(*args, **kwargs)
            except BaseException:  # for vLLM the update has ended
                self._has_failed |= self._update == "model"
                self._update = None
                raise

        return update_and_count

    def _loading(self, load: Function) -> Function:
        change = self._changing(load, is_part=True)

        def load_and_count(*args: Any, **kwargs: Any) -> Any:
            self._num_loads += 1
            return change(*args, **kwargs)

        return load_and_count

    def _changing(
        self, function: Function, *, may_refuse: bool = False, is_part: bool = False
    ) -> Function:
        """Return what calls a function that replaces weights, and counts.

        Args:
            function: The function.
            may_refuse: Whether one that fails has replaced nothing unless it called
                ``load_weights``.
            is_part: Whether the next call without a step between them belongs to the same change.
        """

        def change_and_count(*args: Any, **kwargs: Any) -> Any:
            num_loads = self._num_loads
            self._depth += 1
            try:
                result = function(*args, **kwargs)
            except BaseException:
                self._has_failed |= not may_refuse or self._num_loads > num_loads
                raise
            finally:
                self._depth -= 1
            if self._depth == 0 and self._update != "model":
                if not (is_part and self._is_loading and not self._has_failed):
                    self._count()
                self._is_loading, self._has_failed = is_part, False
            return result

        return change_and_count

    def _sleep(self, level: int = 1) -> None:
        self._is_lost |= level >= 2

    def _discard(self, tags: tuple[str, ...]) -> None:
        self._is_lost |= "weights" in tags

    def _wake_up(self, tags: list[str] | None = None) -> None:
        if self._is_lost and (tags is None or "weights" in tags):
            self._is_lost = False
            self._count()

    def _adding_lora(self, add_lora: Function) -> Function:
        def add_and_count(lora_request: Any) -> Any:
            is_known, number = lora_request.lora_name in self._adapters, self._number
            result = add_lora(lora_request)
            is_reload = is_known and getattr(lora_request, "load_inplace", False)
            if is_reload and self._number == number:
                self._count()
            return result

        return add_and_count

    def _remove_lora(self, lora_id: int) -> None:
        if (removed := self._adapters.get(lora_id)) is not None:
            self._adapters |= dict.fromkeys(removed[:2])

    def _load_lora(self, lora_request: Any) -> None:
        # Also one that had made room for others, and is as before.
        name, number = lora_request.lora_name, lora_request.lora_int_id
        loaded = name, number, lora_request.lora_path
        if any(self._adapters.get(key, loaded) != loaded for key in (name, number)):
            self._count()
        self._adapters |= dict.fromkeys((name, number), loaded)


def _wrap(owner: Any, name: str, make_wrapper: Callable[[Function], Function]) -> None:
    if getattr(owner, name, None) is not None:
        wrap_once(owner, name, make_wrapper)
