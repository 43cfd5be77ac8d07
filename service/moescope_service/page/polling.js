// Does work again and again while a view is seen: not behind other views, nor in a hidden tab.

const RETRY_MS = 2000;

/** Runs `work(signal)` while started and visible; after an error it is tried again.
 *
 * `work` is called anew `everyMs` after it ended; once alone where that is null. `report` is told the error, or null.
 */
export class Polling {
  #work;
  #everyMs;
  #report;
  #isOn = false;
  #abort = null;

  constructor(work, everyMs, report) {
    this.#work = work;
    this.#everyMs = everyMs;
    this.#report = report;
    document.addEventListener("visibilitychange", () => this.#turn());
  }

  start() {
    this.#isOn = true;
    this.#turn();
  }

  stop() {
    this.#isOn = false;
    this.#turn();
  }

  /** Begin anew at once, if it runs. */
  restart() {
    this.#abort?.abort();
    this.#abort = null;
    this.#turn();
  }

  #turn() {
    const runs = this.#isOn && !document.hidden;
    if (runs && this.#abort === null) {
      this.#abort = new AbortController();
      this.#run(this.#abort.signal);
    } else if (!runs && this.#abort !== null) {
      this.#abort.abort();
      this.#abort = null;
    }
  }

  async #run(signal) {
    while (!signal.aborted) {
      let waitMs = this.#everyMs;
      try {
        await this.#work(signal);
        if (!signal.aborted) this.#report(null);
        if (waitMs === null) return;
      } catch (error) {
        if (signal.aborted) return;
        this.#report(error);
        waitMs = RETRY_MS;
      }
      await new Promise((resolve) => setTimeout(resolve, waitMs));
    }
  }
}

/** Joins what several sources report: `errorsOf(report)(name)` is what the one of that name calls.
 *
 * An error is reported until all are well.
 */
export function errorsOf(report) {
  const errors = new Map();
  return (name) => {
    errors.set(name, null);
    return (error) => {
      errors.set(name, error);
      report([...errors.values()].find((one) => one !== null) ?? null);
    };
  };
}
