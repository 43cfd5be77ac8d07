// Two requests side by side: aligned by token position, what differs is marked.

import { onTheme, sequential, theme } from "./colors.js";
import { element, labeled, option, setText } from "./dom.js";
import { count } from "./numbers.js";
import { link } from "./requests.js";
import { marksLegend, Shading, swatch } from "./shading.js";
import { hatched, Strip } from "./strip.js";
import { onToken, tokenElement, visible } from "./tokens.js";

export class Compare {
  #traces = null;
  #position = 0;
  #parts = {
    ids: element("datalist", { id: "recent-ids" }),
    first: element("input", { name: "first", spellcheck: false, autocomplete: "off" }),
    second: element("input", { name: "second", spellcheck: false, autocomplete: "off" }),
    layer: element("select", { name: "layer" }),
    summary: element("p", { className: "facts", role: "status" }),
    pairs: element("div", { className: "tokens pairs", role: "group", aria: { label: "Token pairs" } }),
    experts: element("ul", { className: "legend" }),
    told: element("p", { className: "told", role: "status" }),
    shown: element("div", { hidden: true }),
  };
  #strip = new Strip("Shared experts by layer and token", (position, at) => {
    this.#parts.layer.value = at;
    this.#position = position;
    this.#draw();
  });

  constructor(section) {
    const { ids, first, second, layer, summary, pairs, told, shown } = this.#parts;
    for (const input of [first, second]) input.setAttribute("list", ids.id);
    const form = element("form", { className: "controls" }, labeled("First", first),
      labeled("Second", second), element("button", { textContent: "Compare" }));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const wanted = [first.value.trim(), second.value.trim()].filter(Boolean);
      window.location.hash = link("compare", ...wanted);
    });
    const shares = [0, 0.25, 0.5, 0.75, 1];
    this.#parts.legend = element("ul", { className: "legend" });
    shown.append(element("div", { className: "controls" }, labeled("Layer", layer)), pairs,
      this.#parts.experts, told,
      element("h3", { textContent: "Share of experts that both have: layers (down) by tokens (across)" }),
      this.#strip.element, this.#parts.legend);
    section.append(form, ids, summary, shown);
    layer.addEventListener("change", () => this.#draw());
    onToken(pairs, (position) => this.#choose(position));
    this.#legend = () => this.#parts.legend.replaceChildren(
      ...shares.map((share) => swatch(sequential(1 - share), `${100 * share}%`)));
    onTheme(() => this.#draw());
  }

  #legend;

  /** Offer ids to choose from. */
  offer(requestIds) {
    this.#parts.ids.replaceChildren(...requestIds.map((id) => option(id, id)));
  }

  /** Show what is chosen so far; traces is null until both are. */
  show(requestIds, traces) {
    [this.#parts.first.value, this.#parts.second.value] = [requestIds[0] ?? "", requestIds[1] ?? ""];
    this.#traces = null;
    this.#parts.shown.hidden = true;
    if (!traces) {
      setText(this.#parts.summary, "Give the ids of two requests.");
      return;
    }
    const [a, b] = traces;
    if (String(a.layers) !== String(b.layers) || a.numExperts !== b.numExperts) {
      setText(this.#parts.summary, "These requests are not of the same layers and experts.");
      return;
    }
    this.#traces = traces;
    this.#position = 0;
    this.#parts.shown.hidden = false;
    this.#parts.layer.replaceChildren(...a.layers.map((one, at) => option(at, one)));
    this.#draw();
  }

  /** How many tokens both have rows of; those behind them stand alone. */
  get #numCommon() {
    return Math.min(...this.#traces.map((one) => one.numRows));
  }

  /** Share of the experts of a token and layer that both have; NaN where one lacks the row. */
  #shared(position, at) {
    const [a, b] = this.#traces.map((one) => one.at(position, at));
    return a && b ? a.ids.filter((one) => b.ids.includes(one)).length / a.ids.length : NaN;
  }

  #draw() {
    if (!this.#traces) return;
    const layerAt = Number(this.#parts.layer.value);
    const shading = new Shading(this.#traces, "expert");
    const length = Math.max(...this.#traces.map((one) => one.numShown));
    this.#parts.pairs.replaceChildren(...Array.from({ length }, (_, position) =>
      this.#pair(position, layerAt, shading)));
    this.#parts.experts.replaceChildren(...shading.legend(layerAt), ...marksLegend());
    this.#strip.draw(this.#numCommon, this.#traces[0].layers.length, (position, at) => {
      const share = this.#shared(position, at);
      return Number.isNaN(share) ? hatched(position, at, theme()) : sequential(1 - share);
    });
    this.#legend();
    this.#tellAll(layerAt);
    this.#choose(this.#position);
  }

  #pair(position, layerAt, shading) {
    const [a, b] = this.#traces;
    const share = this.#shared(position, layerAt);
    const isBoth = position < a.numShown && position < b.numShown;
    const sameToken = isBoth && a.tokenAt(position) === b.tokenAt(position);
    const both = this.#traces.map((trace) => (position < trace.numShown
      ? tokenElement(trace, position, layerAt, shading)
      : element("span", { className: "token absent" }, element("bdi", { textContent: "∅" }),
        element("small", { textContent: "–" }))));
    const marks = [sameToken || !isBoth ? "" : "token", share < 1 ? "experts" : ""].filter(Boolean);
    const mark = element("small", { className: "differs", textContent: marks.length ? "≠" : "" });
    if (marks.length) mark.title = `other ${marks.join(" and ")}`;
    return element("span", { className: "pair", data: { position, sameToken, shared: share } }, ...both, mark);
  }

  #tellAll(layerAt) {
    const common = Array.from({ length: this.#numCommon }, (_, i) => i);
    const [a, b] = this.#traces;
    const known = common.filter((i) => !Number.isNaN(this.#shared(i, layerAt)));
    const other = known.filter((i) => this.#shared(i, layerAt) < 1);
    const tokens = common.filter((i) => a.tokenAt(i) !== b.tokenAt(i));
    const first = tokens.length ? ` from token ${tokens[0]} on` : "";
    const more = a.hasMore || b.hasMore ? ` Only the first ${count(this.#numCommon)} are shown.` : "";
    setText(this.#parts.summary, `Of ${count(common.length)} tokens with a row in both, ${count(tokens.length)} `
      + `differ${first}; ${count(other.length)} of ${count(known.length)} went to other experts in layer `
      + `${a.layers[layerAt]}.${more}`);
    Object.assign(this.#parts.summary.dataset, { tokens: tokens.length, experts: other.length });
  }

  #choose(position) {
    this.#position = position;
    const layerAt = Number(this.#parts.layer.value);
    const lines = this.#traces.map((trace) => {
      if (position >= trace.numShown) return "nothing here";
      const experts = trace.at(position, layerAt)?.ids.join(", ");
      return `${visible(trace.tokenAt(position))} to ${experts ?? `none (${trace.sourceAt(position)})`}`;
    });
    setText(this.#parts.told, `Token ${position}. First: ${lines[0]}. Second: ${lines[1]}.`);
    if (position < this.#numCommon) this.#strip.show(position, layerAt);
  }
}
