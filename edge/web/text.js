/** Texts as the Python runtime sees them, so that both decide alike. */
import { FOLDED } from "./casefold.js";

export const WORD = "[\\p{L}\\p{N}_]"; // what Python's \w matches
const SPACE = "[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]"; // str.isspace
const LEADING = new RegExp(`^${SPACE}+`, "u");
const SPACES = new RegExp(`${SPACE}+`, "gu");
const CHANGED = new RegExp(`[${Object.keys(FOLDED).join("")}]`, "gu");
const CONTENT = /[^\p{C}\p{Z}]/u;

/** The text with what Python's `str.lstrip` takes away taken away. */
export const trimStart = (text) => text.replace(LEADING, "");

/** Whether a text has any character that can be printed and is no space. */
export const hasContent = (text) => CONTENT.test(text);

/** The first `count` characters (code points, as Python counts them), and whether there were more. */
export function cut(text, count) {
  if (text.length <= count) return [text, false];
  const characters = [...text.slice(0, 2 * count)];
  const longer = characters.length > count || text.length > 2 * count;
  return [characters.slice(0, count).join(""), longer];
}

/** NFKC, case-folded, white space collapsed: the form in which phrases are compared. */
export function normalise(text) {
  const folded = text.normalize("NFKC").toLowerCase().replace(CHANGED, (character) => FOLDED[character]);
  return folded.normalize("NFKC").replace(SPACES, " ").replace(/^ | $/g, "");
}
