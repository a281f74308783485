// Answers the questions of worker.py for the origin's npm package: node ruvllm.js FOLDER NAME [--once TEXT]
//
// `embed` is RuvLLM.embed and `route` is what the package names an agent by, baselineKeywordRouter: substrings of words
// in a list. RuvLLM.route, which its command line calls, chooses the size of a language model and no agent: "tier".
"use strict";
const fs = require("fs");
const path = require("path");
const readline = require("readline");

const [folder, name, , once] = process.argv.slice(2);
const start = process.hrtime.bigint();
const { RuvLLM, baselineKeywordRouter } = require(path.join(folder, "node_modules", "@ruvector", "ruvllm"));
const model = name === "ruvllm-keywords" ? null : new RuvLLM();
if (model !== null && !model.isNativeLoaded()) throw new Error("its native module is not loaded");

const seconds = (since) => Number(process.hrtime.bigint() - since) / 1e9;
const calls = {
  encode: (texts) => texts.map((text) => model.embed(text)),
  tier: (texts) => texts.map((text) => model.route(text)),
  route: (texts) => texts.map((text) => baselineKeywordRouter(text)),
};

// resourceUsage has the maximum of the process that started this one in it.
function peak() {
  if (process.platform !== "linux") return process.resourceUsage().maxRSS * 1024;
  return 1024 * Number(/VmHWM:\s+(\d+)/.exec(fs.readFileSync("/proc/self/status", "utf8"))[1]);
}

function answer(wanted) {
  if (wanted.do === "rss") {
    return { bytes: process.memoryUsage.rss(), peak: peak() };
  }
  if (wanted.do === "vectors") return { vectors: calls.encode(wanted.texts) };
  if (wanted.do === "agents") return { agents: calls.route(wanted.texts).map((found) => found.agent) };
  if (wanted.each) calls[wanted.do]([wanted.texts[0]]);
  const asked = wanted.each ? wanted.texts.map((text) => [text]) : [wanted.texts];
  const times = [];
  const begun = process.hrtime.bigint();
  for (let passes = 0; passes < (wanted.passes ?? 3) || seconds(begun) < (wanted.seconds ?? 0); passes += 1) {
    for (const texts of asked) {
      const from = process.hrtime.bigint();
      calls[wanted.do](texts);
      times.push(seconds(from));
    }
  }
  return { seconds: times };
}

const say = (found) => process.stdout.write(`${JSON.stringify(found)}\n`);
if (once !== undefined) {
  say(answer({ do: model === null ? "agents" : "vectors", texts: [once] }));
} else {
  say({ load: seconds(start) });
  readline.createInterface({ input: process.stdin }).on("line", (line) => say(answer(JSON.parse(line))));
}
