// Server-sent events, from bytes to the data of each event. Pure: nothing here knows what the data means.
// Chunks of a response may end anywhere, inside a character, between CR and LF, or in the middle of a line, so the
// text that no line end has closed yet is carried over to the next chunk.

/**
 * Take the finished lines off the front of a text.
 *
 * @param {string} text what has arrived and is not used yet
 * @returns {{lines: string[], rest: string}} finished lines without their ends, and what may still grow; a CR at the
 *     very end stays in the rest, because the LF of the same line end may follow it
 */
export function splitLines(text) {
  const lines = text.split(/\r\n|\n|\r(?!$)/);
  return { rest: lines.pop(), lines };
}

/**
 * Read the data of events as they arrive.
 *
 * @param {ReadableStream<Uint8Array>} body of a response of the type text/event-stream
 * @returns {AsyncGenerator<string>} the data of each event, several data lines joined by a line feed; comments and
 *     other fields are passed over, and so is an event that the end of the stream cuts off
 */
export async function* readEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      // A CR that ends the stream ends a line; one more character makes splitLines see it.
      const split = splitLines(rest + (done ? decoder.decode() + "\n" : decoder.decode(value, { stream: true })));
      rest = split.rest;
      for (const line of split.lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) yield data.splice(0).join("\n");
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {}); // closes the connection when the reader of events leaves early
  }
}
