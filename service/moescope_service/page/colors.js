// Colors, for light and dark, that color-blind people can tell apart.
//
// Diverging: blue to orange. Of kinds: Okabe and Ito's seven, and gray for all others.

const dark = window.matchMedia("(prefers-color-scheme: dark)");
const THEMES = {
  light: { low: [8, 81, 156], middle: [244, 244, 240], high: [166, 64, 0], none: [214, 214, 214],
    least: [240, 240, 236], most: [8, 64, 129], other: [203, 206, 211] },
  dark: { low: [100, 181, 255], middle: [36, 39, 44], high: [255, 160, 77], none: [70, 72, 76],
    least: [36, 39, 44], most: [134, 200, 255], other: [92, 97, 105] },
};
const KINDS = [
  [230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [0, 114, 178], [213, 94, 0],
  [204, 121, 167],
];
/** How many kinds have a color of their own. */
export const NUM_KINDS = KINDS.length;

export const theme = () => (dark.matches ? THEMES.dark : THEMES.light);

/** Call back when the user switches between light and dark. */
export const onTheme = (callback) => dark.addEventListener("change", callback);

const mix = (from, to, share) => from.map((value, i) => Math.round(value + (to[i] - value) * share));

/** Return the color of -1 (low) over 0 (middle) to 1 (high); gray of what is no number. */
export function diverging(value) {
  const { low, middle, high, none } = theme();
  if (Number.isNaN(value)) return none;
  // Small differences are to be seen, too.
  return mix(middle, value < 0 ? low : high, Math.min(Math.abs(value), 1) ** 0.75);
}

/** Return the color of 0 (least) to 1 (most); gray of what is no number. */
export function sequential(value) {
  const { least, most, none } = theme();
  return Number.isNaN(value) ? none : mix(least, most, Math.min(Math.max(value, 0), 1));
}

/** Return the color of a kind by its rank; gray from `NUM_KINDS` on. */
export const kind = (rank) => KINDS[rank] ?? theme().other;

export const css = ([red, green, blue]) => `rgb(${red} ${green} ${blue})`;

/** Return black or white, whichever is read better on a color. */
export function textOn(color) {
  const [red, green, blue] = color.map((value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  return luminance > 0.179 ? "#000" : "#fff";
}

/** Draw a picture of one pixel a cell; CSS stretches it. */
export function paint(canvas, width, height, colorOf) {
  canvas.width = Math.max(width, 1);
  canvas.height = Math.max(height, 1);
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  for (let y = 0, at = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1, at += 4) {
      image.data.set(colorOf(x, y), at);
      image.data[at + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
}
