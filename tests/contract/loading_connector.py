"""A KV connector that loads what a test says; it moves no data."""

from __future__ import annotations

import itertools
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, SupportsHMA
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from .fake_engine import SPEC


class LoadingConnector(KVConnectorBase_V1, SupportsHMA):
    """Loads each request's first tokens, once, or the blocks that it has kept."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.external: dict[str, tuple[int, bool]] = {}
        """(tokens, whether loading them takes steps), by request."""
        self.kept: set[bytes] = set()
        """vLLM's hashes of blocks that it has a copy of, as an offloading connector has."""

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        kept = itertools.takewhile(self.kept.__contains__, request.block_hashes)
        num_kept = min(len(list(kept)), (request.num_tokens - 1) // SPEC.block_size)
        num_tokens, is_async = self.external.get(
            request.request_id, (num_kept * SPEC.block_size, True)
        )
        num_more = max(0, num_tokens - num_computed_tokens)
        return num_more, is_async and num_more > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.external.pop(request.request_id, None)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        return False, None

    def start_load_kv(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("no model runs")

    wait_for_layer_load = save_kv_layer = wait_for_save = start_load_kv
