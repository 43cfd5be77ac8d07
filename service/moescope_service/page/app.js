// Starts the page: the views and which one is seen, the key, and what is wrong with the server.
// In a file of `moescope view` the traces are within, and what needs a server is left out.

import { Api } from "./api.js";
import { Compare } from "./compare.js";
import { setText } from "./dom.js";
import { Embedded } from "./embedded.js";
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
  if (state === "ok") tellModel();
}

let isModelTold = false;

async function tellModel() {
  if (isModelTold) return;
  isModelTold = true;
  try {
    const { model, layers, num_experts: experts, top_k: topK } = await api.json("moescope/info");
    setText(find("model"), `${model}: ${layers.length} layers, ${experts} experts, top-${topK}`);
  } catch {
    isModelTold = false;
  }
}

/** Shows the requests that the address names, once they have ended. */
class Opened {
  #poll;

  constructor(draw) {
    let opened = null;
    this.ids = [];
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
      draw(wanted, found);
    }, RUNNING_MS, (error) => error && report(error));
  }

  open(ids) {
    if (String(ids) !== String(this.ids)) this.ids = ids;
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
  request: new Opened((ids, found) => {
    report(null);
    request.show(found[0] ?? null);
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

/** Show the view that the address names, such as #request/ID. */
function turn() {
  const [name, ...ids] = window.location.hash.slice(1).split("/").map(decoded);
  const chosen = Object.hasOwn(VIEWS, name) ? name : "live";
  find("problem").hidden = true;
  for (const [view, shown] of Object.entries(VIEWS)) {
    find(view).hidden = view !== chosen;
    if (view !== chosen) shown.stop();
  }
  for (const tab of document.querySelectorAll("nav a")) {
    const isChosen = tab.getAttribute("href").split("/")[0] === `#${chosen}`;
    if (isChosen) {
      tab.setAttribute("aria-current", "page");
      tab.href = window.location.hash || "#live"; // so that the tab leads back to it
    } else tab.removeAttribute("aria-current");
  }
  if (VIEWS[chosen] instanceof Opened) VIEWS[chosen].open(ids);
  else VIEWS[chosen].start();
}

find("key-form")?.addEventListener("submit", (event) => {
  event.preventDefault();
  api.key = find("key").value;
  isModelTold = false;
  Object.values(VIEWS).forEach((view) => view.restart());
});
window.addEventListener("hashchange", turn);
if (isFile) report(null);
turn();
