// The page's side of the REST API: models, readiness, and chat completions as a stream of OpenAI's chunks.
// Whatever goes wrong becomes an ApiError with a sentence for people; nothing here touches the document.

import { readEvents } from "./sse.js";

/** A request that failed, in words that can be shown. */
export class ApiError extends Error {
  /**
   * @param {string} message what went wrong, and what to do
   * @param {number} status of the response; 0 if there was none, or if the stream broke
   * @param {number} [retryAfter] seconds that the server asks to wait
   */
  constructor(message, status, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/**
 * Ask whether the server takes requests yet.
 *
 * @returns {Promise<boolean>} false while it loads, drains, or cannot be reached
 */
export async function isReady() {
  try {
    return (await fetch("ready", { cache: "no-store" })).ok;
  } catch {
    return false;
  }
}

/**
 * List the models, adapters among them.
 *
 * @param {string} key API key, or ""
 * @returns {Promise<string[]>} their names, the server's default first
 * @throws {ApiError}
 */
export async function listModels(key) {
  const response = await request("v1/models", { headers: headers(key) });
  return (await response.json()).data.map((model) => model.id);
}

/**
 * Ask for a completion.
 *
 * @param {object} body of POST /v1/chat/completions, with stream: true
 * @param {string} key API key, or ""
 * @param {AbortSignal} signal closes the connection, upon which the server stops generating
 * @returns {AsyncGenerator<object>} chunks of the kind chat.completion.chunk
 * @throws {ApiError} also in mid-stream, for an error event and for a stream that ends before it said so
 */
export async function* streamChat(body, key, signal) {
  const options = { method: "POST", headers: headers(key, "application/json"), body: JSON.stringify(body), signal };
  const response = await request("v1/chat/completions", options);
  let ended = false;
  try {
    for await (const data of readEvents(response.body)) {
      if (data === "[DONE]") return;
      const chunk = parseChunk(data);
      if (chunk.error) throw new ApiError(chunk.error.message ?? "The server failed.", 0);
      ended ||= Boolean(chunk.choices?.[0]?.finish_reason);
      yield chunk;
    }
  } catch (error) {
    throw error instanceof ApiError || signal.aborted ? error : broken();
  }
  if (!ended) throw broken();
}

const broken = () => new ApiError("The connection ended before the reply did.", 0);

/** @param {string} data @returns {object} */
function parseChunk(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError(`The server sent something that is not JSON: ${data.slice(0, 80)}`, 0);
  }
}

function headers(key, type) {
  return { ...(type && { "Content-Type": type }), ...(key && { Authorization: `Bearer ${key}` }) };
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options); // relative: the server may live behind a prefix
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached. Is it running?", 0);
  }
  if (response.ok) return response;
  const seconds = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  throw new ApiError(await explain(response), response.status, Number.isNaN(seconds) ? undefined : seconds);
}

/** Say what the status means and then, if the server has words of its own, those. */
async function explain(response) {
  const meaning = { 401: "The server wants an API key.", 429: "The server is busy.", 503: "The server is not ready." };
  const start = meaning[response.status] ?? `The server refused the request (${response.status}).`;
  try {
    const { error, detail } = await response.json();
    const said = error?.message ?? detail;
    return typeof said === "string" ? `${start.slice(0, -1)}: ${said}` : start;
  } catch {
    return start;
  }
}
