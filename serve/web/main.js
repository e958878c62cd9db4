// The page: holds what is shown, joins the views to the replies, the history and the settings, and listens to the
// person. Everything that can be computed without the document is in the other modules.

import { isReady, listModels } from "./api.js";
import { openAnnouncer } from "./announce.js";
import {
  newChat, newMessage, saysSomething, withMessages, withMessagesOf, withoutMessage, withoutReply,
} from "./chat.js";
import { byId, download, h, notify } from "./dom.js";
import { fileNameOf, fromLines, toLines } from "./jsonl.js";
import { showMessages, showTrouble } from "./render.js";
import { openReplies } from "./replies.js";
import { DEFAULTS, readSettings, samplingOf } from "./settings.js";
import { openForm } from "./settingsform.js";
import { openDrawer, showChats } from "./sidebar.js";
import { openHistory, openStorage } from "./store.js";

const SETTINGS = "minillm.settings";
const KEY = "minillm.key";
const CURRENT = "minillm.current";
const UNANSWERED = { message: "This message has no reply.", quiet: true };

const local = openStorage(() => localStorage);
const session = openStorage(() => sessionStorage);
const history = openHistory(local);
const announcer = openAnnouncer(byId("announcer"));
const drawer = openDrawer(byId("open-sidebar"), byId("close-sidebar"), document.querySelector("main"));
const [scroll, message] = [byId("scroll"), byId("message")];

let chats = new Map(history.list().map((chat) => [chat.id, chat]));
let current = chats.get(session.get(CURRENT)) ?? newChat();
let settings = readSettings(local.get(SETTINGS));
let told = ""; // what is wrong with the storage, as said before

const replies = openReplies({
  sampling: () => samplingOf(settings),
  key: () => session.get(KEY) ?? "",
  onGrow: (id) => id === current.id && drawSoon(),
  onEnd: endReply,
});

// --- What is shown -----------------------------------------------------------------------------------------------

let drawing = 0;

function drawSoon() {
  drawing ||= requestAnimationFrame(drawLog);
}

const atEnd = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 48;
const toEnd = () => scroll.scrollTo({ top: scroll.scrollHeight, behavior: "instant" });

function drawLog() {
  cancelAnimationFrame(drawing);
  drawing = 0;
  const follow = atEnd();
  const growing = replies.growing(current.id);
  const messages = growing ? [...current.messages, growing] : current.messages;
  byId("log").toggleAttribute("data-busy", Boolean(growing));
  showMessages(byId("log"), messages, growing?.id ?? null, messageHandlers);
  showTrouble(byId("trouble"), growing ? null : troubleOf(current), { onRetry: regenerate, onKey: openKey });
  byId("welcome").hidden = messages.length > 0;
  byId("send").hidden = Boolean(growing);
  byId("stop").hidden = !growing;
  if (growing) announcer.read(growing.content);
  if (follow) toEnd();
  byId("latest").hidden = atEnd();
}

function troubleOf(chat) {
  const answered = ["assistant", "system", undefined].includes(chat.messages.at(-1)?.role);
  return replies.trouble(chat.id) ?? (answered ? null : UNANSWERED);
}

function draw() {
  drawLog();
  const title = current.title || "New conversation";
  byId("title").textContent = title;
  document.title = `${title} · minillm-jax`;
  const newestFirst = [...chats.values()].sort((a, b) => b.updated - a.updated);
  showChats(byId("chats"), newestFirst, current.id, chatHandlers);
}

// --- Conversations -----------------------------------------------------------------------------------------------

/** Put a conversation into the history, unless it is empty and nobody would miss it. */
function keep(chat) {
  if (chat.id === current.id) current = chat;
  if (!chat.messages.length && !chats.has(chat.id)) return;
  chats.set(chat.id, chat);
  const problem = history.save(chat);
  if (problem && problem !== told) notify(problem);
  told = problem;
}

function choose(chat) {
  current = chat;
  session.set(CURRENT, chat.id);
  announcer.begin(replies.growing(chat.id)?.content.length);
  drawer.show(false);
  draw();
  toEnd();
  message.focus();
}

function removeChat(chat) {
  replies.stop(chat.id);
  chats.delete(chat.id);
  history.remove(chat.id);
  if (chat.id === current.id) choose(newChat({ system: chat.system, tools: chat.tools }));
  draw();
  notify("Conversation deleted.", "Undo", () => {
    keep(chat);
    choose(chat);
  });
}

const chatHandlers = {
  onChoose: choose,
  onRename: (chat, title) => {
    keep({ ...chats.get(chat.id), title });
    draw();
  },
  onDelete: removeChat,
  onExport: (chat) => download(fileNameOf(chat), toLines([chat])),
};

async function importFile(file) {
  const { chats: read, problems } = fromLines(await file.text());
  read.forEach(keep);
  const count = `${read.length} conversation${read.length === 1 ? "" : "s"} imported`;
  const more = problems.length > 1 ? ` (and ${problems.length - 1} more)` : "";
  notify(problems.length ? `${count}. ${file.name}, ${problems[0]}${more}` : `${count}.`);
  if (read.length) choose(read[0]);
}

// --- Messages ----------------------------------------------------------------------------------------------------

function ask(chat) {
  keep(chat);
  session.set(CURRENT, chat.id);
  announcer.begin();
  replies.start(chat);
  draw();
  toEnd();
  message.focus();
}

function send() {
  const text = message.value.trim();
  if (!text || replies.growing(current.id)) return;
  message.value = "";
  ask(withMessages(current, [...current.messages, newMessage("user", text)]));
}

function endReply(id, reply) {
  const chat = chats.get(id);
  if (!chat) return; // deleted in the meantime
  if (reply) keep(withMessages(chat, [...chat.messages, reply]));
  if (id === current.id) announcer.end(reply?.content ?? "", replies.trouble(id) ? "" : "End of the reply.");
  draw();
}

function regenerate() {
  ask(withoutReply(current));
}

const messageHandlers = {
  onEdit(edited, text, again) {
    const at = current.messages.findIndex((one) => one.id === edited.id);
    const changed = current.messages.with(at, { ...edited, content: text });
    replies.forget(current.id);
    if (again) return ask(withMessages(current, changed.slice(0, at + 1)));
    keep(withMessages(current, changed));
    draw();
  },
  onDelete({ id }) {
    const before = current;
    const after = withoutMessage(before, id);
    replies.forget(before.id);
    keep(after);
    draw();
    message.focus();
    notify("Message deleted.", "Undo", () => {
      const now = chats.get(before.id); // it may have gone on in the meantime
      if (now) keep(withMessagesOf(now, before, after));
      draw();
    });
  },
  onRegenerate: regenerate,
  onAnswer: (answers) => ask(withMessages(current, [...current.messages, ...answers])),
  unfold: () => Boolean(settings.unfold),
};

// --- Settings and models -----------------------------------------------------------------------------------------

function setTheme(theme) {
  document.documentElement.style.colorScheme = theme;
  byId("theme").value = theme;
}

function change(changes) {
  settings = { ...settings, ...changes };
  local.set(SETTINGS, JSON.stringify(settings));
}

const form = openForm(byId("settings"), {
  values: () => ({ ...settings, system: current.system, tools: current.tools, key: session.get(KEY) ?? "" }),
  onChange(name, value) {
    if (name === "key") session.set(KEY, value);
    else if (name === "system" || name === "tools") keep({ ...current, [name]: value });
    else change({ [name]: value });
  },
});

const openKey = () => form.open("key");

async function showModels() {
  const select = byId("model");
  try {
    const models = await listModels(session.get(KEY) ?? "");
    select.replaceChildren(...models.map((name) => h("option", { value: name }, name)));
    select.disabled = false;
    if (models.includes(settings.model)) select.value = settings.model;
    change({ model: select.value });
  } catch (error) {
    if (error.status === 401) notify(error.message, "Enter API key", openKey);
    else notify(error.message, "Try again", showModels);
  }
}

async function connect() {
  const ready = await isReady();
  byId("status").textContent = ready ? "" : "The server is not ready; trying again every two seconds.";
  if (ready) await showModels();
  else setTimeout(connect, 2000);
}

// --- What the person does ----------------------------------------------------------------------------------------

const on = (id, event, act) => byId(id).addEventListener(event, act);

on("composer", "submit", (event) => {
  event.preventDefault();
  send();
});
on("message", "keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // composing: it chooses a word
  event.preventDefault();
  send();
});
on("stop", "click", () => {
  replies.stop(current.id);
  message.focus();
});
on("latest", "click", toEnd);
on("scroll", "scroll", () => (byId("latest").hidden = atEnd()));
on("new-chat", "click", () => choose(newChat({ system: current.system, tools: current.tools })));
on("export-all", "click", () => download("conversations.jsonl", toLines([...chats.values()])));
on("import", "click", () => byId("import-file").click());
on("import-file", "change", async ({ target }) => {
  if (target.files.length) await importFile(target.files[0]);
  target.value = "";
});
on("theme", "change", ({ target }) => {
  change({ theme: target.value });
  setTheme(target.value);
});
on("model", "change", ({ target }) => change({ model: target.value }));
on("open-settings", "click", () => form.open());
on("set-key", "change", showModels);
on("reset-settings", "click", () => {
  change({ ...DEFAULTS, model: settings.model, theme: settings.theme });
  form.fill();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || byId("settings").open) return;
  if (drawer.isOpen()) drawer.close();
  else replies.stop(current.id);
});
window.addEventListener("storage", ({ key }) => {
  if (!history.owns(key)) return; // another window has written
  const busy = replies.ids().flatMap((id) => chats.get(id) ?? []);
  chats = new Map([...history.list(), ...busy].map((chat) => [chat.id, chat]));
  current = chats.get(current.id) ?? (current.messages.length ? newChat() : current);
  draw();
});
window.addEventListener("pagehide", () => {
  for (const id of replies.ids()) {
    const [chat, reply] = [chats.get(id), replies.growing(id)];
    if (chat && saysSomething(reply)) history.save(withMessages(chat, [...chat.messages, reply]));
  }
});

setTheme(settings.theme);
draw();
toEnd();
message.focus();
connect();
