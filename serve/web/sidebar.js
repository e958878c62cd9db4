// The list of conversations beside the log: choose, rename and delete; on narrow windows, a drawer. It draws what it is
// given and reports what the person wants; it keeps nothing itself.

import { button, h } from "./dom.js";

/**
 * @typedef {import("./chat.js").Chat} Chat
 * @typedef {{onChoose: (chat: Chat) => void, onRename: (chat: Chat, title: string) => void,
 *     onDelete: (chat: Chat) => void, onExport: (chat: Chat) => void}} Handlers
 */

/**
 * Show conversations.
 *
 * @param {HTMLElement} list a ul that holds nothing else
 * @param {Chat[]} chats
 * @param {string} currentId of the one that the log shows; what can be done with it stands below its title
 * @param {Handlers} handlers
 */
export function showChats(list, chats, currentId, handlers) {
  if (list.querySelector("input")) return; // not under the hands of somebody who is renaming
  list.replaceChildren(...chats.map((chat) => {
    const current = chat.id === currentId;
    const item = h("li", {}, button(chat.title || "Untitled", () => handlers.onChoose(chat), {
      class: "choose", "aria-current": current ? "true" : null,
    }));
    if (current) item.append(actionsOf(chat, item, handlers));
    return item;
  }));
}

function actionsOf(chat, item, handlers) {
  return h("div", { class: "actions" },
    button("Rename", () => rename(chat, item, handlers), { class: "quiet" }),
    button("Delete", () => handlers.onDelete(chat), { class: "quiet" }),
    button("Export", () => handlers.onExport(chat), { class: "quiet" }));
}

/** Turn a title into a field; Enter and leaving it save, Escape does not. */
function rename(chat, item, handlers) {
  const field = h("input", { "aria-label": "Title of this conversation", maxlength: 200 });
  field.value = chat.title;
  let done = false;
  const finish = (title) => {
    if (done) return;
    done = true;
    field.remove();
    handlers.onRename(chat, title.trim() || chat.title);
  };
  field.addEventListener("blur", () => finish(field.value));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") event.stopPropagation();
    if (event.key === "Escape" || (event.key === "Enter" && !event.isComposing)) {
      finish(event.key === "Enter" ? field.value : chat.title);
    }
  });
  item.firstChild.replaceWith(field);
  field.select();
}

/**
 * Make the list a drawer, which on narrow windows lies over the rest of the page.
 *
 * @param {HTMLElement} opener
 * @param {HTMLElement} closer
 * @param {HTMLElement} rest cannot be reached while the drawer is open
 * @returns {{show: (open: boolean) => void, close: () => void, isOpen: () => boolean}} `close` gives the focus back
 */
export function openDrawer(opener, closer, rest) {
  const show = (open) => {
    document.body.toggleAttribute("data-drawer", open);
    rest.inert = open;
    opener.setAttribute("aria-expanded", String(open));
  };
  const close = () => {
    show(false);
    opener.focus();
  };
  opener.addEventListener("click", () => {
    show(true);
    closer.focus();
  });
  closer.addEventListener("click", close);
  document.addEventListener("click", ({ target }) => {
    if (rest.inert && [document.body, document.documentElement].includes(target)) close(); // beside the drawer
  });
  matchMedia("(max-width: 44rem)").addEventListener("change", () => show(false));
  return { show, close, isOpen: () => rest.inert };
}
