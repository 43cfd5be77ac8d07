// The live view: the heatmap of a window and a phase.
//
// Short windows are summed here from the stream, once it has covered them; before that, and for
// long ones, the server's own windows are asked for.

import { setText } from "./dom.js";
import { Heatmap } from "./heatmap.js";
import { count, span } from "./numbers.js";
import { errorsOf, Polling } from "./polling.js";
import { link } from "./requests.js";
import { LiveWindow } from "./window.js";

const MAX_LIVE_S = 300;
const POLL_MS = 2000;

export class Live {
  #api;
  #heatmap;
  #parts;
  #window;
  #stream;
  #poll;
  #tell;

  constructor(section, api, report) {
    this.#api = api;
    const both = errorsOf(report);
    this.#tell = both("stream");
    const find = (id) => section.querySelector(id);
    this.#parts = { window: find("#window"), phase: find("#phase"), covered: find("#covered") };
    this.#heatmap = new Heatmap(find("#heatmap"), (layer, expert) => {
      window.location.hash = link("expert", layer, expert);
    });
    this.#window = new LiveWindow(this.#seconds);
    this.#stream = new Polling((signal) => this.#read(signal), 0, this.#tell);
    this.#poll = new Polling((signal) => this.#ask(signal), POLL_MS, both("poll"));
    this.#parts.window.addEventListener("change", () => this.restart());
    this.#parts.phase.addEventListener("change", () => this.#poll.restart());
  }

  start() {
    this.#stream.start();
    this.#poll.start();
  }

  stop() {
    this.#stream.stop();
    this.#poll.stop();
  }

  restart() {
    this.#stream.restart();
    this.#poll.restart();
  }

  get #seconds() {
    return Number(this.#parts.window.value) || Infinity;
  }

  get #isLive() {
    return this.#seconds <= MAX_LIVE_S && this.#window.isWhole;
  }

  async #read(signal) {
    this.#window = new LiveWindow(this.#seconds);
    const window = this.#window;
    try {
      for await (const event of this.#api.experts(signal)) {
        this.#tell(null);
        if (this.#seconds > MAX_LIVE_S) continue;
        window.add(event);
        if (this.#isLive) this.#showLive(event);
      }
    } finally {
      window.clear(); // what comes while nothing is read would be lacking
    }
  }

  #showLive({ phases, layers, num_experts: numExperts }) {
    const { counts, rows, coveredS } = this.#window;
    const wanted = this.#parts.phase.value;
    const chosen = phases.map((_, at) => at).filter((at) => wanted === "all" || phases[at] === wanted);
    const size = layers.length * numExperts;
    const sum = new Float64Array(size);
    for (const at of chosen) for (let i = 0; i < size; i += 1) sum[i] += counts[at * size + i];
    const numRows = chosen.reduce((total, at) => total + rows[at], 0);
    this.#show("stream", layers, numExperts, sum, numRows, coveredS);
  }

  async #ask(signal) {
    if (this.#isLive) return;
    const parameters = { phase: this.#parts.phase.value, window_s: this.#parts.window.value || undefined };
    const answer = await this.#api.json("experts", parameters, signal);
    const counts = Float64Array.from(answer.counts.flat());
    const seconds = answer.window_s ?? Date.now() / 1000 - answer.since_s;
    this.#show("server", answer.layers, answer.num_experts, counts, answer.num_rows, seconds);
  }

  #show(source, layers, numExperts, counts, numRows, seconds) {
    this.#heatmap.show(layers, numExperts, counts);
    this.#parts.covered.dataset.source = source;
    setText(this.#parts.covered, `${count(numRows)} tokens in the last ${span(seconds)}`);
  }
}
