// Recent requests, newest first; follows live.

import { element, setText } from "./dom.js";
import { count, percent, time } from "./numbers.js";
import { errorsOf, Polling } from "./polling.js";

/** How often the list is asked for, which has those that run as well. */
const POLL_MS = 5000;
const LIMIT = 50;
const COLUMNS = ["Request", "Time", "Tokens", "Ended", "Coverage", "Weights", ""];

export class Requests {
  #api;
  #table;
  #note;
  #poll;
  #stream;
  #onList;
  #sequences = [];

  /** `onList(ids)` is told the ids that are listed. */
  constructor(section, api, report, onList) {
    this.#api = api;
    this.#onList = onList;
    this.#note = section.querySelector("#requests-note");
    this.#table = section.querySelector("#requests-table");
    const both = errorsOf(report);
    const tell = both("stream");
    this.#poll = new Polling(async (signal) => {
      const { sequences } = await this.#api.json("routes", { limit: LIMIT }, signal);
      this.#show(sequences);
    }, api.told ? null : POLL_MS, both("list"));
    this.#stream = new Polling((signal) => this.#follow(signal, tell), 0, tell);
    const search = section.querySelector("#search");
    search.addEventListener("submit", (event) => {
      event.preventDefault();
      const wanted = search.querySelector("input").value.trim();
      if (wanted) window.location.hash = link("request", wanted);
    });
  }

  start() {
    this.#poll.start();
    this.#stream.start();
  }

  stop() {
    this.#poll.stop();
    this.#stream.stop();
  }

  restart() {
    this.#poll.restart();
    this.#stream.restart();
  }

  /** Show what ends, as it ends: in place of itself, or above all others. */
  async #follow(signal, tell) {
    for await (const ended of this.#api.ended(signal)) {
      tell(null);
      const isNew = (one) => !this.#sequences.some((known) => isSame(known, one));
      const old = this.#sequences.map((known) => ended.find((one) => isSame(one, known)) ?? known);
      if (ended.length) this.#show([...ended.filter(isNew).reverse(), ...old].slice(0, LIMIT));
    }
  }

  #show(sequences) {
    this.#sequences = sequences;
    this.#onList([...new Set(sequences.map((one) => one.request_id))]);
    setText(this.#note, this.#api.told ? `${this.#api.told}.` : sequences.length
      ? `The newest ${sequences.length}.`
      : "No request has been recorded yet. Send one to /v1/completions or /v1/chat/completions.");
    const focused = document.activeElement?.dataset.request;
    const head = element("tr", {}, ...COLUMNS.map((text) => element("th", { scope: "col", textContent: text })));
    this.#table.replaceChildren(
      element("caption", { className: "hidden", textContent: "Recent requests, newest first" }),
      element("thead", {}, head),
      element("tbody", {}, ...sequences.map(row)),
    );
    this.#table.hidden = !sequences.length;
    const again = [...this.#table.querySelectorAll("a[data-request]")];
    if (focused) again.find((one) => one.dataset.request === focused)?.focus();
  }
}

const isSame = (a, b) =>
  a.request_id === b.request_id && a.index === b.index && a.created_s === b.created_s;

/** Return the address of a view with requests in it. */
export const link = (view, ...ids) => `#${[view, ...ids.map(encodeURIComponent)].join("/")}`;

function row(one) {
  const id = one.request_id;
  const name = one.index ? `${id} · choice ${one.index}` : id;
  const open = element("a", { href: link("request", id), textContent: name, data: { request: id } });
  const compare = element("a", { href: link("compare", id), textContent: "compare",
    aria: { label: `compare ${name}` } });
  const { oldest_weights_version: oldest, newest_weights_version: newest } = one;
  const versions = oldest === newest ? oldest ?? "–" : `${oldest}–${newest}`;
  const cells = [
    open,
    time(one.created_s),
    one.prompt_len === null ? count(one.num_tokens) : one.num_tokens === null ? `${count(one.prompt_len)} + …`
      : `${count(one.prompt_len)} + ${count(one.num_tokens - one.prompt_len)}`,
    one.status === "running" ? "running" : one.finish_reason ?? "–",
    one.coverage === null ? "–" : percent(one.coverage),
    versions,
    compare,
  ];
  return element("tr", { data: { request: id, status: one.status, complete: one.complete } },
    ...cells.map((cell, at) => element("td", { data: { label: COLUMNS[at] } }, String(cell) === cell || typeof cell === "number" ? String(cell) : cell)));
}
