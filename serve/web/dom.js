// The few things that every view needs of the document: making nodes, copying text, and saying something in passing.
// Text always becomes a text node; no string is ever parsed as HTML.

/**
 * Make an element.
 *
 * @param {string} tag
 * @param {Record<string, any>} [attributes] a name that begins with "on" is an event's; true sets an attribute without
 *     a value; false, null and undefined leave it out
 * @param {...(Node | string)} children
 * @returns {any} an element of that tag
 */
export function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** @param {string} label @param {() => void} onclick @param {object} [more] attributes @returns {HTMLElement} */
export const button = (label, onclick, more = {}) => h("button", { type: "button", onclick, ...more }, label);

/** @param {string} id @returns {any} an element that index.html promises */
export const byId = (id) => document.getElementById(id);

/**
 * Make a button that copies text and says so.
 *
 * @param {() => string} text
 * @param {string} label what a screen reader calls it
 * @returns {HTMLElement}
 */
export function copyButton(text, label) {
  const node = button("Copy", async () => {
    node.textContent = (await copy(text())) ? "Copied" : "Not allowed";
    setTimeout(() => (node.textContent = "Copy"), 1500);
  }, { class: "quiet", "aria-label": label });
  return node;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text); // pages on plain http have no clipboard
  }
}

function copyBySelection(text) {
  const focused = /** @type {HTMLElement} */ (document.activeElement);
  const field = h("textarea", { class: "visually-hidden" });
  field.value = text;
  (document.querySelector("dialog[open]") ?? document.body).append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return copied;
}

/**
 * Hand a text to the person as a file.
 *
 * @param {string} name
 * @param {string} text
 */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/**
 * Say something above the message field, with one thing that can be done about it, until the next thing is said.
 *
 * @param {string} text "" takes the notice away
 * @param {string} [label] of the button
 * @param {() => void} [act]
 */
export function notify(text, label, act) {
  const place = byId("notice");
  const clear = () => notify("");
  const acts = act ? [button(label, () => { clear(); act(); })] : [];
  place.replaceChildren(...(text ? [h("span", {}, text), ...acts, button("Dismiss", clear, { class: "quiet" })] : []));
}
