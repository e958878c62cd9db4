// Conversations as plain, immutable data, and everything that is computed from them: requests, replies that grow by
// deltas, titles, counts. Pure functions; whatever changes returns a new object, so that views can compare by identity.

/**
 * @typedef {{id: string, type: "function", function: {name: string, arguments: string}}} ToolCall
 * @typedef {{prompt?: number, cached?: number, completion?: number, first?: number, last?: number, thought?: number,
 *     later?: number, finish?: string, model?: string}} Stats token counts; seconds to the first and the last text, and
 *     of the thought; the share of the text that the first chunk did not bring; why the reply ended; who wrote it
 * @typedef {{id: string, role: "user"|"assistant"|"tool"|"system", content: string, reasoning_content?: string,
 *     tool_calls?: ToolCall[], tool_call_id?: string, stats?: Stats}} Message
 * @typedef {{id: string, title: string, updated: number, system: string, tools: string, messages: Message[]}} Chat
 *     `system` is the system prompt and `tools` a JSON list, "" for neither; `updated` is in milliseconds
 */

let made = 0;
const newId = () => `${Date.now().toString(36)}-${(made++).toString(36)}-${Math.random().toString(36).slice(2, 8)}`;

/** @param {Partial<Chat>} [given] @returns {Chat} */
export const newChat = (given) => ({
  id: newId(), title: "", updated: Date.now(), system: "", tools: "", messages: [], ...given,
});

/** @param {Message["role"]} role @param {string} [content] @param {Partial<Message>} [more] @returns {Message} */
export const newMessage = (role, content = "", more = {}) => ({ id: newId(), role, content, ...more });

/** @param {Chat} chat @param {Message[]} messages @returns {Chat} the chat with these messages, stamped and titled */
export function withMessages(chat, messages) {
  const question = messages.find((message) => message.role === "user")?.content ?? "";
  return { ...chat, messages, updated: Date.now(), title: chat.title || titleOf(question) };
}

/** @param {string} text @returns {string} its beginning, on one line */
export function titleOf(text) {
  const line = text.trim().replace(/\s+/g, " ");
  const characters = [...line];
  return characters.length > 60 ? `${characters.slice(0, 59).join("").trimEnd()}…` : line;
}

/** @param {Chat} chat @param {string} id @returns {Chat} without a message and, if it called tools, their answers */
export function withoutMessage(chat, id) {
  const at = chat.messages.findIndex((message) => message.id === id);
  let end = at + 1;
  if (chat.messages[at]?.tool_calls) while (chat.messages[end]?.role === "tool") end++;
  return withMessages(chat, chat.messages.toSpliced(at, end - at));
}

/**
 * Bring back what was taken out of a conversation, whatever has been said since.
 *
 * @param {Chat} chat as it is now
 * @param {Chat} before
 * @param {Chat} after
 * @returns {Chat} with the messages that `before` has and `after` has not, where they stood
 */
export function withMessagesOf(chat, before, after) {
  const removed = before.messages.filter((message) => !after.messages.includes(message));
  return withMessages(chat, chat.messages.toSpliced(before.messages.indexOf(removed[0]), 0, ...removed));
}

/** @param {Chat} chat @returns {Chat} cut off behind what the last reply answered */
export function withoutReply(chat) {
  return withMessages(chat, chat.messages.slice(0, chat.messages.findLastIndex((m) => m.role !== "assistant") + 1));
}

/** @param {Message | null} message @returns {boolean} whether it holds anything worth keeping */
export const saysSomething = (message) =>
  Boolean(message && (message.content || message.reasoning_content || message.tool_calls?.length));

/**
 * Let a reply grow by one chunk of the stream.
 *
 * @param {Message} reply so far
 * @param {object} chunk of the kind chat.completion.chunk
 * @param {number} seconds since the request was sent
 * @returns {Message}
 */
export function withChunk(reply, chunk, seconds) {
  const { delta = {}, finish_reason: finish } = chunk.choices?.[0] ?? {};
  const thinks = delta.reasoning_content ?? "";
  const stats = { ...reply.stats };
  if (sizeOf(delta)) {
    const before = sizeOf(reply) * (1 - (stats.later ?? 0)); // what the first chunk brought
    stats.first ??= seconds;
    stats.last = seconds;
    stats.later = before && 1 - before / (sizeOf(reply) + sizeOf(delta));
  }
  if (thinks) stats.thought = seconds - stats.first;
  if (finish) stats.finish = finish;
  if (chunk.model) stats.model = chunk.model;
  if (chunk.usage) {
    stats.prompt = chunk.usage.prompt_tokens;
    stats.completion = chunk.usage.completion_tokens;
    stats.cached = chunk.usage.prompt_tokens_details?.cached_tokens;
  }
  const grown = { ...reply, content: reply.content + (delta.content ?? ""), stats };
  if (thinks) grown.reasoning_content = (reply.reasoning_content ?? "") + thinks;
  if (delta.tool_calls?.length) grown.tool_calls = delta.tool_calls.reduce(withCallDelta, reply.tool_calls ?? []);
  return grown;
}

/**
 * @param {Partial<Message>} said a message or a delta
 * @returns {number} characters of all that it says
 */
const sizeOf = ({ content, reasoning_content: thought, tool_calls: calls = [] }) =>
  (content ?? "").length + (thought ?? "").length +
  calls.reduce((sum, { function: called }) => sum + (called?.name ?? "").length + (called?.arguments ?? "").length, 0);

/** Let the call that a delta's index names grow: its name comes once, its arguments come in pieces. */
function withCallDelta(calls, delta) {
  const at = delta.index ?? calls.length;
  const call = calls[at] ?? { id: "", type: "function", function: { name: "", arguments: "" } };
  const { name = "", arguments: piece = "" } = delta.function ?? {};
  const grown = [...calls];
  const called = { name: call.function.name + name, arguments: call.function.arguments + piece };
  grown[at] = { ...call, id: delta.id ?? call.id, function: called };
  return grown;
}

/**
 * Make the request that asks for the next turn.
 *
 * @param {Chat} chat
 * @param {object} sampling settings of the request, as `settings.js` makes them
 * @returns {object} body of POST /v1/chat/completions
 */
export function requestOf(chat, sampling) {
  const messages = chat.messages.map(({ id, stats, ...turn }) => turn);
  if (chat.system) messages.unshift({ role: "system", content: chat.system });
  const tools = chat.tools ? { tools: JSON.parse(chat.tools) } : {};
  return { ...sampling, ...tools, messages, stream: true, stream_options: { include_usage: true } };
}

/** @param {string} text @returns {string} what is wrong with a list of tools, or "" */
export function toolsProblem(text) {
  if (!text.trim()) return "";
  try {
    const tools = JSON.parse(text);
    const named = (tool) => typeof tool?.function?.name === "string";
    if (Array.isArray(tools) && tools.every(named)) return "";
    return 'Not a list of tools: write [{"type": "function", "function": {"name": …, "parameters": …}}].';
  } catch (error) {
    return `Not JSON: ${error.message}`;
  }
}

/** @param {Stats} [stats] @returns {string} what a reader may want to know about a reply, on one line */
export function statsLine(stats = {}) {
  const { prompt, cached, completion, first, last, later, finish } = stats;
  const parts = [];
  if (completion !== undefined) parts.push(count(completion, "token"));
  // The first chunk ends the reading of the prompt, so the rate is that of the others. Chunks may hold several tokens;
  // how many came later is estimated from how much of the text did.
  if (completion > 1 && last > first) {
    const rate = (completion * later) / (last - first);
    parts.push(`${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`);
  }
  if (first !== undefined) parts.push(`first after ${first.toFixed(2)} s`);
  if (prompt !== undefined) parts.push(`prompt ${prompt.toLocaleString("en")}${cached ? ` (${cached} cached)` : ""}`);
  if (finish === "length") parts.push("cut off at the token limit");
  else if (finish && !["stop", "tool_calls"].includes(finish)) parts.push(finish);
  return parts.join(" · ");
}

const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
