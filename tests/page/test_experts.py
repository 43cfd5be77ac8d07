"""What leads from an expert to its tokens and requests, and what follows those that end."""

from __future__ import annotations

import httpx
import pytest
from vllm.v1.engine import FinishReason

from tests.contract.fake_engine import OUTPUT, PROMPT, SPEC

from .test_views import NUM_TOKENS, data, hole, serve, text

FACTS = "document.querySelector('#expert .facts').dataset"


def shown(page):
    """(token, count, total) of each line of the list."""
    return [
        (int(one["token"]), int(one["count"]), int(one["total"]))
        for one in data(page, "#expert tbody tr")
    ]


def told(deployment, layer, expert):
    answer = deployment.http.get(f"/experts/{layer}/{expert}/tokens?limit=100").json()
    return [(one["token_id"], one["count"], one["total"]) for one in answer["tokens"]]


def point_at(page, layer_at, expert, kind):
    """Click or tap the middle of a cell of the heatmap."""
    box = page.js(
        "(({left, top, width, height}) => ({left, top, width, height}))"
        "(document.querySelector('#heatmap canvas').getBoundingClientRect())"
    )
    x = box["left"] + box["width"] * (expert + 0.5) / SPEC.num_experts
    y = box["top"] + box["height"] * (layer_at + 0.5) / len(SPEC.layers)
    if kind == "tap":
        page.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        page.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        return
    for event in ("mousePressed", "mouseReleased"):
        page.call(
            "Input.dispatchMouseEvent", type=event, x=x, y=y, button="left", clickCount=1
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["click", "tap", "Enter"])
def test_a_chosen_expert_shows_its_tokens(page, deployment, kind):
    serve(deployment, f"chosen-{kind}")
    if kind == "tap":
        page.call("Emulation.setTouchEmulationEnabled", enabled=True)
    page.open(f"{deployment.url}/moescope")
    page.wait("document.querySelector('#heatmap').dataset.total > 0")
    if kind == "Enter":
        page.js("document.querySelector('#heatmap canvas').focus()")
        for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Enter"):
            page.press(key)
    else:
        point_at(page, 1, 1, kind)
    page.wait("location.hash === '#expert/3/1'")
    page.wait(f"{FACTS}.expert === '1'")
    assert shown(page) == told(deployment, 3, 1)
    answer = deployment.http.get("/experts/3/1/tokens").json()
    figures = page.js(f"({FACTS}.rows + ' ' + {FACTS}.selected + ' ' + {FACTS}.requests)")
    assert figures == f"{answer['rows']} {answer['rows_selected']} {answer['requests']}"


def test_another_expert_is_asked_for_in_the_view(page, deployment):
    serve(deployment, "another")
    page.open(f"{deployment.url}/moescope#expert")
    page.wait(f"{FACTS}.expert === '0'")
    page.type("#expert [name=expert]", "5")
    page.wait(f"{FACTS}.expert === '5'")
    page.type("#expert [name=layer]", "3", "change")
    page.wait(f"{FACTS}.layer === '3'")
    assert page.js("location.hash") == "#expert/3/5"
    assert shown(page) == told(deployment, 3, 5)
    before = shown(page)
    serve(deployment, "another-one")
    page.js("document.querySelector('#expert form').requestSubmit()")
    page.wait(f"{FACTS}.rows == {deployment.http.get('/experts/3/5/tokens').json()['rows']}")
    assert shown(page) == told(deployment, 3, 5) != before


def test_a_token_leads_to_the_place_in_a_request_that_has_it(page, deployment):
    serve(deployment, "place", n=2)
    page.open(f"{deployment.url}/moescope#expert/3/5")
    page.wait("document.querySelectorAll('#expert tbody a').length")
    (first, *_) = deployment.http.get("/experts/3/5/tokens").json()["tokens"]
    page.js("document.querySelector('#expert tbody a').click()")
    chosen = "document.querySelector('#request .token[tabindex=\"0\"]')"
    page.wait(f"{chosen}?.dataset.position === '{first['position']}'")
    assert page.js("document.querySelector('#request [name=layer]').value") == "1"
    traces = httpx.get(f"{deployment.url}/routes/{first['request_id']}").json()["traces"]
    assert page.js("document.querySelector('#request [name=choice]').value") == str(
        [one["index"] for one in traces].index(first["index"])
    )
    row = data(page, "#request .detail tr.chosen .expert")
    assert "5" in {one["expert"] for one in row}


def test_an_address_leads_beyond_the_first_page_of_a_request(page, deployment):
    prompt = [*range(1300)]
    (name,) = deployment.frontend.add("long", prompt=prompt)
    running = deployment.engine.start(name, prompt)
    deployment.frontend.put(name, OUTPUT, FinishReason.STOP)
    deployment.engine.step(finished=[running])
    page.open(f"{deployment.url}/moescope#request/long?layer=3&position=1200")
    page.wait("document.activeElement.dataset.position === '1200'")
    assert page.js("document.querySelector('#request [name=layer]').value") == "1"
    assert "Token 1200, 1200, computed. Layer 3" in text(page, "#request .told")
    assert len(data(page, "#request .token")) == 1300 + len(OUTPUT)


def test_an_expert_of_a_request_leads_to_its_tokens(page, deployment):
    request_id, _ = serve(deployment, "leads")
    page.open(f"{deployment.url}/moescope#request/{request_id}")
    page.wait("document.querySelectorAll('#request .detail .expert').length")
    expert = data(page, "#request .detail tr[data-layer='3'] .expert")[0]["expert"]
    page.js("document.querySelector(\"#request .detail tr[data-layer='3'] .expert\").click()")
    page.wait(f"location.hash === '#expert/3/{expert}' && {FACTS}.expert === '{expert}'")


def test_an_expert_that_is_not_there_is_said_to_be_none(page, deployment):
    page.open(f"{deployment.url}/moescope#expert/3/99")
    page.wait("!document.querySelector('#problem').hidden")
    assert "expected 0 to 7" in text(page, "#problem")
    page.problems[:] = [one for one in page.problems if "status of 422" not in one]


def test_requests_are_listed_as_they_end(page, deployment):
    serve(deployment, "old")
    page.open(f"{deployment.url}/moescope#requests")
    page.wait("document.querySelectorAll('#requests tbody tr').length")
    page.wait("document.querySelector('#status').dataset.state === 'ok'")
    page.js("window.lists = 0; window.fetch = ((plain) => (...of) => {"
            "  if (String(of[0]).includes('limit=50')) window.lists += 1;"
            "  return plain(...of); })(window.fetch);")  # fmt: skip
    before = len(data(page, "#requests tbody tr"))
    for name in ("new-1", "new-2"):
        serve(deployment, name)
        first = "document.querySelector('#requests tbody tr').dataset.request"
        page.wait(f"{first} === 'cmpl-{name}'")
    rows = data(page, "#requests tbody tr")
    assert len(rows) == min(50, before + 2)
    assert [one["request"] for one in rows[:2]] == ["cmpl-new-2", "cmpl-new-1"]
    assert page.js("window.lists") <= 1, "what is shown came from the stream"


def test_tokens_are_colored_by_agreement_with_a_second_request(page, deployment, monkeypatch):
    one, first = serve(deployment, "mine")
    plain = deployment.engine.rows_of

    def shifted(start, count):
        """Behind the prompt the experts after those: one of two is the same."""
        ids, weights = plain(start, count)
        return (ids + (start > 0)) % SPEC.num_experts, weights

    monkeypatch.setattr(deployment.engine, "rows_of", shifted)
    two, second = serve(deployment, "theirs")
    page.open(f"{deployment.url}/moescope#request/{one}")
    page.wait("document.querySelectorAll('#request .token').length")
    assert "agreement" not in data(page, "#request .token")[0]
    page.type("#request [name=second]", two)
    page.wait("document.querySelector('#request .token').dataset.agreement !== undefined")
    assert page.js("document.querySelector('#request [name=mode]').value") == "agreement"
    for layer_at in (0, 1):
        page.type("#request [name=layer]", str(layer_at), "change")
        tokens = data(page, "#request .token")
        shares = [
            len({*a[layer_at]} & {*b[layer_at]}) / len({*a[layer_at]} | {*b[layer_at]})
            for a, b in zip(first["topk_ids"], second["topk_ids"], strict=True)
        ]
        assert [float(one["agreement"]) for one in tokens[:-1]] == pytest.approx(shares)
        assert {*shares} == {1, 1 / 3}
        assert tokens[-1]["agreement"] == "NaN"
    page.type("#request [name=second]", "")
    page.wait("document.querySelector('#request .token').dataset.agreement === undefined")
    assert page.js("document.querySelector('#request [name=mode]').value") == "expert"


def test_the_strip_marks_runs_of_rows_by_their_source(page, deployment):
    hole(deployment, "marked")
    page.open(f"{deployment.url}/moescope#request/marked")
    page.wait("document.querySelectorAll('#request .token').length")
    first = len(PROMPT)
    assert data(page, "#request .strip-marks i") == [
        {"source": "missing", "first": str(first), "next": str(first + 1)}
    ]
    left = page.js("parseFloat(document.querySelector('#request .strip-marks i').style.left)")
    assert left == pytest.approx(100 * first / (NUM_TOKENS - 1), abs=1e-3)
