"""The page in headless Chromium, around a deployment without a model."""

from __future__ import annotations

import httpx
import numpy as np
import orjson
import pytest
from vllm.v1.engine import FinishReason

from moescope_service.api import routes
from tests.contract.fake_engine import OUTPUT, PROMPT, SPEC
from tests.waiting import wait_until

HOSTILE = [
    "<script>document.title = 'x'</script>", "\"'`&amp;", "שלום", "👩\u200d👩\u200d👧",
    "<img src=x onerror=alert(1)>", "a\nb", "</span>", "\u202eleft",
]  # fmt: skip
NUM_TOKENS = len(PROMPT) + len(OUTPUT)


def serve(deployment, name, **body):
    """Run a request and wait for its trace."""
    answer = deployment.complete(name, **body)
    request_id = answer.json()["id"]

    def ended():
        found = httpx.get(f"{deployment.url}/routes/{request_id}", headers=KEY)
        return found.status_code == 200 and found.json()["traces"]

    return request_id, wait_until(ended, "it ends")[0]


KEY = {"Authorization": "Bearer secret"}


def text(page, selector):
    return page.js(f"document.querySelector({selector!r}).textContent")


def data(page, selector):
    """The data attributes of all elements that a selector finds."""
    return page.js(
        f"[...document.querySelectorAll({selector!r})].map((one) => ({{...one.dataset}}))"
    )


def test_the_heatmap_shows_what_was_counted_and_changes(page, deployment):
    serve(deployment, "heat-1")
    page.open(f"{deployment.url}/moescope")
    page.wait("document.querySelector('#heatmap').dataset.total > 0")
    page.js("document.querySelector('#heatmap canvas').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.press(key)
    figure = "document.querySelector('#heatmap').dataset"
    assert page.js(f"[{figure}.layer, {figure}.expert]") == ["3", "1"]

    def counted():
        counts = deployment.http.get("/experts?window_s=60").json()["counts"]
        return counts[1][1]

    page.wait(f"{figure}.count == {counted()}")
    before = counted()
    serve(deployment, "heat-2")
    assert counted() > before
    page.wait(f"{figure}.count == {counted()}")
    assert f"expert 1: {counted()} selections" in text(page, "#heatmap .told")
    assert "2 layers of 8 experts" in text(page, "#heatmap figcaption")


def test_short_windows_are_summed_from_the_stream(page, deployment):
    page.open(f"{deployment.url}/moescope")
    page.type("#window", "10", "change")
    page.wait("document.querySelector('#covered').dataset.source === 'stream'")
    _, trace = serve(deployment, "streamed")
    selections = np.size(trace["topk_ids"])
    page.wait(f"document.querySelector('#heatmap').dataset.total == {selections}")
    page.type("#phase", "decode", "change")
    decode = (len(OUTPUT) - 1) * len(SPEC.layers) * SPEC.top_k
    page.wait(f"document.querySelector('#heatmap').dataset.total == {decode}")
    page.wait("document.querySelector('#heatmap').dataset.total == 0")  # the window has gone on
    assert page.js("document.querySelector('#covered').dataset.source") == "stream"


def test_the_balance_of_each_layer_is_that_of_experts(page, deployment):
    serve(deployment, "balanced")
    page.open(f"{deployment.url}/moescope")
    page.type("#window", "", "change")
    told = deployment.http.get("/experts").json()
    page.wait(f"document.querySelector('#heatmap').dataset.total == {np.sum(told['counts'])}")
    for name, key in (("entropy", "normalized_entropy"), ("maxViolation", "max_violation"),
                      ("active", "active_experts")):  # fmt: skip
        shown = data(page, f".bar-rows[data-name={name}] div")
        assert [float(one["value"]) for one in shown] == pytest.approx(told[key], abs=1e-4), name


@pytest.mark.parametrize("layer_at", [0, 1])
def test_tokens_carry_the_experts_of_their_trace(page, deployment, layer_at):
    one_id, trace = serve(deployment, f"opened-{layer_at}")
    listed = deployment.http.get("/routes").json()["sequences"]
    request_id = next(one["request_id"] for one in listed if one_id in one["ids"])
    page.open(f"{deployment.url}/moescope#requests")
    page.wait(f"document.querySelector('a[data-request=\"{request_id}\"]') !== null")
    page.js(f"document.querySelector('a[data-request=\"{request_id}\"]').click()")
    page.wait(f"document.querySelectorAll('#request .token').length === {NUM_TOKENS}")
    page.type("#request [name=layer]", str(layer_at), "change")
    tokens = data(page, "#request .token")
    for position, token in enumerate(tokens[:-1]):
        ids, weights = (
            trace["topk_ids"][position][layer_at],
            trace["topk_weights"][position][layer_at],
        )
        top = int(np.argmax(weights))
        assert (int(token["expert"]), float(token["weight"])) == (ids[top], weights[top])
        assert token["source"] == trace["source"][position]
    assert tokens[-1] == {"position": str(NUM_TOKENS - 1), "source": "unrouted"}
    page.js("document.querySelectorAll('#request .token')[3].focus()")
    shown = data(page, "#request .detail .expert")
    assert sorted(int(one["expert"]) for one in shown) == sorted(np.ravel(trace["topk_ids"][3]))


def hole(deployment, name):
    """Run a request whose row behind the prompt is missing."""
    (internal_id,) = deployment.frontend.add(name)
    running = deployment.engine.start(internal_id)
    deployment.engine.step([(running, 1)], hooked=False)
    deployment.engine.step([(running, 1)])
    deployment.frontend.put(internal_id, OUTPUT, FinishReason.STOP)
    deployment.engine.step(finished=[running])


def test_missing_rows_look_so(page, deployment):
    hole(deployment, "holes")
    page.open(f"{deployment.url}/moescope#request/holes")
    page.wait("document.querySelectorAll('#request .token').length")
    (missing,) = data(page, "#request .token[data-source=missing]")
    assert missing == {"position": str(len(PROMPT)), "source": "missing"}
    style = "getComputedStyle(document.querySelector('.token[data-source=missing]'))"
    assert page.js(f"[{style}.borderStyle, {style}.backgroundImage.slice(0, 9)]") == [
        "dashed", "repeating",
    ]  # fmt: skip


def test_text_of_a_prompt_is_shown_as_itself(page, deployment, monkeypatch):
    """A deployment without a model has no tokenizer: the strings are put into its answer here."""
    request_id, _ = serve(deployment, "hostile")
    strings = HOSTILE[:NUM_TOKENS]
    monkeypatch.setattr(routes, "compressed", with_strings(routes.compressed, strings))
    page.open(f"{deployment.url}/moescope#request/{request_id}")
    page.wait(f"document.querySelectorAll('#request .token').length === {NUM_TOKENS}")
    shown = page.js(
        "[...document.querySelectorAll('#request .token bdi')].map((one) => one.textContent)"
    )
    assert shown == [one.replace("\n", "⏎").replace(" ", "␣") for one in strings]
    assert page.js("document.title") == "moescope"
    assert page.js("document.querySelectorAll('#request img, #request script').length") == 0


def with_strings(compressed, strings):
    def added(content, form, **kwargs):
        values = orjson.loads(content)
        for trace in values["traces"]:
            trace["tokens"] = strings
        return compressed(orjson.dumps(values), form, **kwargs)

    return added


def test_two_requests_side_by_side(page, deployment):
    one, first = serve(deployment, "left")
    two, second = serve(deployment, "right")
    page.open(f"{deployment.url}/moescope#compare/{one}/{two}")
    page.wait("document.querySelectorAll('#compare .pair').length")
    pairs = data(page, "#compare .pair")
    assert len(pairs) == NUM_TOKENS
    for pair, a, b in zip(pairs, first["topk_ids"], second["topk_ids"], strict=False):
        assert float(pair["shared"]) == len({*a[0]} & {*b[0]}) / SPEC.top_k
    assert {pair["sameToken"] for pair in pairs} == {"true"}
    assert data(page, "#compare .facts") == [{"tokens": "0", "experts": "0"}]


def test_two_requests_that_differ(page, deployment, monkeypatch):
    one, _ = serve(deployment, "this")
    monkeypatch.setattr(
        deployment.engine, "rows_of",
        lambda start, count, rows=deployment.engine.rows_of: rows(start + 1, count),
    )  # fmt: skip
    two, _ = serve(deployment, "that")
    page.open(f"{deployment.url}/moescope")
    page.js("location.hash = '#compare'")
    page.type("#compare [name=first]", one, "change")
    page.type("#compare [name=second]", two)
    page.wait("document.querySelectorAll('#compare .pair').length")
    rows = NUM_TOKENS - 1
    assert data(page, "#compare .facts") == [{"tokens": "0", "experts": str(rows)}]
    marks = page.js(
        "[...document.querySelectorAll('#compare .differs')].map((one) => one.textContent)"
    )
    assert marks == ["≠"] * rows + [""]


@pytest.mark.parametrize(
    "view",
    [
        "live",
        "expert",
        "requests",
        "request/phone",
        "request/phone/phone",
        "compare/phone/phone",
        "state",
    ],
)
def test_a_phone_needs_no_sideways_scroll(page, deployment, view):
    if httpx.get(f"{deployment.url}/routes/cmpl-phone").status_code == 404:
        serve(deployment, "phone")
    page.look(360, 740, "dark")
    page.open(f"{deployment.url}/moescope#{view.replace('phone', 'cmpl-phone')}")
    page.wait("document.querySelector('#status').dataset.state !== 'starting'")
    assert page.js("document.documentElement.scrollWidth") <= 360


def test_the_state_is_that_of_info(page, deployment):
    page.open(f"{deployment.url}/moescope#state")
    page.wait("document.querySelectorAll('#state article').length")
    info = deployment.http.get("/moescope/info").json()
    assert text(page, '#state dd[data-name="Name"]') == info["model"]
    assert text(page, '#state dd[data-name="Capture"]') == "on"
    assert text(page, '#state dd[data-name="State"]') == "off"
