// A strip of all layers x tokens on a canvas, with a cursor for mouse, touch and keyboard.

import { onTheme, paint } from "./colors.js";
import { arrow, clamp, element, placeIn } from "./dom.js";

export class Strip {
  #size = [0, 0];
  #colorOf = null;
  #at = [0, 0];

  /** `onMove(column, row)` is called when the user moves the cursor. */
  constructor(label, onMove) {
    this.canvas = element("canvas", { tabIndex: 0, aria: { label } });
    this.canvas.setAttribute("role", "img");
    this.#cursor = element("div", { className: "cursor", hidden: true });
    const map = element("div", { className: "strip" }, this.canvas, this.#cursor);
    this.element = element("div", {}, map, this.#marks);
    this.#onMove = onMove;
    this.canvas.addEventListener("pointerdown", (event) => this.#point(event));
    this.canvas.addEventListener("pointermove", (event) => event.buttons && this.#point(event));
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    onTheme(() => this.#paint());
  }

  #cursor;
  #marks = element("div", { className: "strip-marks", aria: { hidden: "true" } });
  #onMove;

  /** Draw columns x rows, each in the color that `colorOf(column, row)` says.
   *
   * Under them runs of columns are marked by the source that `sourceAt(column)` says.
   */
  draw(columns, rows, colorOf, sourceAt = () => "computed") {
    this.#mark(columns, sourceAt);
    this.#size = [columns, rows];
    this.#colorOf = colorOf;
    this.canvas.style.setProperty("height", `${clamp(rows * 6, 48, 240)}px`);
    this.#paint();
  }

  #mark(columns, sourceAt) {
    const made = [];
    for (let first = 0, next = 1; next <= columns; next += 1) {
      const source = sourceAt(first);
      if (next < columns && sourceAt(next) === source) continue;
      const [left, width] = [first, next - first].map((value) => `${(100 * value) / columns}%`);
      if (source !== "computed") made.push(element("i", { data: { source, first, next }, style: { left, width } }));
      first = next;
    }
    this.#marks.replaceChildren(...made);
  }

  /** Put the cursor on a cell. */
  show(column, row) {
    this.#at = [column, row];
    const [columns, rows] = this.#size;
    this.#cursor.hidden = columns === 0;
    const box = {
      left: column / columns, top: row / rows, width: 1 / columns, height: 1 / rows,
    };
    for (const [side, share] of Object.entries(box)) {
      this.#cursor.style.setProperty(side, `${100 * share}%`);
    }
  }

  #paint() {
    if (this.#colorOf) paint(this.canvas, ...this.#size, this.#colorOf);
  }

  #point(event) {
    const [x, y] = placeIn(this.canvas, event);
    const [columns, rows] = this.#size;
    this.#move(Math.floor(x * columns), Math.floor(y * rows));
  }

  #key(event) {
    const step = arrow(event);
    if (!step) return;
    event.preventDefault();
    this.#move(this.#at[0] + step[0], this.#at[1] + step[1]);
  }

  #move(column, row) {
    const [columns, rows] = this.#size;
    if (columns) this.#onMove(clamp(column, 0, columns - 1), clamp(row, 0, rows - 1));
  }
}

/** The color of a cell without a row: stripes of two grays, as the tokens' hatching. */
export function hatched(column, row, { none, middle }) {
  return (column + row) % 2 ? none : middle;
}
