/** Reads {"folder", "tasks"} on standard input; writes the keywords that the rules find in each task, as JSON. */
import { openBundle } from "../../edge/web/node.js";
import { KeywordRules } from "../../edge/web/keywords.js";

let input = "";
for await (const part of process.stdin) input += part;
const { folder, tasks } = JSON.parse(input);
const rules = new KeywordRules((await openBundle(folder)).agents);
process.stdout.write(JSON.stringify(tasks.map((task) => rules.match(task).phrases)));
