// Answers what a server would, from the traces that `moescope view` put into this file.

import { ApiError } from "./api.js";

const HALF_SUBNORMAL = 2 ** -24;
const ARRAYS = { uint8: Uint8Array, uint16: Uint16Array, int32: Int32Array, float32: Float32Array,
  float16: Uint16Array };
const SOURCES = ["computed", "cached", "missing", "recalled"];
const PHASES = { prefill: (row, length) => row < length, decode: (row, length) => row >= length,
  all: () => true };

/** A source of data, as `Api` is. What it answers never changes. */
export class Embedded {
  #header;
  #traces;

  /** Unpack what moescope/view/pack.py packed. */
  static async unpack(base64) {
    const letters = atob(base64);
    const packed = new Uint8Array(letters.length);
    for (let i = 0; i < packed.length; i += 1) packed[i] = letters.charCodeAt(i);
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const buffer = await new Response(stream).arrayBuffer();
    const start = 4 + new DataView(buffer).getUint32(0, true);
    return new Embedded(JSON.parse(new TextDecoder().decode(buffer.slice(4, start))), buffer, start);
  }

  constructor(header, buffer, start) {
    this.#header = header;
    let at = start;
    const next = (dtype, length) => {
      if (dtype === null) return null;
      const array = joined(buffer, at, length, ARRAYS[dtype]);
      at += array.byteLength;
      return dtype === "float16" ? Float32Array.from(array, half) : array;
    };
    this.#traces = header.traces.map(({ dtypes: [weights, tokens, ids, source], tokens: texts, ...facts }) => {
      const rows = Math.max(facts.num_tokens - 1, 0);
      const size = rows * header.layers.length * header.top_k;
      return { facts, texts, rows, weights: next(weights, size), tokens: next(tokens, facts.num_tokens),
        ids: next(ids, size), source: next(source, rows) };
    });
  }

  /** What the file holds, in words. */
  get told() {
    const { num_requests: shown, num_left_out: others } = this.#header;
    return `${shown} saved ${shown === 1 ? "request" : "requests"}${others ? `, the first of ${shown + others}` : ""}`;
  }

  /** Return what `/moescope/info` answers; texts are there for those who ask. */
  async info() {
    return { ...this.#header, tokenizer: true };
  }

  /** Yield nothing: no request ends any more. */
  async *ended(signal) {
    await new Promise((resolve) => { signal.addEventListener("abort", resolve); });
  }

  /** Return the JSON that a path answers. */
  async json(path, parameters = {}) {
    const [, layer, expert] = path.match(/^experts\/(\d+)\/(\d+)\/tokens$/) ?? [];
    if (layer !== undefined) return this.#expert(Number(layer), Number(expert), parameters.limit);
    if (path === "routes") return { sequences: this.#traces.map((one) => one.facts) };
    if (path === "experts") return this.#experts(parameters.phase ?? "all");
    throw new ApiError(404, `This file does not have ${decodeURIComponent(path)}.`);
  }

  /** Return a page of a request's traces. */
  async routes(requestId, { start = 0, limit = Infinity, index }) {
    const found = this.#traces.filter(({ facts }) =>
      facts.request_id === requestId && (index === undefined || facts.index === index));
    if (!found.length) throw new ApiError(404, `This file does not have the request ${requestId}.`);
    return { request_id: requestId, traces: found.map((one) => this.#page(one, start, limit)) };
  }

  #page({ facts, texts, rows, weights, tokens, ids, source }, start, limit) {
    const { layers, num_experts, top_k: topK } = this.#header;
    const end = Math.min(start + limit, rows);
    const lastToken = end === rows ? facts.num_tokens : end;
    const nested = (values, row) => (SOURCES[source[row]] === "missing" ? null : layers.map((_, at) => {
      const first = (row * layers.length + at) * topK;
      return [...values.subarray(first, first + topK)];
    }));
    const each = (callback) => Array.from({ length: Math.max(end - start, 0) }, (_, i) => callback(start + i));
    return {
      ...facts, layers, num_experts, top_k: topK, start,
      token_ids: tokens && [...tokens.slice(start, lastToken)],
      tokens: texts?.slice(start, lastToken),
      source: each((row) => SOURCES[source[row]]),
      topk_ids: each((row) => nested(ids, row)),
      topk_weights: weights && each((row) => nested(weights, row)),
    };
  }

  /** Count the selections of a phase; rows of requests whose prompt's end is unknown are in `all` alone. */
  #experts(phase) {
    const { layers, num_experts: numExperts, top_k: topK } = this.#header;
    const counts = new Float64Array(layers.length * numExperts);
    const size = layers.length * topK;
    let [numRows, numUnknown] = [0, 0];
    for (const { facts, rows, ids, source } of this.#traces) {
      for (let row = 0; row < rows; row += 1) {
        if (SOURCES[source[row]] === "missing") continue;
        if (phase !== "all" && facts.prompt_len === null) {
          numUnknown += 1;
        } else if (PHASES[phase](row, facts.prompt_len)) {
          numRows += 1;
          for (let i = 0; i < size; i += 1) counts[Math.floor(i / topK) * numExperts + ids[row * size + i]] += 1;
        }
      }
    }
    return { layers, num_experts: numExperts, num_rows: numRows, num_unknown: numUnknown, counts };
  }

  /** Count the tokens that went to an expert in a layer; the requests without token ids are left out. */
  #expert(layer, expert, limit) {
    const { layers, num_experts: numExperts, top_k: topK } = this.#header;
    const at = layers.indexOf(layer);
    if (at < 0 || expert >= numExperts) {
      throw new ApiError(404, `This file does not have expert ${expert} of layer ${layer}.`);
    }
    const known = this.#traces.filter((one) => one.tokens);
    if (!known.length) throw new ApiError(404, "The requests in this file have no token ids.");
    const found = new Map();
    const sums = { rows: 0, rows_missing: 0, rows_selected: 0 };
    for (const trace of known) {
      for (let position = 0; position < trace.rows; position += 1) {
        const first = (position * layers.length + at) * topK;
        const isMissing = SOURCES[trace.source[position]] === "missing";
        const isHere = !isMissing && trace.ids.subarray(first, first + topK).includes(expert);
        sums[isMissing ? "rows_missing" : "rows"] += 1;
        sums.rows_selected += isHere;
        if (!isMissing) tally(found, trace, position, isHere);
      }
    }
    const tokens = [...found.values()].filter((one) => one.count)
      .sort((a, b) => b.count - a.count || a.token_id - b.token_id).slice(0, limit)
      .map((one) => ({ ...one, share: one.count / one.total }));
    const requests = new Set(known.map((one) => one.facts.request_id)).size;
    return { layer, expert, requests, ...sums, tokens };
  }
}

/** Count a row's token among those found so far; the first that went to the expert says where it is. */
function tally(found, { facts, texts, tokens }, position, isHere) {
  const id = tokens[position];
  if (!found.has(id)) found.set(id, { token: null, token_id: id, count: 0, total: 0 });
  const one = found.get(id);
  one.total += 1;
  one.token ??= texts?.[position] ?? null;
  if (!isHere) return;
  if (!one.count) Object.assign(one, { request_id: facts.request_id, index: facts.index, position });
  one.count += 1;
}

/** Join bytes that were taken apart: all first ones, then all second ones. */
function joined(buffer, start, length, Kind) {
  const width = Kind.BYTES_PER_ELEMENT;
  const apart = new Uint8Array(buffer, start, length * width);
  const bytes = new Uint8Array(length * width);
  for (let byte = 0; byte < width; byte += 1) {
    for (let i = 0; i < length; i += 1) bytes[i * width + byte] = apart[byte * length + i];
  }
  return new Kind(bytes.buffer);
}

/** Return the number that the bits of IEEE 754's binary16 are. */
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * HALF_SUBNORMAL;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * 2 ** (exponent - 15) * (1 + fraction / 1024);
}
