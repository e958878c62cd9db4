// A little Markdown to nodes: paragraphs, headings, lists, fenced code, inline code, bold and italics; the rest stays
// as it was written. Text that still grows is drawn again and again, so blocks that did not change keep their nodes.

import { copyButton, h } from "./dom.js";

/**
 * @typedef {{indent: number, ordered: boolean, start: number, text: string}} Item
 * @typedef {{kind: "paragraph"|"heading"|"list"|"code", source: string, text?: string, level?: number,
 *     language?: string, items?: Item[]}} Block
 */

const FENCE = /^( *)(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^(#{1,6})\s+(.+?)\s*#*$/;
const INLINE = // code, strong, em
  /(`+)(?<code>.+?)(?<!`)\1(?!`)|\*\*(?=\S)(?<strong>.+?)(?<=\S)\*\*|(?<![\w*])\*(?=\S)(?<em>[^*]+)(?<=\S)\*(?!\w)/gs;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;

/**
 * Cut a text into blocks.
 *
 * @param {string} text
 * @returns {Block[]} in order; a fence that is not closed reaches to the end
 */
export function parseBlocks(text) {
  const lines = text.split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const read = [readCode, readHeading, readList, readParagraph].find((reader) => reader.starts(lines[at]));
    const { end, ...block } = read(lines, at);
    blocks.push({ ...block, source: lines.slice(at, end).join("\n") });
    at = end;
  }
  return blocks;
}

function readCode(lines, at) {
  const [, indent, fence, language] = FENCE.exec(lines[at]);
  const closes = (line) => line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "");
  let end = at + 1;
  while (end < lines.length && !closes(lines[end])) end++;
  const code = lines.slice(at + 1, end).map((line) => line.replace(new RegExp(`^ {0,${indent.length}}`), ""));
  end = Math.min(end + 1, lines.length);
  return { kind: "code", language: language.trim().split(/\s/)[0], text: code.join("\n"), end };
}
readCode.starts = (line) => FENCE.test(line);

function readHeading(lines, at) {
  const [, marks, text] = HEADING.exec(lines[at]);
  return { kind: "heading", level: marks.length, text, end: at + 1 };
}
readHeading.starts = (line) => HEADING.test(line);

function readList(lines, at) {
  const items = [];
  let end = at;
  for (; end < lines.length; end++) {
    const found = ITEM.exec(lines[end]);
    if (found) {
      const [, space, number, text] = found;
      items.push({ indent: space.length, ordered: number !== undefined, start: Number(number ?? 1), text });
    } else if (/^\s+\S/.test(lines[end]) && !readCode.starts(lines[end])) {
      items.at(-1).text += `\n${lines[end].trim()}`;
    } else if (lines[end].trim() || !ITEM.test(lines[end + 1] ?? "")) break; // a blank line may stand between items
  }
  return { kind: "list", items, end };
}
readList.starts = (line) => ITEM.test(line);

function readParagraph(lines, at) {
  let end = at + 1;
  const others = [readCode, readHeading, readList];
  while (end < lines.length && lines[end].trim() && !others.some((reader) => reader.starts(lines[end]))) end++;
  return { kind: "paragraph", text: lines.slice(at, end).join("\n"), end };
}
readParagraph.starts = () => true;

/**
 * Cut the text of a block into plain, bold, italic and code parts.
 *
 * @param {string} text
 * @returns {{kind: "text"|"strong"|"em"|"code", text: string}[]}
 */
export function parseInline(text) {
  const parts = [];
  let done = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > done) parts.push({ kind: "text", text: text.slice(done, match.index) });
    const { code, strong, em } = match.groups;
    parts.push({ kind: code ? "code" : strong ? "strong" : "em", text: code ?? strong ?? em });
    done = match.index + match[0].length;
  }
  if (done < text.length) parts.push({ kind: "text", text: text.slice(done) });
  return parts;
}

const inline = (text) =>
  parseInline(text).map(({ kind, text: inside }) =>
    kind === "text" ? inside : h(kind, {}, ...(kind === "code" ? [inside] : inline(inside))));

/** Build nested lists from items, by their indentation. */
function listNode(items) {
  const { indent, ordered, start } = items[0];
  const list = h(ordered ? "ol" : "ul", ordered && start !== 1 ? { start } : {});
  for (let at = 0; at < items.length; ) {
    let end = at + 1;
    while (end < items.length && items[end].indent > indent + 1) end++;
    const item = h("li", {}, ...inline(items[at].text));
    if (end > at + 1) item.append(listNode(items.slice(at + 1, end)));
    list.append(item);
    at = end;
  }
  return list;
}

function codeNode({ text, language }) {
  const head = h("figcaption", {}, language || "code", copyButton(() => text, "Copy this code"));
  return h("figure", { class: "code" }, head, h("pre", { tabindex: 0 }, h("code", {}, text)));
}

function blockNode(block) {
  if (block.kind === "code") return codeNode(block);
  if (block.kind === "list") return listNode(block.items);
  // Headings of the page itself end at level 3.
  if (block.kind === "heading") return h(`h${Math.min(block.level + 3, 6)}`, {}, ...inline(block.text));
  return h("p", {}, ...inline(block.text));
}

const drawn = new WeakMap();

/**
 * Show a text in a node, keeping the nodes of blocks that are the same as at the last time.
 *
 * @param {HTMLElement} container holds nothing else
 * @param {string} text
 */
export function showMarkdown(container, text) {
  const blocks = parseBlocks(text);
  const before = drawn.get(container) ?? [];
  let same = 0;
  while (same < blocks.length && before[same] === blocks[same].source) same++;
  while (container.childNodes.length > same) container.lastChild.remove();
  container.append(...blocks.slice(same).map(blockNode));
  drawn.set(container, blocks.map((block) => block.source));
}
