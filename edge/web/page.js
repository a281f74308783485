/** The page: a task goes in, the decision and its reasons come out. */
import { Encoder, hasWebgpu, openBundle, Router, STRATEGIES } from "./browser.js";
import { AgentEditor } from "./editor.js";
import { AgentMap } from "./map.js";
import { WORD } from "./text.js";

const EXAMPLES = [
  "Fix the null pointer in the login handler",
  "the checkout page is blank since Friday",
  "is the password reset token guessable?",
  "cut the p99 latency of the search endpoint",
  "write the release notes for 2.3",
  "which sourdough recipe needs no starter?",
];
const PAUSE = 60; // milliseconds without a key before a task is routed
const ROUNDS = 5; // of the goldens that WebGPU is timed by,
const TIMED = 4; // and how many those are
const HALF_PRECISION = 0.999; // what a cosine may fall to on hardware that computes in it
const $ = (id) => document.getElementById(id);
const seconds = (milliseconds) => `${(milliseconds / 1000).toFixed(milliseconds < 1000 ? 2 : 1)} s`;

const began = performance.now();
const map = new AgentMap($("map"));
let bundle, encoder, router, editor, builtIn, ready;
let turn = 0; // of what is being decided: an older answer does not overwrite a newer one
let loading = 0; // the same of routers

const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`)?.value;

function fail(error) {
  $("error").textContent = error?.message ?? String(error);
  $("error").hidden = false;
}

function radios(fieldset, name, values, checked) {
  for (const value of values) {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name, value, checked: value === checked });
    const text = document.createElement("span");
    text.textContent = value;
    label.append(input, " ", text);
    fieldset.append(label);
  }
}

/** A task's text with the keywords that spoke for the agent marked. */
function marked(task, phrases) {
  const parts = phrases.map((phrase) => phrase.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&").replace(/ /g, "\\s+"));
  if (!parts.length) return [task];
  const found = new RegExp(`(?<!${WORD})(?:${parts.sort((a, b) => b.length - a.length).join("|")})(?!${WORD})`, "giu");
  const pieces = [];
  let last = 0;
  for (const match of task.matchAll(found)) {
    pieces.push(task.slice(last, match.index));
    const mark = document.createElement("mark");
    mark.textContent = match[0];
    pieces.push(mark);
    last = match.index + match[0].length;
  }
  return [...pieces, task.slice(last)];
}

const rows = new Map(); // of the ranking, by agent, so that they need not be made anew

function bar(id) {
  if (!rows.has(id)) {
    const row = document.createElement("li");
    row.innerHTML = '<span class="name"></span><span class="bar"><svg aria-hidden="true"><rect height="100%"/></svg></span><span class="share"></span>';
    row.querySelector(".name").textContent = id;
    row.querySelector(".name").title = id;
    rows.set(id, row);
  }
  return rows.get(id);
}

function show(task, decision, signals, milliseconds) {
  const [first] = decision.ranking;
  $("error").hidden = true;
  $("agent").textContent = decision.agent ?? "nobody";
  $("agent").classList.toggle("nobody", decision.agent === null);
  const sure = `${(100 * first.score).toFixed(0)} %`;
  const reasons = decision.agent === null ? [`abstains; nearest is ${first.id}, ${sure}`] : [`${sure} confident`, `by ${decision.method}`];
  if (decision.matched.length) reasons.push(`keywords: ${decision.matched.join(", ")}`);
  if (decision.truncated) reasons.push("only the beginning was read");
  reasons.push(`${milliseconds.toFixed(1)} ms`);
  $("why").textContent = reasons.join(" · ");
  $("marked").replaceChildren(...marked(task, decision.matched));
  $("ranking").replaceChildren(
    ...decision.ranking.map(({ id, score }) => {
      const row = bar(id);
      row.querySelector("rect").setAttribute("width", `${(100 * score).toFixed(1)}%`);
      row.querySelector(".share").textContent = `${(100 * score).toFixed(1)} %`;
      return row;
    }),
  );
  map.move(signals.empty ? null : signals.vector, router.agents.findIndex(({ name }) => name === first.id));
}

function clear() {
  $("error").hidden = true;
  blank("Type a task, or choose an example.");
  $("ranking").replaceChildren(...router.agents.map(({ name }) => {
    const row = bar(name);
    row.querySelector("rect").setAttribute("width", "0");
    row.querySelector(".share").textContent = "";
    return row;
  }));
  map.move(null, 0);
}

/** No decision; what is asked for instead. */
function blank(why) {
  $("agent").textContent = "…";
  $("agent").classList.add("nobody");
  $("why").textContent = why;
  $("marked").replaceChildren();
  $("ranking").replaceChildren();
}

async function decide() {
  if (!router) return;
  const asked = router; // another one may come while this one thinks
  const mine = ++turn;
  const task = $("task").value;
  try {
    if (!task.trim()) return clear();
    const start = performance.now();
    const signals = await asked.signals(task);
    const decision = asked.decide(signals, chosen("strategy"));
    const milliseconds = performance.now() - start;
    if (mine !== turn) return;
    show(task, decision, signals, milliseconds);
    document.body.dataset.decided = String(mine);
  } catch (error) {
    fail(error);
  }
}

async function use(agents) {
  const mine = ++loading;
  try {
    const made = agents ? await Router.load(bundle, { agents, encoder }) : (builtIn ??= await Router.load(bundle, { encoder }));
    if (mine !== loading) return;
    router = made;
    rows.clear();
    map.show(router.agents.map(({ name }) => name), router.prototypes);
    await decide();
  } catch (error) {
    if (mine !== loading) return;
    router = null; // nothing is decided by other agents than those that are shown
    turn++;
    blank("");
    fail(error);
  }
}

function agentsChanged() {
  const own = chosen("set") === "own";
  $("editor").hidden = !own;
  return use(own ? editor.agents : null);
}

/** Take another encoder, and say which. */
async function run(other, where) {
  encoder = other;
  builtIn = null;
  await agentsChanged();
  const { name, version } = bundle.manifest;
  const { id, bytes, weights } = encoder.variant;
  const size = ((bytes + (weights?.bytes ?? 0)) / 1e6).toFixed(0);
  $("status").textContent = `${name} ${version}, ${id}, ${size} MB, in ${where}; ready in ${ready}`;
}

async function load(variant) {
  const other = await Encoder.load(bundle, { variant });
  ready ??= seconds(performance.now() - began);
  await run(other, "WebAssembly");
  $("measure").disabled = false;
  $("measure").textContent = "measure WebGPU";
}

/** Median milliseconds of an encoder for a few golden texts, and its lowest cosine to the vectors of all. */
async function measured(tried, goldens) {
  const times = [];
  let cosine = 1;
  for (const { text, vector } of goldens) {
    const made = await tried.encodeTokens(tried.tokenize(text));
    cosine = Math.min(cosine, made.reduce((sum, value, place) => sum + value * vector[place], 0));
  }
  for (let round = 0; round < ROUNDS; round++) {
    for (const { text } of goldens.slice(0, TIMED)) {
      const start = performance.now();
      await tried.encodeTokens(tried.tokenize(text));
      times.push(performance.now() - start);
    }
  }
  return { milliseconds: times.sort((a, b) => a - b)[times.length >> 1], cosine };
}

/** WebGPU is used only where it has proven itself on this device: right by the goldens, and quicker. */
async function measureWebgpu() {
  $("measure").disabled = true;
  $("measure").textContent = "measuring …";
  let outcome;
  try {
    const goldens = await bundle.goldens();
    const here = await measured(encoder, goldens);
    const { id } = encoder.variant;
    const tried = await Encoder.load(bundle, { variant: id, providers: ["webgpu"] });
    const there = await measured(tried, goldens);
    const right = there.cosine >= Math.min(encoder.variant.minimum_cosine, HALF_PRECISION);
    const wins = right && there.milliseconds < here.milliseconds;
    if (wins) await run(tried, "WebGPU");
    const times = `${there.milliseconds.toFixed(1)} ms, WebAssembly ${here.milliseconds.toFixed(1)} ms`;
    outcome = right ? `WebGPU: ${times}; ${wins ? "WebGPU" : "WebAssembly"} is used` : "WebGPU gives wrong vectors; WebAssembly is used";
  } catch (error) {
    outcome = `WebGPU does not run it; WebAssembly is used (${error.message.slice(0, 80)})`;
  }
  $("measure").textContent = outcome;
}

let waiting;
$("task").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(decide, PAUSE);
});
for (const text of EXAMPLES) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  button.addEventListener("click", () => {
    $("task").value = text;
    decide();
  });
  $("examples").append(button);
}
radios($("strategies"), "strategy", STRATEGIES, "hybrid");
$("strategies").addEventListener("change", decide);
$("sets").addEventListener("change", agentsChanged);
let editing;
editor = new AgentEditor($("agents"), () => {
  clearTimeout(editing);
  editing = setTimeout(agentsChanged, 300);
});
$("add").addEventListener("click", () => editor.add());
$("reset").addEventListener("click", () => editor.reset());
$("measure").addEventListener("click", measureWebgpu);
$("copy").addEventListener("click", () => navigator.clipboard.writeText(JSON.stringify(editor.agents, null, 2)));

try {
  bundle = await openBundle("bundle/", (done, total) => ($("loading").value = done / total));
  const ids = bundle.manifest.variants.filter((variant) => variant.runtime === "onnx").map((variant) => variant.id);
  if (ids.length > 1) {
    radios($("variants"), "variant", ids, bundle.variant().id);
    $("variants").hidden = false;
    $("variants").addEventListener("change", () => load(chosen("variant")).catch(fail));
  }
  await load();
  $("map-note").textContent =
    "Agents by their distances, drawn in two of many dimensions as nearly as can be; the task stands where it is pulled. The bars are what counts.";
  $("loading").classList.add("done");
  document.body.dataset.ready = "true";
  if (!$("task").value) $("task").value = EXAMPLES[0];
  await decide();
  document.body.dataset.first = String(performance.now() - began);
  $("webgpu").hidden = !(await hasWebgpu());
} catch (error) {
  $("status").textContent = "The bundle could not be opened.";
  $("loading").classList.add("done");
  fail(error);
}
export { Encoder, Router, bundle, decide, encoder, router };
