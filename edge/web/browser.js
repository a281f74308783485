/**
 * ruvltra-edge in a browser: `await Router.load("bundle/")`, an address relative to the page.
 *
 * ONNX Runtime runs the model in WebAssembly, on one thread: a text is too short for several.
 */
import * as ort from "./vendor/ort.wasm.min.mjs";
import { Tokenizer } from "./vendor/tokenizers.min.mjs";
import { Bundle } from "./bundle.js";
import { Encoder as AnyEncoder } from "./encoder.js";
import { EdgeError } from "./errors.js";
import { Router as AnyRouter, STRATEGIES } from "./router.js";

export { Bundle, EdgeError, STRATEGIES };

const vendor = new URL("./vendor/", import.meta.url).href;

function runtime(module) {
  module.env.wasm.numThreads = 1;
  module.env.wasm.wasmPaths = vendor;
  return { ort: module, Tokenizer };
}

/** ONNX Runtime's module for some providers; that of WebGPU is large, and fetched where it is asked for. */
const runtimeFor = async ({ providers } = {}) =>
  runtime(providers?.includes("webgpu") ? await import("./vendor/ort.webgpu.min.mjs") : ort);

/** Whether WebGPU can be tried: this browser gives an adapter, and its runtime lies beside the page. */
export async function hasWebgpu() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return Boolean(adapter) && (await fetch(`${vendor}ort.webgpu.min.mjs`, { method: "HEAD" })).ok;
}

async function read(address, progress) {
  let response;
  try {
    response = await fetch(address);
  } catch (error) {
    throw new EdgeError(`${address}: cannot be fetched (${error.message}). Check that the server runs.`);
  }
  if (!response.ok) throw new EdgeError(`${address}: cannot be fetched (${response.status}). Check the bundle's address.`);
  if (!progress || !response.body) return new Uint8Array(await response.arrayBuffer());
  const parts = [];
  let count = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    progress((count += value.length));
  }
  const bytes = new Uint8Array(count);
  let place = 0;
  for (const part of parts) {
    bytes.set(part, place);
    place += part.length;
  }
  return bytes;
}

/** Open the bundle at an address. */
export const openBundle = (address, progress) => {
  const base = new URL(address.endsWith("/") ? address : `${address}/`, document.baseURI);
  return Bundle.open((file, told) => read(new URL(file, base).href, told), progress);
};

export const Encoder = {
  /** @param {string|Bundle} bundle @param {object} [options] As for `Encoder.load` of encoder.js. */
  load: async (bundle, options) => AnyEncoder.load(await opened(bundle), await runtimeFor(options), options),
};

export const Router = {
  /** @param {string|Bundle} bundle @param {object} [options] As for `Router.load` of router.js. */
  load: async (bundle, options) => AnyRouter.load(await opened(bundle), await runtimeFor(options), options),
};

const opened = (bundle) => (typeof bundle === "string" ? openBundle(bundle) : bundle);
