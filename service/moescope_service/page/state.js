// The state of the capture, as an operator needs it: from /moescope/info and /metrics.

import { element } from "./dom.js";
import { bytes, count, percent, span, time } from "./numbers.js";
import { Polling } from "./polling.js";

const POLL_MS = 5000;
const LOSSES = {
  moescope_rows_lost_total: ["Rows that workers could not ship", "reason"],
  moescope_trace_rows_missing_total: ["Missing rows of traces", "cause"],
  moescope_registrations_lost_total: ["Requests whose registration was lost", null],
  moescope_log_traces_dropped_total: ["Traces that the log lacks", null],
  moescope_archive_traces_dropped_total: ["Traces that the archive lacks", "cause"],
  moescope_collector_errors_total: ["Errors in the collector", null],
  moescope_collector_restarts_total: ["Restarts of the collector", null],
};

export class State {
  #poll;

  constructor(section, api, report) {
    this.#poll = new Polling(async (signal) => {
      const [info, metrics] = await Promise.all([
        api.json("moescope/info", {}, signal),
        api.fetch("metrics", {}, signal).then((response) => response.text()),
      ]);
      section.replaceChildren(...groups(info, samplesOf(metrics)));
    }, POLL_MS, report);
  }

  start() {
    this.#poll.start();
  }

  stop() {
    this.#poll.stop();
  }

  restart() {
    this.#poll.restart();
  }
}

/** Return the samples of moescope's losses and lag: {name, labels, value}. */
export function samplesOf(text) {
  const line = /^(moescope_\w+)(?:\{(.*)\})? (\S+)$/;
  return text.split("\n").map((one) => line.exec(one)).filter(Boolean)
    .filter(([, name]) => name in LOSSES || name === "moescope_collector_lag_seconds")
    .map(([, name, labels, value]) => ({ name, labels: labels ?? "", value: Number(value) }));
}

function groups(info, samples) {
  const { store, log } = info;
  const lag = samples.find((one) => one.name === "moescope_collector_lag_seconds");
  const versions = Object.entries(info.versions).map(([name, version]) => `${name} ${version}`);
  return [
    group("Capture", {
      "Capture": info.capture === "on" ? "on" : "paused: rows of meanwhile are missing",
      "Mode": info.mode === "counts" ? "counts: no routes are kept" : "routes",
      "Kept by default": info.routes_default === "on" ? percent(info.routes_sample) : "no request",
      "Token ids": info.token_ids ? "kept" : "left out",
      "Weights": info.weights_version === null ? "–" : `number ${info.weights_version}`,
    }),
    group("Lost", losses(samples)),
    group("Collector", {
      "Running since": `${time(info.started_s)} (${span(Date.now() / 1000 - info.started_s)})`,
      "Lag of the newest step": lag ? `${(1000 * lag.value).toFixed(0)} ms` : "–",
    }),
    group("Store", {
      "Traces": count(store.traces),
      "Memory": [element("meter", { max: store.limit_bytes, value: store.bytes, aria: { label: "Store in use" } }),
        ` ${bytes(store.bytes)} of ${bytes(store.limit_bytes)}`],
      "Made room for newer ones": count(store.evicted),
    }),
    group("Log", {
      "State": { off: "off", ok: "ok", failing: "failing: the file takes no lines, or too slowly" }[log.state],
      "Traces that it lacks": count(log.dropped),
    }),
    group("Model", {
      "Name": info.model,
      "Layers with experts": `${info.layers.length} of ${info.num_hidden_layers}`,
      "Experts a layer": `${info.num_experts}, top-${info.top_k}`,
      "Routers": [...new Set(info.router_types)].join(", "),
      "Device": info.device,
      "Versions": versions.join(", "),
    }),
  ];
}

function losses(samples) {
  return Object.fromEntries(Object.entries(LOSSES).map(([name, [title, label]]) => {
    const found = samples.filter((one) => one.name === name && one.value > 0);
    const total = found.reduce((sum, one) => sum + one.value, 0);
    const why = label && found.map((one) =>
      `${new RegExp(`${label}="([^"]*)"`).exec(one.labels)?.[1]} ${count(one.value)}`).join(", ");
    return [title, why ? `${count(total)} (${why})` : count(total)];
  }));
}

function group(title, values) {
  const lines = Object.entries(values).map(([name, value]) => element("div", {},
    element("dt", { textContent: name }),
    element("dd", { data: { name } }, ...(Array.isArray(value) ? value : [value]))));
  return element("article", {}, element("h2", { textContent: title }), element("dl", {}, ...lines));
}
