// The tokens of a trace in a row, colored by a layer; one of them is chosen.

import { css, textOn } from "./colors.js";
import { element } from "./dom.js";
import { agreement } from "./trace.js";

/** Write white space so that it is seen. */
export const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");

/** The element of one token: its text, and under it the top expert of the layer. */
export function tokenElement(trace, position, layerAt, shading) {
  const row = trace.at(position, layerAt);
  const color = shading.color(trace, position, layerAt);
  const data = { position, source: trace.sourceAt(position) };
  if (row) Object.assign(data, { expert: row.expert, weight: row.weight });
  if (shading.other) data.agreement = agreement(trace, shading.other, position, layerAt);
  const style = color ? { "background-color": css(color), color: textOn(color) } : {};
  const text = element("bdi", { textContent: visible(trace.tokenAt(position)) });
  const below = element("small", { textContent: row?.expert ?? "–" });
  const part = position < trace.promptLen ? "prompt" : "output";
  return element("span", { className: `token ${part}`, data, style, tabIndex: -1 }, text, below);
}

/** Call back with the position of the token that the user points at, focuses or taps. */
export function onToken(container, callback) {
  const choose = (event) => {
    const token = event.target.closest?.(".token");
    if (token) callback(Number(token.dataset.position));
  };
  for (const kind of ["pointerover", "focusin", "click"]) container.addEventListener(kind, choose);
}
