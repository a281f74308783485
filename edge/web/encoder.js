/** Texts to token ids to unit vectors; what edge/encoder.py does. */
import { EdgeError } from "./errors.js";

// Left out in edge/session.py too: ONNX Runtime's fused norm takes longer, and its sums round differently.
const NOT_FUSED = { optimization: { disable_specified_optimizers: "SkipLayerNormFusion" } };
const LENGTH_TOLERANCE = 1e-3; // of a unit vector's length
// Ideographs beyond the first 65,536 characters: the library looks at their halves, and does not set them apart.
const RARE_IDEOGRAPHS = /[\u{20000}-\u{2a6df}\u{2a700}-\u{2b81f}\u{2b920}-\u{2ceaf}\u{2f800}-\u{2fa1f}]/gu;

export class Encoder {
  /**
   * Open a bundle's encoder.
   *
   * @param {Bundle} bundle
   * @param {{ort: object, Tokenizer: Function}} runtime ONNX Runtime's module and the tokenizers library's class.
   * @param {{variant?: string, providers?: string[]}} [options] Id of a variant, and ONNX Runtime's providers for it.
   */
  static async load(bundle, { ort, Tokenizer }, { variant, providers } = {}) {
    const chosen = bundle.variant(variant);
    const tokenizer = new Tokenizer(bundle.tokenizer, {});
    const [graph, weights] = await Promise.all([
      bundle.read(chosen),
      chosen.weights ? bundle.read(chosen.weights) : Promise.resolve(null),
    ]);
    const options = {
      intraOpNumThreads: 1,
      interOpNumThreads: 1,
      graphOptimizationLevel: "all",
      logSeverityLevel: 3,
      extra: NOT_FUSED,
    };
    if (weights) options.externalData = [{ path: chosen.weights.file.split("/").pop(), data: weights }];
    if (providers) options.executionProviders = providers;
    let session;
    try {
      session = await ort.InferenceSession.create(graph, options);
    } catch (error) {
      throw new EdgeError(`${chosen.file}: ONNX Runtime cannot load it (${error.message}). Use another variant.`);
    }
    return new Encoder(bundle, chosen, ort, tokenizer, session);
  }

  constructor(bundle, variant, ort, tokenizer, session) {
    this.variant = variant;
    this.dim = bundle.encoder.dim;
    this.maxLength = bundle.encoder.max_length;
    this.prompt = bundle.encoder.prompt;
    this._ort = ort;
    this._tokenizer = tokenizer;
    this._session = session;
    this._last = Promise.resolve();
    const normalizers = [bundle.tokenizer.normalizer, ...(bundle.tokenizer.normalizer?.normalizers ?? [])];
    // The library lowers whole texts, where a sigma that ends a word has another form; Python's lowers characters.
    this._lowers = normalizers.some((step) => step?.lowercase || step?.type === "Lowercase");
    this._setsApart = normalizers.some((step) => step?.handle_chinese_chars);
    // The special tokens at either end: what is around a text's own tokens.
    const own = tokenizer.encode("a", { add_special_tokens: false }).ids;
    const all = tokenizer.encode("a").ids;
    const start = all.findIndex((_, place) => own.every((id, offset) => all[place + offset] === id));
    this._before = all.slice(0, start);
    this._after = all.slice(start + own.length);
    this._empty = this._own(this.prompt).length;
  }

  /**
   * Token ids of a text, cut to the maximum length.
   *
   * @param {string} text
   * @returns {{ids: number[], truncated: boolean, empty: boolean}}
   */
  tokenize(text) {
    const own = this._own(this.prompt + text.toWellFormed());
    const room = this.maxLength - this._before.length - this._after.length;
    const ids = [...this._before, ...own.slice(0, room), ...this._after];
    // Without special tokens an empty text has no token, and no graph runs on none.
    return { ids: ids.length ? ids : [0], truncated: own.length > room, empty: own.length === this._empty };
  }

  _own(text) {
    let plain = this._lowers ? text.replaceAll("Σ", "σ") : text;
    if (this._setsApart) plain = plain.replace(RARE_IDEOGRAPHS, " $& ");
    return this._tokenizer.encode(plain, { add_special_tokens: false }).ids;
  }

  /** (dim,) unit vector of one tokenised text; texts run one after the other. */
  async encodeTokens({ ids }) {
    const result = this._last.then(() => this._run(ids));
    this._last = result.catch(() => {});
    return result;
  }

  async _run(ids) {
    const shape = [1, ids.length];
    const { Tensor } = this._ort;
    const output = await this._session.run({
      input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), shape),
      attention_mask: new Tensor("int64", new BigInt64Array(ids.length).fill(1n), shape),
    });
    const vector = output.sentence_embedding.data;
    const length = Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
    if (vector.length !== this.dim || !(Math.abs(length - 1) < LENGTH_TOLERANCE)) {
      throw new EdgeError("the model returned something that is no unit vector. Use another variant or browser.");
    }
    return Float32Array.from(vector);
  }

  /**
   * Embed texts.
   *
   * @param {string[]} texts Longer ones than the maximum length are cut.
   * @returns {Promise<Float32Array[]>} A unit vector each.
   */
  async encode(texts) {
    if (!Array.isArray(texts)) throw new EdgeError("encode takes a list of texts. Put the text into a list.");
    const vectors = [];
    for (const text of texts) vectors.push(await this.encodeTokens(this.tokenize(text)));
    return vectors;
  }
}
