// The heatmap layer x expert, and beside it the balance of each layer.
//
// Colors say log2 of an expert's selections over its layer's mean: one pixel a cell on a canvas
// that CSS stretches, so that 94 x 512 cells cost as little as 24 x 60.

import { balanceOf } from "./balance.js";
import { css, diverging, onTheme, paint } from "./colors.js";
import { arrow, clamp, element, placeIn, setText } from "./dom.js";
import { count, fixed } from "./numbers.js";
import { swatch } from "./shading.js";

const MAX_LOG2 = 3;
const STEPS = { "≤ ⅛": -3, "¼": -2, "½": -1, "mean": 0, "2×": 1, "4×": 2, "≥ 8×": 3 };
const BARS = {
  entropy: ["Entropy", (value) => value, 2],
  maxViolation: ["MaxVio", (value, most) => value / most, 1],
  active: ["Active", (value, most) => value / most, 0],
};

export class Heatmap {
  #figure;
  #shown = null;
  #cell = null;
  #parts;
  #onChoose;

  /** `onChoose(layer, expert)` is called when the user chooses a cell. */
  constructor(figure, onChoose) {
    this.#figure = figure;
    this.#onChoose = onChoose;
    const canvas = element("canvas", { tabIndex: 0 });
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", "Heatmap of layers and experts: move with the arrow keys, "
      + "Enter shows an expert's tokens");
    this.#parts = {
      canvas,
      cursor: element("div", { className: "cursor", hidden: true }),
      axis: element("div", { className: "axis", aria: { hidden: "true" } }),
      experts: element("div", { className: "experts-axis", aria: { hidden: "true" } }),
      bars: element("div", { className: "bars" }),
      told: element("p", { className: "told", role: "status" }),
      legend: element("ul", { className: "legend" }),
      summary: element("figcaption", { className: "hidden" }),
    };
    const { cursor, axis, experts, bars, told, legend, summary } = this.#parts;
    const map = element("div", { className: "map" }, canvas, cursor);
    const grid = element("div", { className: "grid" }, axis, map, bars, experts);
    figure.append(grid, told, legend, summary);
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("pointerdown", (event) => this.#point(event));
    canvas.addEventListener("click", () => this.#choose());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    onTheme(() => this.#draw());
  }

  /** Show counts [layers x experts] of a model's layers. */
  show(layers, numExperts, counts) {
    const rows = layers.map((_, at) => counts.subarray(at * numExperts, (at + 1) * numExperts));
    this.#shown = { layers, numExperts, rows, balance: rows.map(balanceOf) };
    if (this.#cell && (this.#cell[0] >= numExperts || this.#cell[1] >= layers.length)) {
      this.#cell = null;
    }
    this.#draw();
  }

  #draw() {
    if (!this.#shown) return;
    const { layers, numExperts, balance } = this.#shown;
    const height = clamp(Math.round(420 / layers.length), 4, 28) * layers.length;
    this.#figure.style.setProperty("--map-height", `${height}px`);
    paint(this.#parts.canvas, numExperts, layers.length, (expert, at) =>
      diverging(balance[at].total ? this.#log2(expert, at) / MAX_LOG2 : NaN));
    this.#drawAxes(layers, numExperts);
    this.#drawBars();
    this.#parts.legend.replaceChildren(
      ...Object.entries(STEPS).map(([text, step]) => swatch(diverging(step / MAX_LOG2), text)),
      swatch(diverging(NaN), "no selections in the layer"),
    );
    const total = balance.reduce((sum, one) => sum + one.total, 0);
    const worst = balance.reduce((a, b, at) => (b.maxViolation > (balance[a]?.maxViolation ?? -1) ? at : a), -1);
    const text = worst < 0 ? "No selections."
      : `${count(total)} selections in ${layers.length} layers of ${numExperts} experts. Layer `
        + `${layers[worst]} is the least balanced: MaxVio ${fixed(balance[worst].maxViolation, 2)}, `
        + `normalized entropy ${fixed(balance[worst].entropy, 2)}.`;
    setText(this.#parts.summary, text);
    this.#figure.dataset.total = total;
    this.#tell();
  }

  #log2(expert, at) {
    const { rows, numExperts, balance } = this.#shown;
    return Math.log2((rows[at][expert] * numExperts) / balance[at].total);
  }

  #drawAxes(layers, numExperts) {
    const ticks = (length, most) => {
      const step = Math.max(1, Math.ceil(length / most / 5) * (length > most ? 5 : 1));
      return Array.from({ length: Math.ceil(length / step) }, (_, i) => i * step);
    };
    this.#parts.axis.replaceChildren(...ticks(layers.length, 24).map((at) =>
      element("span", { textContent: layers[at], style: { top: `${(100 * (at + 0.5)) / layers.length}%` } })));
    this.#parts.experts.replaceChildren(
      element("span", { textContent: "expert 0" }), element("span", { textContent: numExperts - 1 }));
  }

  #drawBars() {
    const { balance, layers } = this.#shown;
    const made = Object.entries(BARS).map(([name, [title, share, digits]]) => {
      const values = balance.map((one) => (one.total ? one[name] : NaN));
      const known = values.filter(Number.isFinite);
      const most = Math.max(...known, name === "active" ? this.#shown.numExperts : 1e-9);
      const range = known.length
        ? `${fixed(Math.min(...known), digits)} – ${fixed(Math.max(...known), digits)}` : "–";
      const bars = values.map((value, at) => element("div", {
        title: `layer ${layers[at]}: ${title} ${fixed(value, digits)}`,
        data: { layer: layers[at], value: fixed(value, 4) },
        style: { width: `${Number.isFinite(value) ? 100 * share(value, most) : 0}%` },
      }));
      const drawn = element("div", { className: "bar-rows", data: { name } }, ...bars);
      drawn.setAttribute("role", "img");
      drawn.setAttribute("aria-label", `${title} by layer, ${range}`);
      const head = element("p", {}, title, element("small", { textContent: range }));
      return element("div", { className: "bar-column" }, head, drawn);
    });
    this.#parts.bars.replaceChildren(...made);
  }

  #point(event) {
    if (!this.#shown) return;
    const [x, y] = placeIn(this.#parts.canvas, event);
    this.#move(Math.floor(x * this.#shown.numExperts), Math.floor(y * this.#shown.layers.length));
  }

  #choose() {
    if (this.#shown && this.#cell) this.#onChoose(this.#shown.layers[this.#cell[1]], this.#cell[0]);
  }

  #key(event) {
    if (event.key === "Enter") this.#choose();
    const step = arrow(event);
    if (!step || !this.#shown) return;
    event.preventDefault();
    const [expert, at] = this.#cell ?? [-step[0], -step[1]];
    this.#move(expert + step[0], at + step[1]);
  }

  #move(expert, at) {
    const { numExperts, layers } = this.#shown;
    this.#cell = [clamp(expert, 0, numExperts - 1), clamp(at, 0, layers.length - 1)];
    this.#tell();
  }

  #tell() {
    const { cursor, told } = this.#parts;
    cursor.hidden = this.#cell === null;
    if (this.#cell === null) {
      setText(told, "Point at a cell, or move with the arrow keys; a click or Enter shows its tokens.");
      return;
    }
    const { layers, numExperts, rows, balance } = this.#shown;
    const [expert, at] = this.#cell;
    const box = { left: expert / numExperts, top: at / layers.length,
      width: 1 / numExperts, height: 1 / layers.length };
    for (const [side, share] of Object.entries(box)) cursor.style.setProperty(side, `${100 * share}%`);
    const ratio = balance[at].total ? 2 ** this.#log2(expert, at) : NaN;
    Object.assign(this.#figure.dataset, { layer: layers[at], expert, count: rows[at][expert], ratio: fixed(ratio, 4) });
    setText(told, `Layer ${layers[at]}, expert ${expert}: ${count(rows[at][expert])} selections, `
      + `${fixed(ratio, 2)} × the layer's mean`);
  }
}
