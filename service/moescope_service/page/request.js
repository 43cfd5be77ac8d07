// One request: its tokens by expert, what each layer did with a token, and a strip of all layers.

import { onTheme, theme } from "./colors.js";
import { arrow, clamp, element, labeled, option, setText } from "./dom.js";
import { count, fixed, percent, time } from "./numbers.js";
import { link } from "./requests.js";
import { AGREEMENT, marksLegend, MODES, Shading } from "./shading.js";
import { hatched, Strip } from "./strip.js";
import { onToken, tokenElement, visible } from "./tokens.js";
import { agreement } from "./trace.js";

/** How many tokens are fetched to show the one that the address names. */
const MAX_TOKENS = 8192;

export class RequestView {
  #api;
  #report;
  #trace;
  #other = null;
  #position = 0;
  #parts = {
    choice: element("select", { name: "choice" }),
    layer: element("select", { name: "layer" }),
    mode: element("select", { name: "mode" }, ...Object.entries(MODES).map(([value, text]) => option(value, text))),
    second: element("input", { name: "second", spellcheck: false, autocomplete: "off" }),
    facts: element("p", { className: "facts" }),
    tokens: element("div", { className: "tokens", role: "group", aria: { label: "Tokens" } }),
    legend: element("ul", { className: "legend" }),
    marks: element("ul", { className: "legend" }),
    more: element("button", { type: "button", textContent: "Show more tokens", hidden: true }),
    told: element("p", { className: "told", role: "status" }),
    detail: element("div", { className: "scroll detail", tabIndex: 0, aria: { label: "All layers" } }),
  };
  #strip = new Strip("Strip of layers and tokens", (position, layerAt) => this.#go(position, layerAt));

  constructor(section, api, report) {
    this.#api = api;
    this.#report = report;
    const { choice, layer, mode, second, facts, tokens, legend, marks, more, told, detail } = this.#parts;
    this.#parts.chosen = labeled("Choice", choice);
    second.setAttribute("list", "recent-ids");
    const form = element("form", {}, labeled("Agreement with", second), element("button", { textContent: "Show" }));
    this.#parts.shown = element("div", { hidden: true },
      element("div", { className: "controls" }, this.#parts.chosen, labeled("Layer", layer),
        labeled("Color", mode), form),
      element("div", { className: "beside" },
        element("div", {}, tokens, more, legend, marks,
          element("h3", { textContent: "All layers (down) by tokens (across); marks of tokens under them" }),
          this.#strip.element),
        element("div", { className: "panel" }, told, detail)));
    section.append(facts, this.#parts.shown);
    layer.addEventListener("change", () => this.#draw());
    mode.addEventListener("change", () => this.#draw());
    more.addEventListener("click", () => this.#fetchMore());
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      window.location.hash = link("request", ...[this.#trace.name, second.value.trim()].filter(Boolean));
    });
    tokens.addEventListener("keydown", (event) => this.#key(event));
    onToken(tokens, (position) => this.#choose(position));
    onTheme(() => this.#draw());
  }

  /** Show the traces of a request; null: of none.
   *
   * `others` are those of a second request, to color by agreement. `place` names an `index`, a
   * `layer` and a `position`.
   */
  show(traces, others = null, place = {}) {
    const { choice, chosen, facts, shown } = this.#parts;
    shown.hidden = traces === null;
    if (traces === null) {
      facts.replaceChildren("Choose one of the ", element("a", { href: "#requests", textContent: "requests" }), ".");
      return;
    }
    chosen.hidden = traces.length === 1;
    choice.replaceChildren(...traces.map((one, at) =>
      option(at, `${one.index} of ${one.name}, ${time(one.facts.created_s)}`)));
    choice.onchange = () => this.#open(traces[Number(choice.value)], others);
    const at = Math.max(0, traces.findIndex((one) => String(one.index) === place.index));
    choice.value = at;
    this.#open(traces[at], others);
    this.#goTo(place);
  }

  #open(trace, others) {
    const { layer, mode, second, marks } = this.#parts;
    this.#trace = trace;
    this.#other = others?.find((one) => one.index === trace.index) ?? others?.[0] ?? null;
    this.#position = 0;
    const before = layer.value;
    layer.replaceChildren(...trace.layers.map((one, at) => option(at, one)));
    if (before && Number(before) < trace.layers.length) layer.value = before;
    const chosen = this.#other ? AGREEMENT : mode.value;
    mode.replaceChildren(...Object.entries(MODES).map(([value, text]) => option(value, text)),
      ...(this.#other ? [option(AGREEMENT, "agreement with the second request")] : []));
    mode.value = chosen === AGREEMENT && !this.#other ? "expert" : chosen;
    second.value = this.#other?.name ?? "";
    marks.replaceChildren(...marksLegend());
    this.#draw();
  }

  /** Go to the token that an address names, and fetch the rows up to it if they are not too many. */
  async #goTo({ layer, position }) {
    if (position === undefined) return;
    const [trace, wanted] = [this.#trace, Number(position)];
    while (trace === this.#trace && trace.hasMore && wanted >= trace.numShown && wanted < MAX_TOKENS) {
      if (!await this.#fetchMore()) return;
    }
    if (trace !== this.#trace || !(wanted >= 0 && wanted < trace.numShown)) return;
    this.#go(wanted, Math.max(0, trace.layers.indexOf(Number(layer))));
    this.#parts.tokens.children[wanted].focus();
  }

  get #layerAt() {
    return Number(this.#parts.layer.value);
  }

  #draw() {
    const trace = this.#trace;
    if (!trace) return;
    const { tokens, legend, facts, more, mode } = this.#parts;
    const shading = new Shading([trace], mode.value, this.#other);
    const shown = Array.from({ length: trace.numShown }, (_, position) =>
      tokenElement(trace, position, this.#layerAt, shading));
    tokens.replaceChildren(...shown);
    legend.replaceChildren(...shading.legend(this.#layerAt));
    more.hidden = !trace.hasMore;
    facts.replaceChildren(...factsOf(trace));
    this.#strip.draw(trace.numRows, trace.layers.length, (position, layerAt) =>
      shading.color(trace, position, layerAt) ?? hatched(position, layerAt, theme()),
    (position) => trace.sourceAt(position));
    this.#strip.canvas.setAttribute("aria-label", `Strip of ${trace.layers.length} layers and `
      + `${trace.numRows} tokens by ${mode.selectedOptions[0].textContent}; move with the arrow keys`);
    this.#choose(this.#position);
  }

  #choose(position) {
    const { tokens, told, detail } = this.#parts;
    for (const one of tokens.querySelectorAll('[tabindex="0"]')) one.tabIndex = -1;
    const token = tokens.children[position];
    if (token) token.tabIndex = 0;
    this.#position = position;
    const row = this.#trace.at(position, this.#layerAt);
    const layer = this.#trace.layers[this.#layerAt];
    const what = `Token ${position}, ${visible(this.#trace.tokenAt(position))}, ${this.#trace.sourceAt(position)}`;
    setText(told, row
      ? `${what}. Layer ${layer}: expert ${row.expert}, weight ${fixed(row.weight, 3)}${this.#agreementAt(position)}`
      : `${what}.`);
    detail.replaceChildren(...(this.#trace.sourceAt(position) === "missing" ? [] : [this.#layersOf(position)]));
    this.#strip.show(Math.min(position, this.#trace.numRows - 1), this.#layerAt);
  }

  /** What is to be told of the second request's token at a position. */
  #agreementAt(position) {
    if (!this.#other) return "";
    const share = agreement(this.#trace, this.#other, position, this.#layerAt);
    const token = visible(this.#other.tokenAt(position));
    return `. Second request: ${token}, agreement ${fixed(share, 2)}`;
  }

  #layersOf(position) {
    const rows = this.#trace.layers.flatMap((layer, at) => {
      const row = this.#trace.at(position, at);
      if (!row) return [];
      const order = row.ids.map((_, i) => i).sort((a, b) => (row.weights ? row.weights[b] - row.weights[a] : 0));
      const experts = order.map((i) => element("a",
        { className: "expert", href: link("expert", layer, row.ids[i]), data: { expert: row.ids[i] } },
        String(row.ids[i]), element("small", { textContent: row.weights ? fixed(row.weights[i], 3) : "" })));
      return [element("tr", { data: { layer }, className: at === this.#layerAt ? "chosen" : "" },
        element("th", { scope: "row", textContent: layer }), element("td", {}, ...experts))];
    });
    const head = ["Layer", "Experts and weights"].map((text) => element("th", { scope: "col", textContent: text }));
    return element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
  }

  #go(position, layerAt) {
    this.#position = position;
    this.#parts.layer.value = layerAt;
    this.#draw();
  }

  #key(event) {
    const step = arrow(event);
    if (!step) return;
    event.preventDefault();
    const layerAt = clamp(this.#layerAt + step[1], 0, this.#trace.layers.length - 1);
    this.#go(clamp(this.#position + step[0], 0, this.#trace.numShown - 1), layerAt);
    this.#parts.tokens.children[this.#position].focus();
  }

  /** Fetch the next rows and draw them; return whether that went well. */
  async #fetchMore() {
    const { more } = this.#parts;
    if (more.disabled) return false; // they are being fetched
    more.disabled = true;
    try {
      await this.#trace.more(this.#api);
      if (this.#other?.hasMore && this.#other.numRows < this.#trace.numRows) await this.#other.more(this.#api);
    } catch (error) {
      this.#report(error);
      return false;
    } finally {
      more.disabled = false;
    }
    this.#draw();
    return true;
  }
}

function factsOf({ name, facts, promptLen, numTokens }) {
  const versions = [...new Set(facts.weights_versions.map(([, version]) => version))].join(", ");
  const told = [
    promptLen === null ? `${count(numTokens)} tokens` : `${count(promptLen)} + ${count(numTokens - promptLen)} tokens`,
    facts.finish_reason ? `ended by ${facts.finish_reason}` : null,
    `${percent(facts.coverage)} of rows`,
    facts.lora ? `adapter ${facts.lora}` : null,
    versions ? `weights ${versions}` : null,
    facts.created_s === null ? null : time(facts.created_s),
  ].filter(Boolean).join(" · ");
  const compare = element("a", { href: link("compare", name), textContent: "compare with another" });
  return [element("strong", { textContent: name }), ` ${told} · `, compare];
}
