/**
 * Keyword rules: which agents' trigger phrases occur in a task; the rules of edge/keywords.py.
 *
 * A phrase matches whole tokens only. Where several phrases start at the same place the longest one counts.
 */
import { normalise, WORD } from "./text.js";

const START = new RegExp(`${WORD}+|(?<!${WORD})[^\\p{L}\\p{N}_]`, "gu"); // where a phrase can begin
const IN_WORD = new RegExp(WORD, "uy");

/** Phrases at the token boundaries of a text: the longest at each, or every one. */
class Phrases {
  constructor(owners, every) {
    this.owners = owners;
    this.every = every;
    this.byStart = new Map();
    for (const phrase of [...owners.keys()].sort((a, b) => [...b].length - [...a].length)) {
      const start = phrase.match(START)[0];
      if (!this.byStart.has(start)) this.byStart.set(start, []);
      this.byStart.get(start).push(phrase);
    }
  }

  find(text) {
    const found = [];
    if (!this.owners.size) return found;
    for (const match of text.matchAll(START)) {
      for (const phrase of this.byStart.get(match[0]) ?? []) {
        IN_WORD.lastIndex = match.index + phrase.length;
        if (text.startsWith(phrase, match.index) && !IN_WORD.test(text)) {
          found.push([phrase, this.owners.get(phrase)]);
          if (!this.every) break;
        }
      }
    }
    return found;
  }
}

/** The compiled keywords and negatives of a list of agents. */
export class KeywordRules {
  constructor(agents) {
    const table = (field) => {
      const owners = new Map();
      agents.forEach((agent, position) => {
        for (const phrase of (agent[field] ?? []).map(normalise)) {
          if (!owners.has(phrase)) owners.set(phrase, []);
          if (!owners.get(phrase).includes(position)) owners.get(phrase).push(position);
        }
      });
      return owners;
    };
    this.speaks = new Phrases(table("keywords"), false);
    this.silences = new Phrases(table("negatives"), true);
    this.priority = agents.map((agent) => agent.priority ?? 0);
  }

  /**
   * Find every phrase that occurs.
   *
   * @param {string} text
   * @returns {{phrases: string[][], first: number[]}} For each agent its phrases, in order of occurrence; and the
   *   agents that matched with the highest priority.
   */
  match(text) {
    const normal = normalise(text);
    const found = new Map();
    for (const [phrase, owners] of this.speaks.find(normal)) {
      for (const owner of owners) {
        if (!found.has(owner)) found.set(owner, []);
        if (!found.get(owner).includes(phrase)) found.get(owner).push(phrase);
      }
    }
    if (found.size) {
      for (const [, owners] of this.silences.find(normal)) for (const owner of owners) found.delete(owner);
    }
    const top = Math.max(...[...found.keys()].map((position) => this.priority[position]));
    return {
      phrases: this.priority.map((_, position) => found.get(position) ?? []),
      first: [...found.keys()].filter((position) => this.priority[position] === top).sort((a, b) => a - b),
    };
  }
}
