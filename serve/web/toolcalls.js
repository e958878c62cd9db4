// Calls of tools: shown as readable blocks, and answered by hand, so that a model's use of tools can be tried without
// running any. What comes out of the form is one tool turn for each call.

import { h } from "./dom.js";
import { newMessage } from "./chat.js";

/**
 * Lay out the arguments of a call.
 *
 * @param {string} text JSON, or the beginning of it while it still grows
 * @returns {string} indented if it is JSON, else as it is
 */
export function prettyArguments(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/**
 * Show calls.
 *
 * @param {HTMLElement} place holds nothing else
 * @param {import("./chat.js").ToolCall[]} calls
 */
export function showCalls(place, calls) {
  place.replaceChildren(...calls.filter(Boolean).map(({ function: called }) =>
    h("figure", { class: "call" },
      h("figcaption", {}, "calls ", h("code", {}, called.name)),
      h("pre", { tabindex: 0 }, h("code", {}, prettyArguments(called.arguments))))));
}

/**
 * Make the form that answers calls.
 *
 * @param {import("./chat.js").ToolCall[]} calls
 * @param {(answers: import("./chat.js").Message[]) => void} onAnswer
 * @returns {HTMLElement}
 */
export function answerForm(calls, onAnswer) {
  const fields = calls.map(({ id }, index) =>
    h("textarea", { id: `answer-${id || index}`, rows: 2, required: true }));
  const labelled = fields.flatMap((field, index) => [
    h("label", { for: field.id }, "Result of ", h("code", {}, calls[index].function.name)),
    field,
  ]);
  const submit = (event) => {
    event.preventDefault();
    onAnswer(calls.map((call, index) => newMessage("tool", fields[index].value, { tool_call_id: call.id })));
  };
  return h("form", { class: "answer", onsubmit: submit }, ...labelled, h("button", {}, "Send results"));
}
