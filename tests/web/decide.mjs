/** Reads {"folder", "tasks", "agents"} on standard input; writes each strategy's decisions, and tokens, as JSON. */
import { Router, STRATEGIES } from "../../edge/web/node.js";

let input = "";
for await (const part of process.stdin) input += part;
const { folder, tasks, agents } = JSON.parse(input);
const router = await Router.load(folder, { agents });
const rows = [];
for (const task of tasks) {
  const signals = await router.signals(task);
  const decisions = Object.fromEntries(STRATEGIES.map((name) => [name, router.decide(signals, name)]));
  rows.push({ ids: router.encoder.tokenize(task).ids, phrases: signals.matches.phrases, decisions });
}
process.stdout.write(JSON.stringify(rows));
