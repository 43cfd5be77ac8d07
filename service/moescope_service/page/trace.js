// A trace as /routes/{id} answers it, page by page: what each token went to in each layer.

import { weightsEntropy } from "./balance.js";

/** Rows that are asked for at a time. */
export const PAGE_ROWS = 1024;

/** Fetch the first rows of a request's traces; null while it runs. */
export async function fetchTraces(api, requestId, signal) {
  const answer = await page(api, requestId, {}, signal);
  return answer && answer.traces.map((values) => new Trace(values));
}

/** Fetch a page, with the tokens' text where the server has a tokenizer. */
async function page(api, requestId, parameters, signal) {
  const { tokenizer } = await api.info();
  return api.routes(requestId, { ...parameters, limit: PAGE_ROWS, tokens: tokenizer || undefined }, signal);
}

/** Jaccard's index of the experts of two traces at a position and layer; NaN where one has no row. */
export function agreement(one, other, position, layerAt) {
  const [a, b] = [one, other].map((trace) => trace.ids[position]?.[layerAt]);
  if (!a || !b) return NaN;
  const shared = a.filter((expert) => b.includes(expert)).length;
  return shared / (a.length + b.length - shared);
}

export class Trace {
  constructor(values) {
    this.facts = values;
    this.layers = values.layers;
    this.promptLen = values.prompt_len;
    this.numTokens = values.num_tokens;
    this.numExperts = values.num_experts;
    this.name = values.request_id;
    this.index = values.index;
    this.#append(values);
  }

  #append({ topk_ids, topk_weights, source, token_ids, tokens }) {
    this.ids = [...(this.ids ?? []), ...topk_ids];
    this.weights = topk_weights && [...(this.weights ?? []), ...topk_weights];
    this.source = [...(this.source ?? []), ...source];
    this.tokenIds = token_ids && [...(this.tokenIds ?? []), ...token_ids];
    this.tokens = tokens && [...(this.tokens ?? []), ...tokens];
  }

  get numRows() {
    return this.source.length;
  }

  /** Whether the server has more rows than were fetched. */
  get hasMore() {
    return this.numRows < this.numTokens - 1;
  }

  /** How many tokens can be shown: the last one has no row, and comes with the last page. */
  get numShown() {
    return this.hasMore ? this.numRows : this.numTokens;
  }

  /** Fetch the next rows. */
  async more(api) {
    const { traces } = await page(api, this.name, { start: this.numRows, index: this.index });
    const { request_id, created_s } = this.facts;
    const same = (one) => one.request_id === request_id && one.created_s === created_s;
    this.#append(traces.find(same));
  }

  /** Where the row at a position came from; `unrouted` of the last token. */
  sourceAt(position) {
    return this.source[position] ?? "unrouted";
  }

  /** The token at a position, as its text or else its number. */
  tokenAt(position) {
    const text = this.tokens?.[position];
    if (text !== undefined && text !== null) return text;
    return String(this.tokenIds?.[position] ?? "·");
  }

  /** {ids, weights, expert, weight, entropy} at a position and layer, where there is a row.
   *
   * `expert` is that of the largest weight, and the first one where weights are left out.
   */
  at(position, layerAt) {
    const ids = this.ids[position]?.[layerAt];
    if (!ids) return null;
    const weights = this.weights?.[position]?.[layerAt] ?? null;
    const top = weights ? weights.indexOf(Math.max(...weights)) : 0;
    return {
      ids,
      weights,
      expert: ids[top],
      weight: weights ? weights[top] : NaN,
      entropy: weights ? weightsEntropy(weights) : NaN,
    };
  }
}
