// The heatmap of all that a file holds: what Live is for a server.

import { setText } from "./dom.js";
import { Heatmap } from "./heatmap.js";
import { count } from "./numbers.js";
import { link } from "./requests.js";

export class Whole {
  #api;
  #heatmap;
  #phase;
  #covered;

  constructor(section, api) {
    this.#api = api;
    this.#phase = section.querySelector("#phase");
    this.#covered = section.querySelector("#covered");
    this.#heatmap = new Heatmap(section.querySelector("#heatmap"), (layer, expert) => {
      window.location.hash = link("expert", layer, expert);
    });
    this.#phase.addEventListener("change", () => this.start());
  }

  async start() {
    const answer = await this.#api.json("experts", { phase: this.#phase.value });
    this.#heatmap.show(answer.layers, answer.num_experts, answer.counts);
    const unknown = answer.num_unknown ? `; of ${count(answer.num_unknown)} more the phase is unknown` : "";
    setText(this.#covered, `${count(answer.num_rows)} tokens${unknown}`);
  }

  stop() {}
}
