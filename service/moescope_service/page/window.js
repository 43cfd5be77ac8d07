// Sums the events of the stream over the last seconds.

const NUM_SLICES = 10;

/** Counts of the last `seconds`, in slices of a tenth: what it covers may be that much longer. */
export class LiveWindow {
  #seconds;
  #slices = [];
  #sum = null;
  #rows = [];
  #to = null;

  constructor(seconds) {
    this.#seconds = seconds;
  }

  get coveredS() {
    return this.#slices.reduce((sum, slice) => sum + slice.seconds, 0);
  }

  get isWhole() {
    return this.coveredS >= this.#seconds;
  }

  /** Counts [phases x layers x experts]. */
  get counts() {
    return this.#sum;
  }

  /** Rows by phase. */
  get rows() {
    return this.#rows;
  }

  /** Take an event in. After one that was skipped the window begins anew: it would lack something. */
  add(event) {
    if (event.from_s !== this.#to || event.counts.length !== this.#sum?.length) {
      this.clear();
      this.#sum = new Float64Array(event.counts.length);
      this.#rows = event.num_rows.map(() => 0);
    }
    this.#to = event.to_s;
    const seconds = event.to_s - event.from_s;
    if (seconds === 0) return;
    const last = this.#slices.at(-1);
    if (last === undefined || last.seconds >= this.#seconds / NUM_SLICES - 0.5) {
      this.#slices.push({ seconds, counts: event.counts.slice(), rows: [...event.num_rows] });
    } else {
      last.seconds += seconds;
      event.counts.forEach((value, i) => { last.counts[i] += value; });
      last.rows = last.rows.map((value, i) => value + event.num_rows[i]);
    }
    this.#count(event.counts, event.num_rows, 1);
    while (this.coveredS - this.#slices[0].seconds >= this.#seconds) {
      const { counts, rows } = this.#slices.shift();
      this.#count(counts, rows, -1);
    }
  }

  /** Begin anew. */
  clear() {
    this.#slices = [];
    this.#to = null;
  }

  #count(counts, rows, sign) {
    counts.forEach((value, i) => { this.#sum[i] += sign * value; });
    this.#rows = this.#rows.map((value, i) => value + sign * rows[i]);
  }
}
