// The history of conversations in the browser's localStorage, each under a key of its own, so that two windows do not
// overwrite each other's. Where storage is forbidden or full, everything lives on in memory and the caller is told.

/** @typedef {import("./chat.js").Chat} Chat */

const CHAT = "minillm.chat.";
const FORBIDDEN = "This browser lets the page store nothing: conversations are lost when the page is closed.";
const FULL =
  "The browser's storage is full: what is new in this conversation is lost when the page is closed. " +
  "Export it, or delete old conversations.";

/**
 * A storage that never throws.
 *
 * @param {() => Storage} get returns localStorage or sessionStorage; even asking for it may be forbidden
 * @returns {{get: (name: string) => string | null, set: (name: string, value: string) => string,
 *     remove: (name: string) => void, names: () => string[], kept: boolean}} `set` returns what is wrong, or ""
 */
export function openStorage(get) {
  const memory = new Map();
  let storage = null;
  try {
    storage = get();
    storage.getItem("");
  } catch {
    storage = null;
  }
  return {
    kept: storage !== null,
    get: (name) => memory.get(name) ?? storage?.getItem(name) ?? null,
    names: () => [...new Set([...memory.keys(), ...(storage ? Object.keys(storage) : [])])],
    remove(name) {
      memory.delete(name);
      storage?.removeItem(name);
    },
    set(name, value) {
      try {
        if (!storage) throw new Error("forbidden");
        storage.setItem(name, value);
        memory.delete(name);
        return "";
      } catch {
        memory.set(name, value);
        return storage ? FULL : FORBIDDEN;
      }
    },
  };
}

/**
 * The history in a storage.
 *
 * @param {ReturnType<typeof openStorage>} storage
 * @returns {{list: () => Chat[], save: (chat: Chat) => string, remove: (id: string) => void,
 *     owns: (name: string | null) => boolean}} `list` has the newest first; `save` returns what is wrong, or ""
 */
export function openHistory(storage) {
  return {
    list: () =>
      storage
        .names()
        .filter((name) => name.startsWith(CHAT))
        .flatMap((name) => readChat(storage.get(name)))
        .sort((a, b) => b.updated - a.updated),
    save: (chat) => storage.set(CHAT + chat.id, JSON.stringify(chat)),
    remove: (id) => storage.remove(CHAT + id),
    owns: (name) => name === null || name.startsWith(CHAT), // null: all was cleared
  };
}

/** Read a conversation that somebody may have tampered with: one that makes no sense is passed over, not deleted. */
function readChat(text) {
  try {
    const chat = JSON.parse(text);
    return typeof chat.id === "string" && Array.isArray(chat.messages) ? [chat] : [];
  } catch {
    return [];
  }
}
