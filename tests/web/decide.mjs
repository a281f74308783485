/** Reads {"folder", "tasks", "agents", "strategy"} on standard input; writes each strategy's decisions, and tokens, as JSON. */
import { Router, STRATEGIES } from "../../edge/web/node.js";

let input = "";
for await (const part of process.stdin) input += part;
const { folder, tasks, agents, strategy } = JSON.parse(input);
const router = await Router.load(folder, { agents, strategy });
const rows = [];
for (const task of tasks) {
  const signals = await router.signals(task);
  const asked = STRATEGIES.filter((name) => router.encoder || name === router.strategy);
  const decisions = Object.fromEntries(asked.map((name) => [name, router.decide(signals, name)]));
  rows.push({ ids: router.encoder?.tokenize(task).ids, phrases: signals.matches.phrases, decisions });
}
process.stdout.write(JSON.stringify(rows));
