"""The file of ``moescope view``, opened from the disk: no server, no request at all."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from moescope import analysis, formats
from moescope.cli import main
from moescope.trace import RouteTrace, Source
from tests.waiting import wait_until

from .test_views import HOSTILE, data, text

LAYERS, NUM_EXPERTS, TOP_K, NUM_ROWS, PROMPT_LEN = [1, 3, 4], 12, 2, 30, 9
NAMES = [f"cmpl-{number}" for number in range(3)]
MISSING, CACHED, RECALLED = 4, 0, 20


def make_trace(number: int, dtype: type = np.float32) -> RouteTrace:
    """A trace with text that is hostile in its first tokens, and every kind of row."""
    random = np.random.default_rng(number)
    source = np.zeros(NUM_ROWS, np.uint8)
    source[[MISSING, CACHED, RECALLED]] = Source.MISSING, Source.CACHED, Source.RECALLED
    favor = random.random((NUM_ROWS, len(LAYERS), NUM_EXPERTS)) + np.arange(NUM_EXPERTS) / 9
    return RouteTrace(
        request_id=NAMES[number],
        index=0,
        model="<b>tiny</b>",
        num_experts=NUM_EXPERTS,
        num_hidden_layers=5,
        layers=np.array(LAYERS, np.int32),
        topk_ids=np.argsort(-favor, axis=2)[:, :, :TOP_K].astype(np.uint8),
        topk_weights=random.random((NUM_ROWS, len(LAYERS), TOP_K)).astype(dtype),
        source=source,
        token_ids=random.integers(0, 99, NUM_ROWS + 1, np.int32),
        tokens=[*HOSTILE, *(f" {place}" for place in range(NUM_ROWS + 1 - len(HOSTILE)))],
        prompt_len=PROMPT_LEN,
        num_tokens=NUM_ROWS + 1,
        cached_len=1,
        finish_reason="stop",
        complete=False,
        created_s=1.79e9 + number,
    )


TRACES = [make_trace(number) for number in range(3)]


def write(folder, traces, *options):
    """Return the address of a page of traces."""
    (folder / "traces.npz").write_bytes(formats.dump_npz(traces))
    return view(folder, folder / "traces.npz", *options)


def view(folder, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["view", *map(str, arguments), "-o", str(folder / "page.html")])
    assert ended.value.code == 0
    return (folder / "page.html").as_uri()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a page of three requests."""
    return write(tmp_path_factory.mktemp("file"), TRACES)


@pytest.fixture
def page(page):
    """A tab that asks for nothing but the file."""
    yield page
    assert page.hosts == {""}
    assert page.js("performance.getEntriesByType('resource').map((one) => one.name)") == []
    page.hosts.clear()


@pytest.fixture
def opened(page, address):
    """A tab with the page of three requests."""
    page.open(address)
    page.wait("document.querySelector('#status').dataset.state === 'ok'")
    return page


def rows_of(phase):
    """The rows of a phase that are not missing, ``[num_rows, num_layers, top_k]``."""
    positions = np.arange(NUM_ROWS)
    chosen = {"all": positions >= 0, "prefill": positions < PROMPT_LEN}
    chosen["decode"] = ~chosen["prefill"]
    return np.concatenate([one.topk_ids[one.present & chosen[phase]] for one in TRACES])


@pytest.mark.parametrize("phase", ["all", "prefill", "decode"])
def test_the_heatmap_and_the_balance_are_those_of_the_traces(opened, phase):
    opened.type("#phase", phase, "change")
    rows = rows_of(phase)
    opened.wait(f"document.querySelector('#heatmap').dataset.total == {rows.size}")
    assert text(opened, "#covered") == f"{len(rows)} tokens"
    counts = np.array([np.bincount(rows[:, at].ravel(), minlength=NUM_EXPERTS) for at in range(3)])
    for name, expected in (
        ("entropy", analysis.normalized_entropy(counts)),
        ("maxViolation", analysis.max_violation(counts)),
        ("active", (counts > 0).sum(axis=1)),
    ):
        shown = data(opened, f".bar-rows[data-name={name}] div")
        assert [int(one["layer"]) for one in shown] == LAYERS
        values = [float(one["value"]) for one in shown]
        assert values == pytest.approx(expected.tolist(), abs=1e-4), name
    opened.js("document.querySelector('#heatmap canvas').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        opened.press(key)
    (figure,) = data(opened, "#heatmap")
    assert (figure["layer"], figure["expert"]) == ("3", "1")
    assert int(figure["count"]) == counts[1, 1]


def test_what_needs_a_server_is_not_there(opened):
    assert opened.js("document.querySelectorAll('[data-needs=server]').length") == 0
    tabs = "[...document.querySelectorAll('nav a')].map((one) => one.textContent)"
    assert opened.js(tabs) == ["Experts", "Expert", "Requests", "Request", "Compare"]
    assert opened.js("document.querySelector('#key, #window, #state')") is None
    assert text(opened, "#status") == "3 saved requests"
    assert text(opened, "#model") == "<b>tiny</b>: 3 layers, 12 experts, top-2"
    opened.js("location.hash = '#state'")
    opened.wait("!document.querySelector('#live').hidden")


def test_requests_are_listed_and_found(opened):
    opened.js("location.hash = '#requests'")
    opened.wait("document.querySelectorAll('#requests tbody tr').length === 3")
    assert [one["request"] for one in data(opened, "#requests tbody tr")] == NAMES
    assert text(opened, "#requests-note") == "3 saved requests."
    cells = opened.js(
        "[...document.querySelectorAll('#requests tbody tr:first-child td')]"
        ".map((one) => one.textContent)"
    )
    assert cells[2:5] == ["9 + 22", "stop", "96.7%"]
    opened.type("#search-id", NAMES[1])
    opened.wait("document.querySelectorAll('#request .token').length")
    assert text(opened, "#request .facts strong") == NAMES[1]
    opened.js("location.hash = '#request/nothing'")
    opened.wait("!document.querySelector('#problem').hidden")
    assert text(opened, "#problem") == "This file does not have the request nothing."


@pytest.mark.parametrize("layer_at", [0, 2])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_tokens_carry_the_experts_and_weights_of_their_trace(page, tmp_path, layer_at, dtype):
    trace = make_trace(2, dtype)
    page.open(f"{write(tmp_path, [trace])}#request/{trace.request_id}")
    page.wait(f"document.querySelectorAll('#request .token').length === {NUM_ROWS + 1}")
    page.type("#request [name=layer]", str(layer_at), "change")
    tokens = data(page, "#request .token")
    assert tokens[-1] == {"position": str(NUM_ROWS), "source": "unrouted"}
    for row, token in enumerate(tokens[:-1]):
        assert token["source"] == Source(trace.source[row]).name.lower()
        if row == MISSING:
            assert "expert" not in token
            continue
        top = int(np.argmax(trace.topk_weights[row, layer_at]))
        assert int(token["expert"]) == trace.topk_ids[row, layer_at, top]
        assert float(token["weight"]) == float(trace.topk_weights[row, layer_at, top])
    page.js("document.querySelectorAll('#request .token')[7].focus()")
    shown = data(page, "#request .detail .expert")
    assert sorted(int(one["expert"]) for one in shown) == sorted(trace.topk_ids[7].ravel())


def test_text_of_a_prompt_is_shown_as_itself(opened):
    opened.js(f"location.hash = '#request/{NAMES[0]}'")
    opened.wait("document.querySelectorAll('#request .token').length")
    shown = opened.js(
        "[...document.querySelectorAll('#request .token bdi')].map((one) => one.textContent)"
    )
    expected = [one.replace("\n", "⏎").replace(" ", "␣") for one in HOSTILE]
    assert shown[: len(HOSTILE)] == expected
    assert opened.js("document.title") == "moescope"
    assert opened.js("document.querySelectorAll('main img, main script, header b').length") == 0


def test_the_tokens_of_an_expert_are_those_of_all_traces(opened):
    opened.js("document.querySelector('#heatmap canvas').focus()")
    for key in ("ArrowRight", *["ArrowRight"] * 11, "ArrowDown", "Enter"):
        opened.press(key)
    opened.wait("document.querySelectorAll('#expert tbody tr').length")
    assert opened.js("location.hash") == "#expert/3/11"
    here, everywhere = Counter(), Counter()
    for trace in TRACES:
        for row in np.flatnonzero(trace.present):
            token = int(trace.token_ids[row])
            everywhere[token] += 1
            here[token] += 11 in trace.topk_ids[row, 1]
    expected = sorted((-count, token) for token, count in here.items() if count)
    shown = data(opened, "#expert tbody tr")
    assert [(-int(one["count"]), int(one["token"])) for one in shown] == expected
    assert [int(one["total"]) for one in shown] == [everywhere[token] for _, token in expected]
    (facts,) = data(opened, "#expert .facts")
    assert (int(facts["rows"]), int(facts["selected"])) == (everywhere.total(), here.total())
    assert "of the 87 tokens of the 3 requests" in text(opened, "#expert .facts")
    opened.js("document.querySelector('#expert tbody a').click()")
    opened.wait("document.querySelectorAll('#request .token').length")
    chosen = "document.querySelector('#request .token[tabindex=\"0\"]').dataset.position"
    position = int(opened.js(chosen))
    name = text(opened, "#request .facts strong")
    trace = TRACES[NAMES.index(name)]
    assert trace.token_ids[position] == expected[0][1]
    assert 11 in trace.topk_ids[position, 1]


def test_two_requests_side_by_side(opened):
    opened.js(f"location.hash = '#compare/{NAMES[0]}/{NAMES[1]}'")
    opened.wait("document.querySelectorAll('#compare .pair').length")
    pairs = data(opened, "#compare .pair")
    first, second = TRACES[:2]
    for row in set(range(NUM_ROWS)) - {MISSING}:
        shared = {*first.topk_ids[row, 0].tolist()} & {*second.topk_ids[row, 0].tolist()}
        assert float(pairs[row]["shared"]) == len(shared) / TOP_K
    assert {pair["sameToken"] for pair in pairs} == {"true"}  # the text alone


def test_long_requests_are_shown_in_parts(page, tmp_path):
    rows = 1500
    many = {
        name: np.resize(getattr(TRACES[0], name), (rows, len(LAYERS), TOP_K))
        for name in ("topk_ids", "topk_weights")
    }
    values = formats.meta(TRACES[0]) | many | {
        "num_tokens": rows + 1, "layers": TRACES[0].layers, "complete": True,
        "source": np.zeros(rows, np.uint8), "token_ids": np.arange(rows + 1, dtype=np.int32),
    }  # fmt: skip
    page.open(f"{write(tmp_path, [RouteTrace(**values)])}#request/{NAMES[0]}")
    page.wait("document.querySelectorAll('#request .token').length === 1024")
    buttons = "[...document.querySelectorAll('#request button')]"
    page.js(f"{buttons}.find((one) => one.textContent === 'Show more tokens').click()")
    page.wait(f"document.querySelectorAll('#request .token').length === {rows + 1}")
    shown = page.js(
        "[...document.querySelectorAll('#request .token bdi')].map((one) => one.textContent)"
    )
    assert shown == [str(token) for token in range(rows + 1)]


def test_a_log_does_not_say_where_prompts_end(page, tmp_path):
    head = formats.meta_line(
        model="tiny", versions={}, device="cpu", seed=0, layers=LAYERS, top_k=2, num_experts=12
    )
    lines = b"".join(line for trace in TRACES for line in formats.route_lines(trace))
    (tmp_path / "log.jsonl").write_bytes(head + lines)
    page.open(view(tmp_path, tmp_path / "log.jsonl", "--limit", 2))
    num_rows = 2 * (NUM_ROWS - 1)
    page.wait(f"document.querySelector('#heatmap').dataset.total == {num_rows * 3 * TOP_K}")
    assert text(page, "#status") == "2 saved requests, the first of 3"
    page.type("#phase", "decode", "change")
    page.wait("document.querySelector('#heatmap').dataset.total == 0")
    assert text(page, "#covered") == f"0 tokens; of {num_rows} more the phase is unknown"
    page.js(f"location.hash = '#request/{NAMES[0]}'")
    page.wait("document.querySelectorAll('#request .token').length")
    assert "31 tokens · 96.7% of rows · " in text(page, "#request .facts")


@pytest.mark.parametrize("view_name", ["live", "requests", f"request/{NAMES[0]}"])
def test_a_phone_needs_no_sideways_scroll_and_begins_at_the_top(page, address, view_name):
    page.look(360, 740, "dark")
    page.open(f"{address}#{view_name}")
    page.wait("document.querySelector('#status').dataset.state === 'ok'")
    assert page.js("[document.documentElement.scrollWidth <= 360, scrollY]") == [True, 0]


def test_a_script_that_is_not_its_own_does_not_run(opened):
    opened.js(
        "document.body.append(Object.assign(document.createElement('script'),"
        " {textContent: 'document.title = 1'}))"
    )
    refused = "Content Security Policy"
    wait_until(lambda: opened.js("1") and any(refused in one for one in opened.problems), refused)
    assert opened.js("document.title") == "moescope"
    opened.problems.clear()


def test_a_file_that_was_damaged_says_so(page, tmp_path):
    address = write(tmp_path, TRACES)
    file = tmp_path / "page.html"
    whole = file.read_text()
    start = whole.index('id="saved">') + 200
    file.write_text(whole[:start] + "AAAA" * 10 + whole[start + 40 :])
    page.open(address)
    page.wait("!document.querySelector('#problem').hidden")
    assert "cannot read the traces" in text(page, "#problem")
    assert page.problems
    page.problems.clear()
