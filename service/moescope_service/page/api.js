// Asks the server. The key is kept here, in memory alone, and sent with each request.

/** What the server answered, or 0 as the status where it did not answer. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export class Api {
  #key = "";
  #info = null;

  set key(value) {
    this.#key = value.trim();
    this.forget();
  }

  /** Return what `/moescope/info` answers, asked for once until `forget`. */
  async info() {
    this.#info ??= await this.json("moescope/info");
    return this.#info;
  }

  /** Ask for what does not change anew: the server may be another one. */
  forget() {
    this.#info = null;
  }

  /** Return the response to a path with parameters; those that are undefined are left out. */
  async fetch(path, parameters = {}, signal = undefined) {
    const given = Object.entries(parameters).filter(([, value]) => value !== undefined);
    const query = given.length ? `?${new URLSearchParams(given)}` : "";
    const headers = this.#key ? { Authorization: `Bearer ${this.#key}` } : {};
    let response;
    try {
      response = await fetch(path + query, { headers, signal, cache: "no-store" });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ApiError(0, "the server does not answer");
    }
    if (!response.ok) throw new ApiError(response.status, await messageOf(response));
    return response;
  }

  /** Return the JSON that a path answers. */
  async json(path, parameters = {}, signal = undefined) {
    return (await this.fetch(path, parameters, signal)).json();
  }

  /** Return a page of a request's traces, and null while it runs. */
  async routes(requestId, parameters, signal = undefined) {
    const path = `routes/${encodeURIComponent(requestId)}`;
    const response = await this.fetch(path, parameters, signal);
    return response.status === 202 ? null : response.json();
  }

  /** Yield the events of `/experts/stream`; ends with the server's error, or when aborted. */
  async *experts(signal) {
    for await (const { values } of this.#events("experts/stream", {}, signal)) {
      yield { ...values, counts: await unpacked(values.counts) };
    }
  }

  /** Yield lists of sequences that ended, as they end; ends as `experts` does. */
  async *ended(signal) {
    for await (const { name, values } of this.#events("routes", { follow: true }, signal)) {
      if (name === "message") yield values.sequences;
    }
  }

  async *#events(path, parameters, signal) {
    const response = await this.fetch(path, parameters, signal);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (signal.aborted) throw error;
        throw new ApiError(0, "the server ended the stream");
      }
      if (part.done) throw new ApiError(0, "the server ended the stream");
      const events = (text + part.value).split("\n\n");
      text = events.pop();
      for (const event of events) yield parsed(event);
    }
  }
}

async function messageOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

function parsed(event) {
  const fields = Object.fromEntries(
    event.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 2)]),
  );
  const values = JSON.parse(fields.data);
  if (fields.event === "error") throw new ApiError(values.error.code, values.error.message);
  return { name: fields.event ?? "message", values };
}

/** Return the numbers of base64 of zlib of little-endian uint32. */
async function unpacked(base64) {
  const packed = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint32Array(await new Response(stream).arrayBuffer());
}
