// The settings of replies: one table says what there is, and from it come the form, the checks and the request.
// Pure functions. An empty field is left out of the request, so that the server's own default holds.

/**
 * @typedef {{name: string, label: string, hint: string, value: string, min: number, max?: number,
 *     whole?: boolean}} Field `value` is what the page starts with, as the terminal chat does
 * @typedef {Record<string, string | boolean>} Settings what the form holds, by name, as it was typed
 */

/** @type {Field[]} The numbers. */
export const FIELDS = [
  { name: "temperature", label: "Temperature", value: "0.7", min: 0, max: 2, hint: "0 takes the likeliest token" },
  { name: "top_p", label: "Top p", value: "0.95", min: 0, max: 1, hint: "keep the likeliest tokens up to this sum" },
  { name: "top_k", label: "Top k", value: "", min: 0, whole: true, hint: "keep this many tokens; 0 keeps all" },
  { name: "min_p", label: "Min p", value: "", min: 0, max: 1, hint: "keep tokens this likely beside the likeliest" },
  { name: "repetition_penalty", label: "Repetition penalty", value: "", min: 0.01, hint: "above 1 avoids repeating" },
  { name: "max_tokens", label: "Longest reply", value: "", min: 1, whole: true, hint: "in tokens" },
  { name: "seed", label: "Seed", value: "", min: 0, whole: true, hint: "the same seed draws the same reply" },
];

/** @type {Settings} */
export const DEFAULTS = {
  ...Object.fromEntries(FIELDS.map((field) => [field.name, field.value])),
  model: "", thinking: "auto", unfold: false, theme: "light dark",
};

/**
 * Check what was typed into the field of a number.
 *
 * @param {Field} field
 * @param {string} text
 * @returns {string} what is wrong with it, or ""
 */
export function numberProblem({ min, max, whole }, text) {
  const number = Number(text);
  if (!text.trim()) return "";
  if (whole && !Number.isSafeInteger(number)) return "Give a whole number.";
  if (!Number.isFinite(number)) return "Give a number.";
  if (number >= min && number <= (max ?? Infinity)) return "";
  return max === undefined ? `Give at least ${min}.` : `Give ${min} to ${max}.`;
}

/**
 * Make the request's part that the settings decide.
 *
 * @param {Settings} settings
 * @returns {object} keys of POST /v1/chat/completions
 */
export function samplingOf(settings) {
  const request = {};
  if (settings.model) request.model = settings.model;
  for (const field of FIELDS) {
    const text = String(settings[field.name] ?? "");
    if (text.trim() && !numberProblem(field, text)) request[field.name] = Number(text);
  }
  if (settings.thinking !== "auto") request.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  return request;
}

/**
 * Read settings that were stored.
 *
 * @param {string | null} text JSON, or what is left of it
 * @returns {Settings} with the defaults for whatever is missing
 */
export function readSettings(text) {
  try {
    return { ...DEFAULTS, ...JSON.parse(text) };
  } catch {
    return { ...DEFAULTS };
  }
}
