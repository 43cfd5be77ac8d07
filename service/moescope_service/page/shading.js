// Colors a trace's tokens by top expert, by its weight, or by the entropy of the weights.

import { css, kind, NUM_KINDS, sequential, theme } from "./colors.js";
import { element } from "./dom.js";
import { count } from "./numbers.js";

export const MODES = {
  expert: "top expert",
  weight: "weight of the top expert",
  entropy: "entropy of the weights",
};

export class Shading {
  #trace;
  #ranked = new Map();

  constructor(trace, mode) {
    this.#trace = trace;
    this.mode = mode;
  }

  /** The color of a token in a layer; null where it has no row. */
  color(position, layerAt) {
    const row = this.#trace.at(position, layerAt);
    if (row === null) return null;
    if (this.mode !== "expert") return sequential(row[this.mode]);
    return kind(this.#ranks(layerAt).get(row.expert));
  }

  #ranks(layerAt) {
    if (!this.#ranked.has(layerAt)) {
      const experts = this.#trace.topExperts(layerAt).map(([expert], rank) => [expert, rank]);
      this.#ranked.set(layerAt, new Map(experts));
    }
    return this.#ranked.get(layerAt);
  }

  /** Elements that say what the colors of a layer mean. */
  legend(layerAt) {
    if (this.mode !== "expert") {
      return [0, 0.25, 0.5, 0.75, 1].map((value) => swatch(sequential(value), String(value)));
    }
    const top = this.#trace.topExperts(layerAt);
    const shown = top.slice(0, NUM_KINDS).map(([expert, tokens], rank) =>
      swatch(kind(rank), `expert ${expert} (${count(tokens)})`));
    const rest = top.slice(NUM_KINDS);
    if (rest.length) {
      const tokens = rest.reduce((sum, [, one]) => sum + one, 0);
      shown.push(swatch(theme().other, `${rest.length} others (${count(tokens)})`));
    }
    return shown;
  }
}

/** A square of a color, and what it stands for. */
export function swatch(color, text) {
  const square = element("i", { style: { "background-color": css(color) } });
  return element("li", {}, square, text);
}

/** What the marks of tokens mean, which need no color. */
export function marksLegend() {
  const marks = {
    missing: "missing row",
    cached: "from the prefix cache",
    recalled: "recalled from evicted blocks",
    unrouted: "last token, never routed",
  };
  return Object.entries(marks).map(([source, text]) =>
    element("li", {}, element("i", { className: "mark", data: { source } }), text));
}
