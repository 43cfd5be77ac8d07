// Starts the page: the views and which one is seen, the key, and what is wrong with the server.
// In a file of `moescope view` the traces are within, and what needs a server is left out.

import { Api } from "./api.js";
import { Compare } from "./compare.js";
import { setText } from "./dom.js";
import { Embedded } from "./embedded.js";
import { ExpertView } from "./expert.js";
import { Live } from "./live.js";
import { Polling } from "./polling.js";
import { RequestView } from "./request.js";
import { Requests } from "./requests.js";
import { State } from "./state.js";
import { fetchTraces } from "./trace.js";
import { Whole } from "./whole.js";

const RUNNING_MS = 1000;
const find = (id) => document.getElementById(id);
const isFile = find("saved") !== null;
if (isFile) {
  for (const one of document.querySelectorAll("[data-needs=server]")) one.remove();
  setText(document.querySelector('nav [href="#live"]'), "Experts");
}
const api = isFile ? await opened(find("saved").textContent) : new Api();

/** Return what answers from the traces in this file, or say why it cannot be read. */
async function opened(saved) {
  try {
    return await Embedded.unpack(saved);
  } catch (error) {
    setText(find("problem"), `This browser cannot read the traces in this file: ${error.message}`);
    find("problem").hidden = false;
    throw error;
  }
}

/** What to tell of an error, by the server's status. */
const ADVICE = {
  0: ["away", "The server does not answer. The page tries again."],
  401: ["locked", "This server asks for an API key: type it in above."],
  403: ["refused", ""],
  404: ["ok", ""],
  409: ["ok", ""],
  410: ["ok", ""],
  422: ["ok", ""],
  503: ["waiting", "The page tries again."],
};

/** Show an error, or that there is none. */
function report(error) {
  const [state, advice] = error ? ADVICE[error.status] ?? ["failed", ""] : ["ok", ""];
  const message = error && error.status !== 0 && error.status !== 401 ? error.message : "";
  setText(find("problem"), [message, advice].filter(Boolean).join(" "));
  find("problem").hidden = !error;
  find("status").dataset.state = state;
  setText(find("status"), { ok: api.told ?? "connected", away: "no answer", locked: "key wanted", waiting: "collector away",
    refused: "refused", failed: "failed" }[state]);
  if (state === "away") api.forget(); // who answers next may serve another model
  if (state === "ok") tellModel();
}

async function tellModel() {
  try {
    const { model, layers, num_experts: experts, top_k: topK } = await api.info();
    setText(find("model"), `${model}: ${layers.length} layers, ${experts} experts, top-${topK}`);
  } catch {
    // Whoever asks next reports it.
  }
}

/** Shows the requests that the address names, once they have ended. */
class Opened {
  #poll;

  /** `draw(ids, traces, place)` is called with what the address names. */
  constructor(draw) {
    let opened = null;
    this.ids = [];
    this.place = {};
    this.#poll = new Polling(async (signal) => {
      const wanted = this.ids;
      if (opened === wanted) return;
      const found = await Promise.all(wanted.map((id) => fetchTraces(api, id, signal)));
      if (found.includes(null)) {
        setText(find("problem"), "The request is still running: it is shown when it ends.");
        find("problem").hidden = false;
        return;
      }
      opened = wanted;
      draw(wanted, found, this.place);
    }, RUNNING_MS, (error) => error && report(error));
  }

  open(ids, place) {
    const isOther = JSON.stringify([ids, place]) !== JSON.stringify([this.ids, this.place]);
    if (isOther) {
      [this.ids, this.place] = [ids, place];
      this.#poll.restart();
    }
    this.#poll.start();
  }

  stop() {
    this.#poll.stop();
  }

  restart() {
    this.#poll.restart();
  }
}

const request = new RequestView(find("request"), api, report);
const compare = new Compare(find("compare"));
const VIEWS = {
  live: isFile ? new Whole(find("live"), api) : new Live(find("live"), api, report),
  requests: new Requests(find("requests"), api, report, (ids) => compare.offer(ids)),
  expert: new ExpertView(find("expert"), api, report),
  request: new Opened((ids, [traces = null, others = null], place) => {
    report(null);
    request.show(traces, others, place);
  }),
  compare: new Opened((ids, found) => {
    report(null);
    compare.show(ids, found.length === 2 ? found.map(([first]) => first) : null);
  }),
  ...(isFile ? {} : { state: new State(find("state"), api, report) }),
};

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // typed in by hand, with a percent sign of its own
  }
}

/** Show the view that the address names, such as #request/ID, at a place such as ?layer=2&position=5. */
function turn() {
  const [address, place] = window.location.hash.slice(1).split("?");
  const [name, ...ids] = address.split("/").map(decoded);
  const chosen = Object.hasOwn(VIEWS, name) ? name : "live";
  find("problem").hidden = true;
  for (const [view, shown] of Object.entries(VIEWS)) {
    find(view).hidden = view !== chosen;
    if (view !== chosen) shown.stop();
  }
  for (const tab of document.querySelectorAll("nav a")) {
    const isChosen = tab.getAttribute("href").split(/[/?]/)[0] === `#${chosen}`;
    if (isChosen) {
      tab.setAttribute("aria-current", "page");
      tab.href = window.location.hash || "#live"; // so that the tab leads back to it
    } else tab.removeAttribute("aria-current");
  }
  const view = VIEWS[chosen];
  if (view.open) view.open(ids, Object.fromEntries(new URLSearchParams(place)));
  else view.start();
}

find("key-form")?.addEventListener("submit", (event) => {
  event.preventDefault();
  api.key = find("key").value;
  Object.values(VIEWS).forEach((view) => view.restart());
});
window.addEventListener("hashchange", turn);
if (isFile) report(null);
turn();
