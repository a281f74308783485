/**
 * Drives the page in headless Chromium; reads {"address", "script", ...} on standard input, writes JSON.
 *
 * What the page asks for, logs and breaks is collected: `foreign` are requests to other origins, `complaints` are
 * errors of the console (violations of the content security policy among them) and exceptions.
 */
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createRequire } from "node:module";

const { chromium } = createRequire(new URL("../../edge/web/package.json", import.meta.url))("playwright-core");

let input = "";
for await (const part of process.stdin) input += part;
const wanted = JSON.parse(input);

const profile = await mkdtemp(join(tmpdir(), "ruvltra-chromium-"));
const context = await chromium.launchPersistentContext(profile, {
  executablePath: "/usr/bin/chromium",
  headless: true,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", ...(wanted.flags ?? [])],
  viewport: wanted.viewport ?? { width: 1200, height: 900 },
  colorScheme: wanted.scheme ?? "light",
});
const page = await context.newPage();
const foreign = [];
const complaints = [];
page.on("request", (request) => {
  if (new URL(request.url()).origin !== new URL(wanted.address).origin && !request.url().startsWith("data:")) foreign.push(request.url());
});
page.on("console", (message) => { if (message.type() === "error") complaints.push(message.text()); });
page.on("pageerror", (error) => complaints.push(String(error)));

const scripts = {
  /** Each strategy's decisions, by the page's own modules. */
  decisions: () =>
    page.evaluate(async ({ tasks, agents }) => {
      const { Router, bundle, encoder } = await import("./page.js");
      const router = await Router.load(bundle, { agents, encoder });
      const rows = [];
      for (const task of tasks) {
        const signals = await router.signals(task);
        rows.push(Object.fromEntries(["keyword", "keyword-first", "embedding", "hybrid"].map((name) => [name, router.decide(signals, name)])));
      }
      return rows;
    }, wanted),
  /** The lowest cosine to the goldens, and how many token ids differ. */
  goldens: () =>
    page.evaluate(async () => {
      const { bundle, encoder } = await import("./page.js");
      let lowest = 1;
      let others = 0;
      for (const { text, ids, vector } of await bundle.goldens()) {
        const tokens = encoder.tokenize(text);
        others += String(tokens.ids) !== String(ids);
        const made = await encoder.encodeTokens(tokens);
        lowest = Math.min(lowest, made.reduce((sum, value, place) => sum + value * vector[place], 0));
      }
      return { lowest, others };
    }),
  /** What a visitor does: type, switch the strategy, add an agent of one's own. */
  visit: async () => {
    const said = {};
    const settled = () => page.waitForFunction((task) => document.querySelector("#agent").textContent !== "…" && document.querySelector("#task").value === task, wanted.task);
    await page.fill("#task", wanted.task);
    await settled();
    await page.waitForTimeout(300);
    said.agent = await page.textContent("#agent");
    said.why = await page.textContent("#why");
    said.marked = await page.$$eval("mark", (marks) => marks.map((mark) => mark.textContent));
    said.bars = await page.$$eval("#ranking li", (rows) => rows.length);
    said.labels = await page.$$eval("#map text", (labels) => labels.length);
    said.wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    said.paper = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    if (wanted.picture) await page.screenshot({ path: wanted.picture, fullPage: wanted.full ?? true });
    await page.check('input[name="set"][value="own"]', { force: true });
    await page.click("#add");
    const form = page.locator(".own").last();
    await form.locator("input").nth(0).fill("gardener");
    await form.locator("textarea").nth(0).fill("Plants, hedges, lawns and compost in the garden.");
    await page.fill("#task", "water the tomatoes and trim the hedge");
    await page.waitForFunction(() => document.querySelector("#agent").textContent === "gardener", null, { timeout: 10000 });
    said.own = await page.textContent("#agent");
    if (wanted.second) await page.screenshot({ path: wanted.second, fullPage: true });
    return said;
  },
  /** What is marked in each task, and who is first in the ranking that is shown with it. */
  marks: async () => {
    const rows = [];
    for (const task of wanted.tasks) {
      const before = await page.evaluate(() => Number(document.body.dataset.decided));
      await page.fill("#task", task);
      await page.waitForFunction((turn) => Number(document.body.dataset.decided) > turn || !document.querySelector("#error").hidden, before);
      rows.push({
        marked: await page.$$eval("mark", (marks) => marks.map((mark) => mark.textContent)),
        agent: await page.textContent("#agent"),
        first: await page.textContent("#ranking .name"),
        error: await page.locator("#error").isVisible(),
      });
    }
    return rows;
  },
  /** What is said while an agent of one's own has no name, while a task is typed, and once it has one. */
  nameless: async () => {
    const said = () => page.evaluate(() => ["#error", "#agent"].map((id) => document.querySelector(id).hidden ? "" : document.querySelector(id).textContent));
    await page.check('input[name="set"][value="own"]', { force: true });
    await page.click("#add");
    const form = page.locator(".own").last();
    await form.locator("textarea").nth(0).fill("Plants, hedges, lawns and compost in the garden.");
    await page.waitForFunction(() => !document.querySelector("#error").hidden);
    const at = await said();
    await page.fill("#task", "water the tomatoes and trim the hedge");
    await page.waitForTimeout(300); // longer than the page waits before it decides
    const typed = await said();
    await form.locator("input").nth(0).fill("gardener");
    await page.waitForFunction(() => document.querySelector("#agent").textContent === "gardener");
    return [at, typed, await said()];
  },
  /** Who takes a task where the storage holds something that is no list of agents. */
  kept: async () => {
    const seen = [];
    for (const kept of wanted.kept) {
      await page.evaluate((text) => localStorage.setItem("ruvltra-agents", text), kept);
      await page.reload();
      await page.waitForFunction(() => document.body.dataset.first);
      seen.push(await page.textContent("#agent"));
    }
    return seen;
  },
  /** What comes of measuring WebGPU. */
  webgpu: async () => {
    await page.click("#measure");
    await page.waitForFunction(() => / is used/.test(document.querySelector("#measure").textContent), null, { timeout: 60000 });
    return page.textContent("#measure");
  },
  /** What the page says when its bundle is broken. */
  refusal: async () => {
    await page.waitForFunction(() => !document.querySelector("#error").hidden, null, { timeout: 20000 });
    return page.textContent("#error");
  },
  /** Milliseconds from the page's first script to its first decision, and of decisions after it. */
  timing: async () => ({
    first: Number(await page.evaluate(() => document.body.dataset.first)),
    routes: await page.evaluate(async ({ tasks }) => {
      const { router } = await import("./page.js");
      const times = [];
      for (const task of tasks) {
        const start = performance.now();
        await router.route(task);
        times.push(performance.now() - start);
      }
      return times;
    }, wanted),
  }),
};

let result;
try {
  await page.goto(wanted.address);
  if (wanted.script !== "refusal") await page.waitForFunction(() => document.body.dataset.first, null, { timeout: 30000 });
  result = await scripts[wanted.script]();
} catch (error) {
  complaints.push(String(error));
} finally {
  await context.close();
  await rm(profile, { recursive: true, force: true });
}
process.stdout.write(JSON.stringify({ result, foreign, complaints }));
