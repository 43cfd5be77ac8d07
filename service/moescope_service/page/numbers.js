// Writes numbers and times as the page shows them.

const whole = new Intl.NumberFormat("en");
const clock = new Intl.DateTimeFormat("en", { timeStyle: "medium", hourCycle: "h23" });
const day = new Intl.DateTimeFormat("en", { dateStyle: "medium" });

export const count = (value) => whole.format(value);
export const fixed = (value, digits) => (Number.isFinite(value) ? value.toFixed(digits) : "–");
export const percent = (share) => `${(100 * share).toFixed(share === 0 || share === 1 ? 0 : 1)}%`;

/** Return a time of today, or of another day with its date; a dash where it is unknown. */
export function time(seconds) {
  if (seconds === null) return "–";
  const [then, today] = [1000 * seconds, Date.now()].map((one) => day.format(one));
  return `${then === today ? "" : `${then}, `}${clock.format(1000 * seconds)}`;
}

/** Return a span of time in words, such as "1 min 20 s". */
export function span(seconds) {
  const rounded = Math.round(seconds);
  if (rounded < 120) return `${rounded} s`;
  if (rounded < 7200) return `${Math.floor(rounded / 60)} min`;
  return `${Math.floor(rounded / 3600)} h ${Math.floor((rounded % 3600) / 60)} min`;
}

/** Return a size in bytes, with a unit. */
export function bytes(size) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (size >= 1024 && power < units.length - 1) {
    size /= 1024;
    power += 1;
  }
  return `${size.toFixed(power && size < 10 ? 1 : 0)} ${units[power]}`;
}
