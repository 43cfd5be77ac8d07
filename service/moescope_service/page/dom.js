// Makes elements. Whatever text they hold is set as text, never parsed as markup.

/** Return an element with properties, `data` attributes, a class, and children. */
export function element(tag, { data, aria, style, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  Object.assign(made.dataset, data);
  for (const [name, value] of Object.entries(aria ?? {})) made.setAttribute(`aria-${name}`, value);
  for (const [name, value] of Object.entries(style ?? {})) made.style.setProperty(name, value);
  made.append(...children);
  return made;
}

/** Return an option of a select. */
export const option = (value, text) => element("option", { value, textContent: text });

/** Return a select inside its label. */
export function labeled(text, control) {
  return element("label", {}, `${text} `, control);
}

/** Set an element's text, and touch nothing where it has it already: screen readers would read it. */
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/** Return where an event happened in an element, as shares of its width and height. */
export function placeIn(target, event) {
  const box = target.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}

/** Return the arrow keys' step, [columns, rows]; null of any other key. */
export function arrow(event) {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  return steps[event.key] ?? null;
}

export const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
