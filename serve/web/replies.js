// Replies that are being written, at most one for each conversation: started, grown by the stream, stopped, and what
// became of them. Knows the API and the shape of a conversation, but neither the document nor the history.

import { ApiError, streamChat } from "./api.js";
import { newMessage, requestOf, saysSomething, withChunk } from "./chat.js";

/**
 * Keep account of replies.
 *
 * @param {{sampling: () => object, key: () => string, onGrow: (chatId: string) => void,
 *     onEnd: (chatId: string, reply: import("./chat.js").Message | null) => void}} caller `onEnd` gets a reply even if
 *     it was stopped or broke off, and null if nothing had been said
 * @returns {{start: (chat: import("./chat.js").Chat) => void, stop: (chatId: string) => void,
 *     growing: (chatId: string) => import("./chat.js").Message | null,
 *     trouble: (chatId: string) => ApiError | null, forget: (chatId: string) => void, ids: () => string[]}}
 */
export function openReplies({ sampling, key, onGrow, onEnd }) {
  const live = new Map(); // chat id -> {message, controller}
  const troubles = new Map(); // chat id -> ApiError

  async function start(chat) {
    if (live.has(chat.id)) return;
    const reply = { message: newMessage("assistant"), controller: new AbortController() };
    live.set(chat.id, reply);
    troubles.delete(chat.id);
    onGrow(chat.id);
    try {
      await grow(chat, reply);
    } catch (error) {
      if (!reply.controller.signal.aborted) troubles.set(chat.id, readable(error));
      if (!reply.message.stats?.finish) reply.message = endedBy(reply);
    }
    live.delete(chat.id);
    onEnd(chat.id, saysSomething(reply.message) ? reply.message : null);
  }

  async function grow(chat, reply) {
    const { signal } = reply.controller;
    const sent = performance.now();
    for await (const chunk of streamChat(requestOf(chat, sampling()), key(), signal)) {
      reply.message = withChunk(reply.message, chunk, (performance.now() - sent) / 1000);
      onGrow(chat.id);
    }
  }

  return {
    start,
    stop: (chatId) => live.get(chatId)?.controller.abort(),
    growing: (chatId) => live.get(chatId)?.message ?? null,
    trouble: (chatId) => troubles.get(chatId) ?? null,
    forget: (chatId) => troubles.delete(chatId),
    ids: () => [...live.keys()],
  };
}

const endedBy = ({ message, controller }) => ({
  ...message,
  stats: { ...message.stats, finish: controller.signal.aborted ? "stopped" : "broken off" },
});

/** A defect of this page is shown as well, rather than leaving the person waiting. */
const readable = (error) => (error instanceof ApiError ? error : new ApiError(`The page failed: ${error.message}`, 0));
