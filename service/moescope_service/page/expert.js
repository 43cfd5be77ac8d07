// One expert: the tokens of the newest requests that went there, the most frequent first.

import { element, labeled, option } from "./dom.js";
import { count, percent } from "./numbers.js";
import { Polling } from "./polling.js";
import { link } from "./requests.js";
import { visible } from "./tokens.js";

const LIMIT = 100;
const RETRY_MS = 1000;
const COLUMNS = ["Token", "Id", "Went here", "Of all", "Share", "One request that has it"];

export class ExpertView {
  #api;
  #poll;
  #wanted = null;
  #shown = null;
  #parts = {
    form: element("form", { className: "controls" }),
    layer: element("select", { name: "layer" }),
    expert: element("input", { name: "expert", type: "number", min: 0, required: true }),
    facts: element("p", { className: "facts", role: "status" }),
    table: element("table", { hidden: true }),
  };

  constructor(section, api, report) {
    this.#api = api;
    const { form, layer, expert, facts, table } = this.#parts;
    form.append(labeled("Layer", layer), labeled("Expert", expert), element("button", { textContent: "Show anew" }));
    section.append(form, facts, element("div", { className: "scroll" }, table));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const address = link("expert", layer.value, expert.value);
      if (window.location.hash === address) this.restart();
      else window.location.hash = address;
    });
    layer.addEventListener("change", () => form.requestSubmit());
    this.#poll = new Polling((signal) => this.#ask(signal), RETRY_MS, report);
  }

  /** Show the expert that is named by its layer's number and its own; by default the first one. */
  open([layer, expert]) {
    this.#wanted = [layer, expert];
    this.restart();
    this.#poll.start();
  }

  stop() {
    this.#poll.stop();
  }

  restart() {
    this.#shown = null;
    this.#poll.restart();
  }

  /** Ask once: what is shown stays until another one, or the same one anew, is asked for. */
  async #ask(signal) {
    const wanted = this.#wanted;
    if (this.#shown === wanted) return;
    const info = await this.#api.info();
    const [layer, expert] = [wanted[0] ?? info.layers[0], wanted[1] ?? 0];
    this.#offer(info, layer, expert);
    const path = `experts/${encodeURIComponent(layer)}/${encodeURIComponent(expert)}/tokens`;
    const answer = await this.#api.json(path, { limit: LIMIT }, signal);
    this.#shown = wanted;
    this.#show(answer, info);
  }

  #offer(info, layer, expert) {
    const { layer: layers, expert: experts, table, facts } = this.#parts;
    layers.replaceChildren(...info.layers.map((one) => option(one, one)));
    layers.value = layer;
    experts.value = expert;
    experts.max = info.num_experts - 1;
    facts.replaceChildren();
    table.hidden = true;
  }

  #show({ layer, expert, requests, rows, rows_selected: selected, rows_missing: missing, tokens },
    { top_k: topK, num_experts: numExperts }) {
    const { facts, table } = this.#parts;
    const even = `${percent(topK / numExperts)} if all experts had equally many`;
    facts.replaceChildren(
      element("strong", { textContent: `Layer ${layer}, expert ${expert}` }),
      rows ? `: ${count(selected)} of the ${count(rows)} tokens of the ${this.#api.told ? "" : "newest "}${count(requests)} requests went `
        + `here, ${percent(selected / rows)} (${even}).${missing ? ` ${count(missing)} rows are missing.` : ""}`
        : ": no request has been kept yet.",
    );
    Object.assign(facts.dataset, { layer, expert, requests, rows, selected });
    table.replaceChildren(
      element("caption", { className: "hidden", textContent: "Tokens that went to the expert, most frequent first" }),
      element("thead", {}, element("tr", {}, ...COLUMNS.map((text) => element("th", { scope: "col", textContent: text })))),
      element("tbody", {}, ...tokens.map((one) => row(one, layer))),
    );
    table.hidden = !tokens.length;
  }
}

function row(one, layer) {
  const text = element("bdi", { textContent: one.token === null ? "–" : visible(one.token) });
  const share = element("meter", { max: 1, value: one.share, aria: { hidden: "true" } });
  const place = new URLSearchParams({ index: one.index, layer, position: one.position });
  const open = element("a", { href: `${link("request", one.request_id)}?${place}`,
    textContent: `${one.request_id}, token ${one.position}` });
  const cells = [text, one.token_id, count(one.count), count(one.total), [share, ` ${percent(one.share)}`], open];
  return element("tr", { data: { token: one.token_id, count: one.count, total: one.total } },
    ...cells.map((cell, at) => element("td", { data: { label: COLUMNS[at] } }, ...[cell].flat())));
}
