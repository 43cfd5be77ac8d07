"""The label of the weights: vLLM's own, set and read here, and told of each output token."""

from __future__ import annotations

import io

import orjson
import pyarrow as pa
import pytest
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.output_processor import RequestState

from moescope import Client, arrow, formats
from moescope.errors import ServerError
from moescope_service.api.weights import MAX_LABEL_CHARS

from .deployment import Deployment
from .fake_engine import OUTPUT

ADMIN = {"Authorization": "Bearer boss"}
SPANS = [
    {"version": "default", "start": 0, "end": 1},
    {"version": "step-1", "start": 1, "end": 3},
]


class LabeledEngine:
    """vLLM's two calls; `AsyncLLM` has them."""

    def __init__(self):
        self.label = "default"

    async def get_weight_version(self):
        return self.label

    async def update_weight_version(self, new_version):
        self.label = new_version


@pytest.fixture(scope="module")
def deployment():
    with Deployment(admin_key="boss").running() as deployment:
        yield deployment


@pytest.fixture
def engine(deployment):
    state, engine = deployment.app.state, LabeledEngine()
    without, state.moescope_engine = state.moescope_engine, engine
    yield engine
    state.moescope_engine = without


has_labels = pytest.mark.skipif(
    not hasattr(RequestState, "_weight_version_spans"), reason="labels came with vLLM 0.32"
)


def generate(deployment, name, labels):
    """Let vLLM's output processor hand out three tokens, each sampled under a label."""
    (internal,) = deployment.frontend.add(name)
    running = deployment.engine.start(internal)
    for number, (token, label) in enumerate(zip(OUTPUT, labels, strict=True)):
        if number:
            deployment.engine.step([(running, 1)])
        reason = FinishReason.STOP if number == len(OUTPUT) - 1 else None
        output = EngineCoreOutput(internal, [token], finish_reason=reason)
        deployment.frontend.output_processor.process_outputs([output], weight_version=label)
    deployment.engine.step(finished=[running])


def test_is_that_of_the_engine(deployment, engine):
    with Client(deployment.url, api_key="boss") as client:
        assert client.weights_label() == "default"
        assert client.label_weights("step-1") == engine.label == client.weights_label() == "step-1"


@pytest.mark.parametrize("label", ["", "x" * (MAX_LABEL_CHARS + 1), 7, None, ["a"]])
def test_that_cannot_be_is_refused(deployment, engine, label):
    answer = deployment.http.post("/routes/weights", json={"version": label}, headers=ADMIN)
    assert answer.status_code == 422
    assert "version" in answer.json()["error"]["message"]
    assert engine.label == "default"


def test_is_the_admins_to_set(deployment, engine):
    answer = deployment.http.post("/routes/weights", json={"version": "mine"})
    assert answer.status_code == 403
    assert "--routes-admin-key" in answer.json()["error"]["message"]
    assert engine.label == "default"
    assert deployment.http.get("/routes/weights").json() == {"version": "default"}


def test_of_a_vllm_without_labels_is_said_to_be_missing(deployment):
    with Client(deployment.url, api_key="boss") as client:
        for ask in (client.weights_label, lambda: client.label_weights("a")):
            with pytest.raises(ServerError, match=r"0\.32.*501"):
                ask()


@has_labels
def test_every_format_has_the_spans(deployment):
    generate(deployment, "labeled", ["default", "step-1", "step-1"])
    with Client(deployment.url) as client:
        (trace,) = client.routes("labeled")
        (page,) = client.routes("labeled", start=6)
        batch = client.routes_batch(["labeled"]).traces["labeled"]
    assert trace.weight_labels == page.weight_labels == batch[0].weight_labels == SPANS

    def body(form):
        return deployment.http.get("/routes/labeled", params={"format": form}).content

    (values,) = orjson.loads(body("json"))["traces"]
    assert formats.from_dict(values).weight_labels == SPANS
    assert formats.load_npz(body("npz"))[0].weight_labels == SPANS
    table = pa.ipc.open_stream(body("arrow")).read_all()
    assert arrow.from_table(table)[0].weight_labels == SPANS
    parquet = pa.parquet.read_table(io.BytesIO(body("parquet")))
    assert arrow.from_table(parquet)[0].weight_labels == SPANS


@has_labels
def test_unlabeled_weights_have_no_spans(deployment):
    generate(deployment, "unlabeled", ["default"] * 3)
    with Client(deployment.url) as client:
        assert client.routes("unlabeled")[0].weight_labels == []


def test_without_labels_there_are_no_spans(deployment):
    deployment.complete("older")
    with Client(deployment.url, api_key="secret") as client:
        assert client.routes("cmpl-older")[0].weight_labels == []


@has_labels
def test_a_label_of_any_length_takes_bounded_memory(deployment):
    generate(deployment, "long", ["x" * 100_000] * 3)
    with Client(deployment.url) as client:
        ((span,),) = (one.weight_labels for one in client.routes("long"))
    assert len(span["version"]) <= 512
