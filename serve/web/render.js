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
  const body = h("div", { class: "body" });
  const node = h("article", { class: message.role, "data-id": message.id, "aria-label": NAMES[message.role] },
    h("h3", {}, NAMES[message.role]), body);
  const current = () => articles.get(node).message;
  const update = message.role === "assistant" ? replyParts(node, body, handlers) : (next) => (body.textContent = next.content);
  const actions = h("div", { class: "actions" },
    copyButton(() => current().content, "Copy this message"),
    button("Edit", () => edit(node, body, current(), handlers), { class: "quiet" }),
    button("Delete", () => handlers.onDelete(current()), { class: "quiet" }),
  );
  if (message.role === "assistant") {
    actions.append(button("Regenerate", handlers.onRegenerate, { class: "quiet last-only" }));
  }
  node.append(actions);
  articles.set(node, { message: null, update });
  return node;
}

/** Add the parts that only replies have, and return what updates them. */
function replyParts(node, body, handlers) {
  const thoughtBody = h("div", { class: "thought-text" });
  const summary = h("summary");
  const thought = h("details", { class: "thought", hidden: true }, summary, thoughtBody);
  const waiting = h("p", { class: "waiting" }, "Waiting for the first token…");
  const calls = h("div");
  const stats = h("p", { class: "stats" });
  const answer = h("div", { class: "last-only" });
  body.before(thought, waiting);
  body.after(calls, answer, stats);
  return (message, grows) => {
    waiting.hidden = !grows || saysSomething(message);
    if (message.reasoning_content) {
      if (thought.hidden) thought.open = grows && handlers.unfold();
      thought.hidden = false;
      thoughtBody.textContent = message.reasoning_content;
      const thinks = grows && !message.content && !message.tool_calls;
      summary.textContent = thinks ? "Thinking…" : thoughtTitle(message);
      if (!thinks && handlers.unfold() && grows && !thought.dataset.folded) {
        thought.open = false;
        thought.dataset.folded = "true"; // once: from now on it is the reader's
      }
    }
    showMarkdown(body, message.content);
    showCalls(calls, message.tool_calls ?? []);
    stats.textContent = grows ? "" : statsLine(message.stats);
    const asked = !grows && message.tool_calls ? [answerForm(message.tool_calls, handlers.onAnswer)] : [];
    answer.replaceChildren(...asked);
  };
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
  const again = message.role === "user" ? [button("Save and ask again", save(true))] : [];
  const form = h("form", { class: "edit", onkeydown, onsubmit: (event) => event.preventDefault() },
    field, h("div", { class: "row" }, ...again, button("Save", save(false)), button("Cancel", finish, { class: "quiet" })));
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
  const wait = error.retryAfter === undefined ? "" : ` It asks to wait ${Math.ceil(error.retryAfter)} s.`;
  const key = error.status === 401 ? [button("Enter API key", onKey)] : [];
  place.replaceChildren(h("div", { class: "trouble", role: error.quiet ? null : "alert" },
    h("p", {}, error.message + wait), h("div", { class: "row" }, button("Try again", onRetry), ...key)));
}
