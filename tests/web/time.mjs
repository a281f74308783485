/** Reads {"folder", "tasks"} on standard input; writes how long Node takes to the first decision, and for each task. */
import { Router } from "../../edge/web/node.js";

let input = "";
for await (const part of process.stdin) input += part;
const { folder, tasks } = JSON.parse(input);
const began = performance.now();
const router = await Router.load(folder);
await router.route(tasks[0]);
const first = performance.now() - began;
const routes = [];
for (const task of tasks) {
  const start = performance.now();
  await router.route(task);
  routes.push(performance.now() - start);
}
process.stdout.write(JSON.stringify({ first, routes }));
