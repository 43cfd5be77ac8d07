"""vLLM's scheduler with a KV connector: rows that were computed here, and none in place of others.

What a row holds follows from the tokens before it, so that a row of a block's previous owner shows.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from moescope import Client, RouteTrace, Source
from moescope_service import bundled_model
from moescope_service.capture import loads
from moescope_service.capture.rows import Batch
from moescope_service.settings import ENABLE

from . import loading_connector
from .deployment import Deployment
from .fake_engine import SPEC

SIZE = SPEC.block_size
HASH = get_hash_fn_by_name("sha256")
OWNER = [*range(100, 127)]
"""A prompt that takes every block of a small cache: others find its rows there."""


def truth(tokens: list[int], start: int, count: int) -> tuple[Any, Any]:
    """The rows of positions from ``start`` on: (ids, weights)."""
    ends = range(start + 1, start + count + 1)
    values = np.array([zlib.crc32(bytes(tokens[:end])) for end in ends], np.int64)
    ids = values[:, None, None] >> np.arange(0, 24, 6).reshape(1, 2, 2)
    return (ids % 8).astype(np.uint8), (ids % 1021 / 1024).astype(np.float16)


class Serving:
    """Runs what vLLM's scheduler decides on; its steps go through the real recorder."""

    def __init__(self, config: VllmConfig, deployment: Deployment, num_blocks: int) -> None:
        spec = FullAttentionSpec(block_size=SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
        groups = [KVCacheGroupSpec(["layer"], spec)]
        config.cache_config.num_gpu_blocks = num_blocks
        self.scheduler: Any = Scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks, [], groups),
            structured_output_manager=StructuredOutputManager(config),
            block_size=SIZE,
        )
        self.deployment = deployment
        self.tokens: dict[str, list[int]] = {}

    def add(self, name: str, prompt: list[int], max_tokens: int = 1, load: Any = None) -> str:
        """Add a request; ``load`` is (tokens of the connector, whether it takes steps)."""
        (internal_id,) = self.deployment.frontend.add(name, prompt=prompt)
        if load:
            self.scheduler.connector.external[internal_id] = load
        self.tokens[name] = prompt.copy()
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        hasher = get_request_block_hasher(SIZE, HASH)
        request = Request(internal_id, prompt, sampling, None, block_hasher=hasher)
        self.scheduler.add_request(request)
        return internal_id

    def abort(self, internal_id: str) -> None:
        """End a request as a client does that leaves."""
        self.deployment.frontend.output_processor.abort_requests([internal_id], internal=True)
        self.scheduler.finish_requests([internal_id], RequestStatus.FINISHED_ABORTED)

    def step(self, loaded: Collection[str] = (), failed: tuple[str, int] | None = None) -> Any:
        """Run a step.

        Args:
            loaded: Sequences whose load has ended.
            failed: A sequence, and how many blocks of its load were left unfilled.
        """
        output = self.scheduler.schedule()
        invalid = set(self.blocks(failed[0])[2 - failed[1] : 2]) if failed else set()
        spans = self._spans(output)
        engine = self.deployment.engine
        engine.batch = Batch(
            [name for name, _, _ in spans],
            np.cumsum([0, *(count for _, _, count in spans)]).astype(np.int32),
            np.array([start for _, start, _ in spans], np.int32),
        )
        engine.recorder.start_step(output)
        sampled: list[list[int]] = []
        parts = []
        for name, start, count in spans:
            tokens = [*self.scheduler.requests[name].all_token_ids]
            parts.append((np.arange(start, start + count), *truth(tokens, start, count)))
            ends = start + count == len(tokens)
            sampled.append([zlib.crc32(bytes(tokens)) % 100] if ends else [])
        if parts:
            engine.sink.rows = tuple(np.concatenate(part) for part in zip(*parts, strict=True))
        engine.recorder.record_step(output)
        names = [name for name, _, _ in spans]
        result = ModelRunnerOutput(
            names,
            {name: number for number, name in enumerate(names)},
            sampled,
            kv_connector_output=KVConnectorOutput(
                finished_recving=set(loaded), invalid_block_ids=invalid
            ),
        )
        for outputs in self.scheduler.update_from_output(output, result).values():
            for one in outputs.outputs:
                self.tokens[one.request_id.rpartition("-")[0]] += one.new_token_ids
            self.deployment.frontend.output_processor.process_outputs(outputs.outputs)
        return output

    def _spans(self, output: Any) -> list[tuple[str, int, int]]:
        cached = output.scheduled_cached_reqs
        first = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        first |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        counts = output.num_scheduled_tokens
        return [(name, first[name], count) for name, count in counts.items()]

    def offload(self) -> None:
        """Let the connector keep a copy of every block that is full."""
        for request in self.scheduler.requests.values():
            num_full = request.num_computed_tokens // SIZE
            self.scheduler.connector.kept.update(request.block_hashes[:num_full])

    def run(self) -> None:
        """Step until nothing is left."""
        while self.scheduler.has_requests():
            self.step()

    def is_loading(self, internal_id: str) -> bool:
        """Whether a request's load has not ended."""
        request = self.scheduler.requests.get(internal_id)
        return request is not None and request.status == RequestStatus.WAITING_FOR_REMOTE_KVS

    def is_waiting(self, internal_id: str) -> bool:
        """Whether a request is there and has not run, or not since its load."""
        request = self.scheduler.requests.get(internal_id)
        return request is not None and request not in self.scheduler.running

    def blocks(self, internal_id: str) -> list[int]:
        return list(self.scheduler.kv_cache_manager.get_block_ids(internal_id)[0])

    def trace(self, client: Client, name: str) -> RouteTrace:
        """Return a request's trace; each row that is there is right."""
        (trace,) = client.routes(name, wait_s=10)
        ids, weights = truth(self.tokens[name], 0, trace.num_rows)
        np.testing.assert_array_equal(trace.topk_ids[trace.present], ids[trace.present])
        assert trace.topk_weights is not None
        np.testing.assert_array_equal(trace.topk_weights[trace.present], weights[trace.present])
        return trace


@pytest.fixture(scope="module")
def config() -> Iterator[VllmConfig]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(ENABLE, raising=False)
        patch.setattr(Scheduler, "__init__", Scheduler.__init__)
        loads.install(Scheduler)
        init_none_hash(HASH)
        transfer = KVTransferConfig(
            kv_connector="LoadingConnector",
            kv_connector_module_path=loading_connector.__name__,
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
        )
        yield EngineArgs(
            model=str(bundled_model.path()),
            max_model_len=64,
            max_num_seqs=4,
            max_num_batched_tokens=64,
            enforce_eager=True,
            kv_transfer_config=transfer,
        ).create_engine_config()


@pytest.fixture
def serving(config: VllmConfig, deployment: Deployment) -> Serving:
    """Of 8 blocks, one of which is vLLM's null block."""
    return Serving(config, deployment, 8)


def sources(trace: RouteTrace) -> str:
    """One letter a row: computed, hit, recalled, missing."""
    letters = {
        Source.COMPUTED: "c",
        Source.CACHED: "h",
        Source.RECALLED: "r",
        Source.MISSING: "-",
    }
    return "".join(letters[Source(one)] for one in trace.source.tolist())


@pytest.mark.parametrize("is_async", [False, True])
def test_what_is_loaded_is_missing_for_all_that_hit_it(
    is_async: bool, serving: Serving, client: Client
) -> None:
    serving.add(f"owner-{is_async}", OWNER)
    serving.run()  # its rows stand in the blocks that come next
    prompt = [*range(13)]
    loaded = serving.add(f"loaded-{is_async}", prompt, load=(8, is_async))
    serving.step()
    assert serving.is_waiting(loaded) == is_async
    serving.step(loaded=[loaded] if is_async else [])
    serving.run()
    serving.add(f"hit-{is_async}", prompt)
    serving.run()
    assert sources(serving.trace(client, f"owner-{is_async}")) == "c" * 27
    assert sources(serving.trace(client, f"loaded-{is_async}")) == "-" * 8 + "c" * 5
    assert sources(serving.trace(client, f"hit-{is_async}")) == "-" * 8 + "h" * 4 + "c"


@pytest.mark.parametrize("is_async", [False, True])
def test_what_left_the_cache_is_recalled(is_async: bool, serving: Serving, client: Client) -> None:
    prompt = [*range(30, 43)]
    serving.add(f"gone-{is_async}", prompt)
    serving.run()
    serving.add(f"took its place-{is_async}", OWNER)
    serving.run()
    # Half of the third block is loaded: vLLM has no hash of it yet.
    back = serving.add(f"back-{is_async}", prompt, load=(10, is_async))
    serving.step()
    serving.step(loaded=[back] if is_async else [])
    serving.run()
    serving.add(f"again-{is_async}", prompt)
    serving.run()
    assert sources(serving.trace(client, f"back-{is_async}")) == "r" * 8 + "--ccc"
    assert sources(serving.trace(client, f"again-{is_async}")) == "r" * 8 + "--hhc"


def test_hits_are_found_beside_what_is_loaded(serving: Serving, client: Client) -> None:
    serving.add("before", OWNER)
    serving.run()
    longer = serving.add("beside", [*OWNER[:12], *range(6)], load=(16, True))
    serving.step()
    serving.step(loaded=[longer])
    serving.run()
    assert sources(serving.trace(client, "beside")) == "h" * 12 + "-" * 4 + "cc"


def test_blocks_of_a_load_that_never_ran_have_nobodys_rows(
    serving: Serving, client: Client
) -> None:
    """It is starved after its load, and aborted; then others hit its blocks."""
    serving.add("first", OWNER)
    serving.run()
    prompt = [*range(9)]
    starved = serving.add("starved", prompt, load=(8, True))
    serving.step()
    blocks = serving.blocks(starved)
    other = serving.add("other", [50] * 17, max_tokens=9)  # five blocks
    serving.step(loaded=[starved])
    serving.step()  # its load is noticed, and there is no block for its last token
    assert serving.is_waiting(starved)
    serving.abort(starved)
    serving.abort(other)
    serving.add("after", prompt)
    (new,) = serving.step().scheduled_new_reqs
    assert (new.num_computed_tokens, new.block_ids[0][:2]) == (8, blocks)
    serving.run()
    assert sources(serving.trace(client, "starved")) == "-" * 8
    assert sources(serving.trace(client, "after")) == "-" * 8 + "c"


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(("num_failed", "left"), [(1, "----" + "c" * 7), (2, "c" * 11)])
def test_what_a_load_leaves_out_is_computed(
    is_async: bool, num_failed: int, left: str, serving: Serving, client: Client
) -> None:
    name = f"failed-{is_async}-{num_failed}"
    serving.add(f"owner of {name}", OWNER)
    serving.run()
    request = serving.add(name, [*range(11)], load=(8, is_async))
    if is_async:
        serving.step()
    serving.step([request] if is_async else [], failed=(request, num_failed))
    serving.run()
    assert sources(serving.trace(client, name)) == left


def run_at_random(serving: Serving, rng: random.Random, name: str) -> None:
    """Run two dozen requests with loads in some interleaving, some of which are aborted."""
    names = iter([f"{name}-{number}" for number in range(24)])
    known: list[str] = []
    loaded: set[str] = set()
    for _ in range(1000):
        if len(known) == 24 and not serving.scheduler.has_requests():
            return
        if rng.random() < 0.5 and (name := next(names, "")):
            prompt = [rng.randrange(2)] * rng.randint(4, 16) + [*range(rng.randrange(6))]
            load = rng.choice([None, (rng.randint(1, len(prompt) - 1), rng.random() < 0.7)])
            known.append(serving.add(name, prompt, rng.randint(1, 12), load))
        loading = [one for one in known if serving.is_loading(one) and one not in loaded]
        ending = [one for one in loading if rng.random() < 0.4]
        loaded.update(ending)
        serving.step(ending)
        one = rng.choice(known or [""])
        if rng.random() < 0.1 and one in serving.scheduler.requests and one not in loading:
            serving.abort(one)
    pytest.fail("the requests do not end")


def test_no_row_is_of_another_sequence(
    config: VllmConfig, deployment: Deployment, client: Client
) -> None:
    """In a cache that is too small."""
    found = ""
    for seed in range(20):
        serving = Serving(config, deployment, 14)
        run_at_random(serving, random.Random(seed), f"random-{seed}")
        found += "".join(sources(serving.trace(client, name)) for name in serving.tokens)
    assert min(found.count(source) for source in "chr-") > 50


def offload_at_random(serving: Serving, rng: random.Random, name: str) -> None:
    """Run requests that begin alike, beside a connector that keeps all that was computed."""
    texts = [rng.choices(range(100), k=40) for _ in range(5)]
    names = iter([f"{name}-{number}" for number in range(60)])
    known: list[str] = []
    loaded: set[str] = set()
    for _ in range(2000):
        if len(known) == 60 and not serving.scheduler.has_requests():
            return
        if rng.random() < 0.5 and (one := next(names, "")):
            prompt = rng.choice(texts)[: rng.randint(8, 40)] + rng.choices(range(100), k=4)
            known.append(serving.add(one, prompt, rng.randint(1, 12)))
        loading = {one for one in known if serving.is_loading(one)}
        ending = {one for one in sorted(loading - loaded) if rng.random() < 0.4}
        loaded = loaded & loading | ending  # one that is preempted may load again
        serving.step(ending)
        serving.offload()
    pytest.fail("the requests do not end")


@pytest.mark.parametrize("num_blocks", [20, 30, 40])
def test_no_row_is_missing_where_all_was_computed_here(
    num_blocks: int, config: VllmConfig, deployment: Deployment, client: Client
) -> None:
    """What a connector brings has left the cache, or stands in it behind a block that has."""
    found = ""
    for seed in range(5):
        serving = Serving(config, deployment, num_blocks)
        offload_at_random(serving, random.Random(seed), f"offloaded-{num_blocks}-{seed}")
        found += "".join(sources(serving.trace(client, name)) for name in serving.tokens)
    assert "-" not in found
    assert min(found.count(source) for source in "chr") > 100
