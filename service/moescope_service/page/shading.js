// Colors a trace's tokens by top expert, by its weight, or by the entropy of the weights.

import { css, kind, NUM_KINDS, sequential, theme } from "./colors.js";
import { element } from "./dom.js";
import { count, fixed } from "./numbers.js";
import { agreement } from "./trace.js";

export const MODES = {
  expert: "top expert",
  weight: "weight of the top expert",
  entropy: "entropy of the weights",
};
/** The color that needs another request. */
export const AGREEMENT = "agreement";

export class Shading {
  #traces;
  #ranked = new Map();

  /** Traces that are shown together have the same colors; `other` is what they may agree with. */
  constructor(traces, mode, other = null) {
    this.#traces = traces;
    this.mode = mode;
    this.other = other;
  }

  /** The color of a trace's token in a layer; null where it has no row. */
  color(trace, position, layerAt) {
    const row = trace.at(position, layerAt);
    if (row === null) return null;
    if (this.mode === AGREEMENT) return sequential(1 - agreement(trace, this.other, position, layerAt));
    if (this.mode !== "expert") return sequential(row[this.mode]);
    return kind(this.#ranks(layerAt).get(row.expert));
  }

  #ranks(layerAt) {
    if (!this.#ranked.has(layerAt)) {
      const experts = this.#topExperts(layerAt).map(([expert], rank) => [expert, rank]);
      this.#ranked.set(layerAt, new Map(experts));
    }
    return this.#ranked.get(layerAt);
  }

  /** Rank the top experts of a layer: [expert, tokens], the most frequent first. */
  #topExperts(layerAt) {
    const counted = new Map();
    for (const trace of this.#traces) {
      for (let position = 0; position < trace.numRows; position += 1) {
        const expert = trace.at(position, layerAt)?.expert;
        if (expert !== undefined) counted.set(expert, (counted.get(expert) ?? 0) + 1);
      }
    }
    return [...counted].sort(([a, x], [b, y]) => y - x || a - b);
  }

  /** Elements that say what the colors of a layer mean. */
  legend(layerAt) {
    if (this.mode === AGREEMENT) {
      const shares = [1, 0.75, 0.5, 0.25, 0].map((share) => swatch(sequential(1 - share), fixed(share, 2)));
      return [...shares, swatch(sequential(NaN), "no row in the other request")];
    }
    if (this.mode !== "expert") {
      return [0, 0.25, 0.5, 0.75, 1].map((value) => swatch(sequential(value), String(value)));
    }
    const top = this.#topExperts(layerAt);
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
