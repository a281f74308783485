/**
 * ruvltra-edge in Node: `import { Router } from "./node.js"`, and `await Router.load("path/to/bundle")`.
 *
 * ONNX Runtime's own Node binding runs the model; a bundle is a folder.
 */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";
import { Bundle } from "./bundle.js";
import { Encoder as AnyEncoder } from "./encoder.js";
import { EdgeError } from "./errors.js";
import { Router as AnyRouter, STRATEGIES } from "./router.js";

export { Bundle, EdgeError, STRATEGIES };

const runtime = { ort, Tokenizer };

/** Open the bundle in a folder. */
export const openBundle = (folder) =>
  Bundle.open(async (file) => {
    try {
      return new Uint8Array(await readFile(join(folder, file)));
    } catch (error) {
      throw new EdgeError(`${join(folder, file)}: cannot be read (${error.code}). Give the folder of a bundle.`);
    }
  });

export const Encoder = {
  /** @param {string|Bundle} bundle Its folder, or opened. @param {object} [options] As for `Encoder.load` of encoder.js. */
  load: async (bundle, options) => AnyEncoder.load(await opened(bundle), runtime, options),
};

export const Router = {
  /** @param {string|Bundle} bundle Its folder, or opened. @param {object} [options] As for `Router.load` of router.js. */
  load: async (bundle, options) => AnyRouter.load(await opened(bundle), runtime, options),
};

const opened = (bundle) => (typeof bundle === "string" ? openBundle(bundle) : bundle);
