// Messages as articles of the log. An article is updated in place while its message grows, so that an unfolded thought
// stays unfolded and a selection stays selected; articles of messages that did not change are not touched.

import { saysSomething, statsLine } from "./chat.js";
import { button, copyButton, h } from "./dom.js";
import { showMarkdown } from "./markdown.js";
import { answerForm, showCalls } from "./toolcalls.js";

/**
 * @typedef {import("./chat.js").Message} Message
 * @typedef {{onEdit: (message: Message, text: string, again: boolean) => void, onDelete: (message: Message) => void,
 *     onRegenerate: () => void, onAnswer: (answers: Message[]) => void, unfold: () => boolean}} Handlers
 */

const NAMES = { user: "You", assistant: "Model", tool: "Tool result", system: "System" };
const articles = new WeakMap(); // node -> {message, update}

/**
 * Make the log show messages.
 *
 * @param {HTMLElement} log holds nothing else
 * @param {Message[]} messages
 * @param {string | null} growing id of the message that is being written
 * @param {Handlers} handlers
 */
export function showMessages(log, messages, growing, handlers) {
  let same = 0;
  while (same < messages.length && log.children[same]?.dataset.id === messages[same].id) same++;
  while (log.children.length > same) log.lastElementChild.remove();
  log.append(...messages.slice(same).map((message) => makeArticle(message, handlers)));
  for (const [index, message] of messages.entries()) {
    const node = log.children[index];
    const grows = message.id === growing;
    if (articles.get(node).message === message && (node.ariaBusy === "true") === grows) continue;
    articles.get(node).message = message;
    articles.get(node).update(message, grows);
    node.ariaBusy = String(grows);
  }
}

function makeArticle(message, handlers) {
  const isReply = message.role === "assistant";
  const body = h("div", { class: "body", dir: "auto" });
  const name = h("h3", {}, NAMES[message.role]);
  const node = h("article", { class: message.role, "data-id": message.id, "aria-label": NAMES[message.role] });
  const current = () => articles.get(node).message;
  const regenerate = button("Regenerate", handlers.onRegenerate, { class: "quiet last-only" });
  const actions = h("div", { class: "actions" },
    copyButton(() => current().content, "Copy this message"),
    button("Edit", () => edit(node, body, current(), handlers), { class: "quiet" }),
    button("Delete", () => handlers.onDelete(current()), { class: "quiet" }),
    ...(isReply ? [regenerate] : []));
  node.append(h("div", { class: "line" }, name, ...(isReply ? [] : [actions])), body);
  const update = isReply
    ? addReplyParts(name, body, actions, handlers)
    : (next) => (body.textContent = next.content);
  articles.set(node, { message: null, update });
  return node;
}

/** Put the parts around the text that only replies have, and return what updates all of them. */
function addReplyParts(name, body, actions, handlers) {
  const [thought, updateThought] = makeThought(handlers.unfold);
  const waiting = h("p", { class: "waiting" }, "Waiting for the first token…");
  const calls = h("div");
  const stats = h("p", { class: "stats" });
  const answer = h("div", { class: "last-only" });
  body.before(thought, waiting);
  body.after(calls, answer, h("div", { class: "line" }, stats, actions));
  return (message, grows) => {
    name.textContent = message.stats?.model ?? NAMES.assistant;
    waiting.hidden = !grows || saysSomething(message);
    if (message.reasoning_content) updateThought(message, grows);
    showMarkdown(body, message.content);
    showCalls(calls, message.tool_calls ?? []);
    stats.textContent = grows ? "" : statsLine(message.stats);
    const asked = !grows && message.tool_calls ? [answerForm(message.tool_calls, handlers.onAnswer)] : [];
    answer.replaceChildren(...asked);
  };
}

/** Make a thought, folded unless the settings unfold it while it is written, and what updates it. */
function makeThought(unfold) {
  const text = h("div", { class: "thought-text", dir: "auto" });
  const summary = h("summary");
  const node = h("details", { class: "thought", hidden: true }, summary, text);
  let unfolded = false; // by this page, and not by the reader
  const update = (message, grows) => {
    const thinks = grows && !message.content && !message.tool_calls;
    if (node.hidden) node.open = unfolded = thinks && unfold();
    if (unfolded && !thinks) node.open = unfolded = false;
    node.hidden = false;
    text.textContent = message.reasoning_content;
    summary.textContent = thinks ? "Thinking…" : thoughtTitle(message);
  };
  return [node, update];
}

const thoughtTitle = ({ stats }) => (stats?.thought ? `Thought for ${stats.thought.toFixed(1)} s` : "Thought");

/** Put a form in the place of a message's text until it is saved or given up. */
function edit(node, body, message, handlers) {
  if (node.querySelector("form.edit")) return;
  const field = h("textarea", { "aria-label": "Text of this message", rows: 3 });
  field.value = message.content;
  const finish = () => {
    form.remove();
    node.classList.remove("editing");
    node.querySelector(".actions button")?.focus();
  };
  const save = (again) => () => {
    finish();
    handlers.onEdit(message, field.value, again);
  };
  const onkeydown = (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    finish();
  };
  const again = message.role === "user" ? [button("Save and ask again", save(true), { class: "idle-only" })] : [];
  const form = h("form", { class: "edit", onkeydown, onsubmit: (event) => event.preventDefault() },
    field,
    h("div", { class: "row" }, ...again, button("Save", save(false)), button("Cancel", finish, { class: "quiet" })));
  node.classList.add("editing");
  body.after(form);
  field.focus();
}

const troubles = new WeakMap(); // place -> what it shows

/**
 * Show, where the reply would be, why there is none.
 *
 * @param {HTMLElement} place holds nothing else
 * @param {{message: string, status?: number, retryAfter?: number, quiet?: boolean} | null} error an ApiError, or
 *     something that is no news and not to be read out; null for none
 * @param {{onRetry: () => void, onKey: () => void}} handlers
 */
export function showTrouble(place, error, { onRetry, onKey }) {
  if (troubles.get(place) === error) return; // or it would be read out again
  troubles.set(place, error);
  if (!error) {
    place.replaceChildren();
    return;
  }
  const key = error.status === 401 ? [button("Enter API key", onKey)] : [];
  place.replaceChildren(h("div", { class: "trouble", role: error.quiet ? null : "alert" },
    h("p", {}, error.message), h("div", { class: "row" }, retryButton(error.retryAfter, onRetry), ...key)));
}

/** Count down the seconds that the server asks to wait; whoever knows better may press at once. */
function retryButton(seconds, onRetry) {
  const node = button("Try again", onRetry);
  const tick = (left) => {
    node.textContent = left > 0 ? `Try again (in ${left} s)` : "Try again";
    if (left > 0) setTimeout(tick, 1000, left - 1);
  };
  tick(Math.ceil(seconds ?? 0));
  return node;
}
