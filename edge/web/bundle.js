/** A bundle: its manifest, and its files, each checked by its sha256 before it is used. */
import { EdgeError } from "./errors.js";

const FORMAT = 1;
const AGAIN = "Copy the bundle again.";

const hex = (bytes) => [...new Uint8Array(bytes)].map((byte) => byte.toString(16).padStart(2, "0")).join("");

const inside = (file) => /^[^/\\:\0][^\\:\0]*$/.test(file) && !file.split("/").includes("..");

async function digest(bytes) {
  if (!globalThis.crypto?.subtle) {
    throw new EdgeError("this page may not compute hashes. Open it by https, or from localhost.");
  }
  return hex(await crypto.subtle.digest("SHA-256", bytes));
}

const json = (bytes, file) => {
  try {
    return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch (error) {
    throw new EdgeError(`${file}: is not valid JSON (${error.message}). ${AGAIN}`);
  }
};

export class Bundle {
  /**
   * Open a bundle: read its manifest, agents and tokenizer.
   *
   * @param {(file: string, progress?: (bytes: number) => void) => Promise<Uint8Array>} read Gives a file's bytes.
   * @param {(done: number, total: number) => void} [progress] Told of bytes read of all that routing reads.
   */
  static async open(read, progress) {
    const [bytes, stated] = await Promise.all([read("bundle.json"), read("bundle.json.sha256")]);
    if ((await digest(bytes)) !== new TextDecoder().decode(stated).slice(0, 64)) {
      throw new EdgeError(`bundle.json: has another sha256 than bundle.json.sha256 says. ${AGAIN}`);
    }
    const manifest = json(bytes, "bundle.json");
    if (manifest.format !== FORMAT) {
      throw new EdgeError(
        `bundle.json: has the format ${manifest.format}, this version reads ${FORMAT}. Use the version that made it.`,
      );
    }
    const bundle = new Bundle(manifest, read, progress);
    const [agents, tokenizer] = await Promise.all([bundle.read(manifest.agents), bundle.read(manifest.tokenizer)]);
    const { agents: listed, head } = json(agents, manifest.agents.file);
    bundle.agents = listed;
    bundle.head = head ?? null;
    bundle.tokenizer = json(tokenizer, manifest.tokenizer.file);
    return bundle;
  }

  constructor(manifest, read, progress) {
    this.manifest = manifest;
    this.encoder = manifest.encoder;
    this._read = read;
    this._progress = progress;
    this._done = new Map();
  }

  /** A variant that ONNX Runtime runs: the one of this id, or the default. */
  variant(id) {
    const known = this.manifest.variants.filter((variant) => variant.runtime === "onnx");
    const names = known.map((variant) => variant.id).join(", ");
    const chosen = known.find((variant) => variant.id === (id ?? this.manifest.default_variant)) ?? (id ? null : known[0]);
    if (!chosen) {
      throw new EdgeError(
        id && known.length
          ? `the bundle has no variant ${JSON.stringify(id)} for ONNX Runtime. Choose one of: ${names}.`
          : "the bundle has no variant for ONNX Runtime. Export it with one: --variants int8.",
      );
    }
    return chosen;
  }

  /** The bytes of a file that the manifest lists, checked. */
  async read(listed) {
    if (!inside(listed.file)) {
      throw new EdgeError(`bundle.json: ${JSON.stringify(listed.file)} is not a path inside the bundle. ${AGAIN}`);
    }
    const bytes = await this._read(listed.file, (count) => this._tell(listed, count));
    this._tell(listed, bytes.length);
    if (bytes.length !== listed.bytes || (await digest(bytes)) !== listed.sha256) {
      throw new EdgeError(`${listed.file}: is not the file that the manifest lists. ${AGAIN}`);
    }
    return bytes;
  }

  /** Texts with their token ids and fp32 unit vectors, to prove a tokenizer and a model by. */
  async goldens() {
    return json(await this.read(this.manifest.goldens), this.manifest.goldens.file).goldens;
  }

  _tell(listed, count) {
    if (!this._progress || listed === this.manifest.goldens) return;
    this._done.set(listed.file, count);
    const variant = this.variant();
    const needed = [this.manifest.agents, this.manifest.tokenizer, variant, variant.weights].filter(Boolean);
    const done = [...this._done.values()].reduce((sum, value) => sum + value, 0);
    this._progress(done, needed.reduce((sum, file) => sum + file.bytes, 0));
  }
}
