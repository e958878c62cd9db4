// Reads a growing reply to people who cannot see it: whole sentences go, as they are finished, into a live region that
// is off the screen. Marking the reply itself as live would make screen readers start over with every token.

/**
 * Find where the last finished sentence or line of a text ends.
 *
 * @param {string} text
 * @param {number} from where to begin
 * @returns {number} index behind it; `from` if none is finished yet
 */
export function finishedUntil(text, from) {
  let end = from;
  for (const match of text.slice(from).matchAll(/[.!?…]["')\]]*\s|[。！？]|\n/g)) {
    end = from + match.index + match[0].length;
  }
  return end;
}

/**
 * Make a reader for a live region.
 *
 * @param {HTMLElement} region with aria-live
 * @returns {{begin: (from?: number) => void, read: (text: string) => void,
 *     end: (text: string, ending: string) => void}} `begin` starts a reply, at an index of its text; `read` takes the
 *     whole reply so far; `end` reads the rest and then the ending
 */
export function openAnnouncer(region) {
  let said = 0;
  const say = (text) => {
    if (!text.trim()) return;
    const line = document.createElement("p");
    line.textContent = text;
    region.append(line);
    while (region.childElementCount > 20) region.firstChild.remove();
  };
  const read = (text, until) => {
    say(text.slice(said, until));
    said = Math.max(said, until);
  };
  return {
    begin(from = 0) {
      said = from;
      region.replaceChildren();
    },
    read: (text) => read(text, finishedUntil(text, said)),
    end(text, ending) {
      read(text, text.length);
      say(ending);
    },
  };
}
