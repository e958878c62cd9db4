// Conversations as JSON lines in the format that supervised fine-tuning reads, one object with `conversations` a line:
// what was said here can be trained on, and training data can be read here. Pure functions.

import { newChat, newMessage, toolsProblem, withMessages } from "./chat.js";

/**
 * Write conversations, one a line.
 *
 * @param {import("./chat.js").Chat[]} chats
 * @returns {string} JSON lines; the system prompt is the first turn and carries the tools, which stand beside the
 *     turns where there is no system prompt, so that training renders the same prompt as serving
 */
export const toLines = (chats) => chats.map((chat) => `${JSON.stringify(toRow(chat))}\n`).join("");

/** @param {import("./chat.js").Chat} chat @returns {string} a name for its file, after its title */
export const fileNameOf = ({ title }) =>
  `${(title || "conversation").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40)}.jsonl`;

function toRow({ title, system, tools, messages }) {
  const offered = tools ? { tools: JSON.parse(tools) } : {};
  const conversations = messages.map(({ id, stats, ...turn }) => turn);
  if (!system) return { conversations, ...offered, title };
  return { conversations: [{ role: "system", content: system, ...offered }, ...conversations], title };
}

/**
 * Read conversations.
 *
 * @param {string} text JSON lines; blank ones are passed over
 * @returns {{chats: import("./chat.js").Chat[], problems: string[]}} what could be read, and `line N: what is wrong`
 */
export function fromLines(text) {
  const chats = [];
  const problems = [];
  for (const [index, line] of text.replace(/^\uFEFF/, "").split(/\r?\n/).entries()) {
    if (!line.trim()) continue;
    try {
      chats.push(fromRow(JSON.parse(line)));
    } catch (error) {
      problems.push(`line ${index + 1}: ${error.message}`);
    }
  }
  return { chats, problems };
}

function fromRow(row) {
  if (!Array.isArray(row?.conversations)) throw new Error("holds no list named conversations");
  const turns = row.conversations.map(readTurn);
  const first = turns[0]?.role === "system" ? turns.shift() : { content: "" };
  const tools = asText(row.tools ?? row.conversations[0]?.tools);
  if (toolsProblem(tools)) throw new Error(`tools: ${toolsProblem(tools)}`);
  const title = typeof row.title === "string" ? row.title : "";
  return withMessages(newChat({ title, system: first.content, tools }), turns);
}

function readTurn(turn, index) {
  const where = `conversations[${index}]`;
  if (!["system", "user", "assistant", "tool"].includes(turn?.role)) throw new Error(`${where}.role: is unknown`);
  const { role, content, reasoning_content: thought, tool_calls: calls, tool_call_id: id } = turn;
  if (typeof (content ?? "") !== "string") throw new Error(`${where}.content: must be a string`);
  const more = {};
  if (thought) more.reasoning_content = String(thought);
  if (calls?.length) more.tool_calls = (typeof calls === "string" ? JSON.parse(calls) : calls).map(readCall);
  if (id) more.tool_call_id = String(id);
  return newMessage(role, content ?? "", more);
}

/** Bring a call, bare or in OpenAI's wrapper, to that wrapper with its arguments as text. */
function readCall(call, index) {
  const { name, arguments: given } = call.function ?? call;
  if (typeof name !== "string") throw new Error(`tool_calls[${index}].name: must be a string`);
  return { id: call.id ?? `call_${index}`, type: "function", function: { name, arguments: asText(given ?? {}) } };
}

const asText = (value) => (typeof value === "string" ? value : value ? JSON.stringify(value, null, 2) : "");
