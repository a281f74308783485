/** Routing: signals of a task (keywords, similarities) to a decision with calibrated confidence; as edge/router.py. */
import { Encoder } from "./encoder.js";
import { EdgeError } from "./errors.js";
import { KeywordRules } from "./keywords.js";
import { cut, hasContent, trimStart } from "./text.js";

export const STRATEGIES = ["keyword", "keyword-first", "embedding", "hybrid"];
const MAX_CHARACTERS = 8192; // a task is cut here before anything looks at it
const FIELDS = ["name", "description", "keywords", "negatives", "examples", "priority"];
const LISTS = ["keywords", "negatives", "examples"];
const PRINTABLE = /^(?:[^\p{C}\p{Z}]| )+$/u; // str.isprintable

const dot = (a, b) => {
  let sum = 0;
  for (let place = 0; place < a.length; place++) sum += a[place] * b[place];
  return sum;
};

/** Hold agents to the rules of the files that describe them. */
export function checkAgents(agents) {
  if (!Array.isArray(agents) || !agents.length) {
    throw new EdgeError("a router needs at least one agent. Give a list of agents.");
  }
  const names = new Set();
  for (const agent of agents) {
    const name = typeof agent?.name === "string" ? agent.name.trim() : "";
    if (!name) throw new EdgeError("an agent has no name. Give it a unique, non-empty name.");
    const said = `agent ${JSON.stringify(name)}`;
    if (name === "none") throw new EdgeError('the name "none" stands for no agent. Rename the agent.');
    if (!PRINTABLE.test(name)) throw new EdgeError(`${said} has characters that cannot be printed. Rename it.`);
    if (names.has(name)) throw new EdgeError(`${said} occurs twice. Rename one.`);
    names.add(name);
    for (const key of Object.keys(agent)) {
      if (!FIELDS.includes(key)) throw new EdgeError(`${said}: unknown field ${key}. Known are: ${FIELDS.join(", ")}.`);
    }
    for (const key of LISTS) {
      const value = agent[key] ?? [];
      if (!Array.isArray(value) || !value.every((item) => typeof item === "string" && trimStart(item))) {
        throw new EdgeError(`${said}: ${key} must be a list of non-empty texts. Correct it.`);
      }
    }
    if (!Number.isInteger(agent.priority ?? 0)) throw new EdgeError(`${said}: priority must be an integer. Correct it.`);
    if (typeof (agent.description ?? "") !== "string") {
      throw new EdgeError(`${said}: description must be a text. Put it in quotes.`);
    }
    if (!agent.description?.trim() && !agent.examples?.length) {
      throw new EdgeError(`${said} has neither description nor examples. Add a description: tasks are compared with it.`);
    }
  }
  return agents.map((agent) => ({
    name: agent.name.trim(),
    description: agent.description?.trim() ?? "",
    keywords: agent.keywords ?? [],
    negatives: agent.negatives ?? [],
    examples: agent.examples ?? [],
    priority: agent.priority ?? 0,
  }));
}

/** A unit vector an agent: the mean of its description and examples. */
export async function prototypes(encoder, agents) {
  const rows = [];
  for (const { name, description, examples } of agents) {
    const vectors = await encoder.encode([...(description ? [`${name}: ${description}`] : []), ...examples]);
    const sum = vectors[0].map((_, place) => vectors.reduce((total, vector) => total + vector[place], 0));
    const length = Math.sqrt(dot(sum, sum));
    rows.push([sum.map((value) => value / length)]);
  }
  return rows;
}

export class Router {
  /**
   * Open a router.
   *
   * @param {Bundle} bundle
   * @param {{ort: object, Tokenizer: Function}} runtime
   * @param {object} [options]
   * @param {object[]} [options.agents] Agents of your own, with the fields of the JSON files.
   * @param {string} [options.strategy] One of `STRATEGIES`; `keyword` needs no model, and none is loaded.
   * @param {string} [options.variant] Id of a variant.
   * @param {string[]} [options.providers] ONNX Runtime's.
   * @param {Encoder} [options.encoder] One that is loaded already, of the same bundle.
   */
  static async load(bundle, runtime, { agents, strategy = "hybrid", variant, providers, encoder } = {}) {
    checkStrategy(strategy);
    const own = agents && checkAgents(agents);
    const head = own ? null : bundle.head;
    const plain = strategy === "keyword" && !encoder;
    const loaded = plain ? null : (encoder ?? (await Encoder.load(bundle, runtime, { variant, providers })));
    const { calibration } = loaded?.variant ?? bundle.variant(variant);
    const rows = loaded && (head ? head.prototypes : await prototypes(loaded, own ?? bundle.agents));
    return new Router(own ?? bundle.agents, calibration[head ? "trained" : "custom"], loaded, rows, head, strategy);
  }

  constructor(agents, calibration, encoder, rows, head, strategy) {
    this.agents = agents;
    this.calibration = calibration;
    this.encoder = encoder;
    this.prototypes = rows;
    this.strategy = checkStrategy(strategy);
    this._head = head;
    this._rules = new KeywordRules(agents);
  }

  /**
   * Decide which agent takes a task.
   *
   * @param {string} task
   * @param {string} [strategy] Another than the router's; one that was loaded for `keyword` has no model for others.
   * @returns {Promise<object>} What `ruvltra route --json` prints of a decision.
   */
  async route(task, strategy = this.strategy) {
    return this.decide(await this.signals(task), strategy);
  }

  /** Decide for many tasks, in their order. */
  async routeMany(tasks, strategy = this.strategy) {
    if (!Array.isArray(tasks)) throw new EdgeError("routeMany takes a list of tasks. Put the task into a list.");
    const decisions = [];
    for (const task of tasks) decisions.push(await this.route(task, strategy));
    return decisions;
  }

  /** Match keywords and measure similarities: what `decide` weighs. */
  async signals(task) {
    if (typeof task !== "string") throw new EdgeError(`a task must be a text, not ${typeof task}. Convert it first.`);
    const [start, longer] = cut(trimStart(task), MAX_CHARACTERS);
    const text = start.toWellFormed();
    const matches = this._rules.match(text);
    if (!this.encoder) {
      return { matches, cosine: null, evidence: null, outOfScope: null, truncated: longer, empty: !hasContent(text) };
    }
    const tokens = this.encoder.tokenize(text);
    const vector = await this.encoder.encodeTokens(tokens);
    const cosine = this.prototypes.map((rows) => Math.max(...rows.map((row) => dot(row, vector))));
    let evidence = cosine;
    let outOfScope = null;
    if (this._head?.linear) {
      const said = this._head.linear.weight.map((row, place) => dot(row, vector) + this._head.linear.bias[place]);
      outOfScope = said.pop();
      evidence = said;
    } else if (this._head) {
      outOfScope = dot(this._head.out_of_scope, vector);
    }
    const truncated = longer || tokens.truncated;
    return { matches, cosine, evidence, outOfScope, truncated, empty: tokens.empty, vector };
  }

  /** Weigh signals by a strategy. */
  decide(signals, strategy = this.strategy) {
    checkStrategy(strategy);
    if (!signals.cosine && strategy !== "keyword") {
      throw new EdgeError(`the strategy "${strategy}" needs an encoder. Load the router with it.`);
    }
    const { matches, empty } = signals;
    let method = strategy;
    if (strategy === "keyword-first") method = matches.first.length ? "keyword" : "embedding";
    const cosine = strategy === "keyword" ? null : signals.cosine;
    const calibration = this.calibration[method];
    const shares = probabilities(signals, calibration);
    const order = shares.map((_, place) => place);
    order.sort((a, b) => shares[b] - shares[a] || a - b);
    if (method === "keyword") {
      // The rules decide, whatever the fitted weights; among those that they cannot tell apart the similarity does.
      const leads = (place) => Number(matches.first.includes(place));
      const found = (place) => Number(matches.phrases[place].length > 0);
      order.sort((a, b) => leads(b) - leads(a) || found(b) - found(a) || (cosine ? cosine[b] - cosine[a] : 0) || a - b);
    }
    const [top, second] = order;
    const confidence = shares[top];
    const unmatched = method === "keyword" && !matches.first.length;
    const abstains = empty || unmatched || confidence < calibration.threshold;
    return {
      agent: abstains ? null : this.agents[top].name,
      method: abstains ? "abstain" : method,
      confidence: empty ? 0 : confidence,
      margin: empty || second === undefined ? 0 : confidence - shares[second],
      matched: method === "embedding" ? [] : matches.phrases[top],
      ranking: order.map((place) => ({
        id: this.agents[place].name,
        score: shares[place],
        cosine: cosine ? cosine[place] : null,
      })),
      truncated: signals.truncated,
    };
  }
}

function checkStrategy(strategy) {
  if (STRATEGIES.includes(strategy)) return strategy;
  throw new EdgeError(`unknown strategy ${JSON.stringify(strategy)}. Use one of: ${STRATEGIES.join(", ")}.`);
}

/** A probability an agent; they add up to one less that of "nobody". The formula is that of edge.bundle.Calibration. */
export function probabilities({ matches, evidence, outOfScope }, calibration) {
  const logits = matches.phrases.map((phrases, position) => {
    const base = evidence ? evidence[position] * calibration.cosine : 0;
    return base + (phrases.length ? calibration.matched : 0);
  });
  for (const position of matches.first) logits[position] += calibration.first;
  const rest =
    calibration.out_of_scope === null ? -Infinity : calibration.out_of_scope + calibration.cosine * (outOfScope ?? 0);
  const highest = Math.max(...logits, rest);
  const exponents = logits.map((logit) => Math.exp(logit - highest));
  const total = exponents.reduce((sum, value) => sum + value, 0) + Math.exp(rest - highest);
  return exponents.map((value) => value / total);
}
