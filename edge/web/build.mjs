/** Copies what the page needs of its packages into vendor/, with their licences; says how large it is. */
import { cp, mkdir, readFile, rm, writeFile } from "node:fs/promises";
import { gzipSync } from "node:zlib";

const FILES = {
  "onnxruntime-web": [
    "dist/ort.wasm.min.mjs",
    "dist/ort-wasm-simd-threaded.mjs",
    "dist/ort-wasm-simd-threaded.wasm",
    "dist/ort.webgpu.min.mjs",
    "dist/ort-wasm-simd-threaded.asyncify.mjs",
    "dist/ort-wasm-simd-threaded.asyncify.wasm",
  ],
  "@huggingface/tokenizers": ["dist/tokenizers.min.mjs"],
};
// Who copies these packages has to pass their licences on; onnxruntime-web's package holds no text of its own.
const LICENCES = {
  "onnxruntime-web": ["MIT", "onnxruntime.LICENSE.txt"],
  "@huggingface/tokenizers": ["Apache-2.0", "node_modules/@huggingface/tokenizers/LICENSE"],
};

const root = new URL("./", import.meta.url);
const partial = new URL("vendor.partial/", root);
await rm(partial, { recursive: true, force: true });
await mkdir(partial, { recursive: true });
const notices = [];
for (const [name, files] of Object.entries(FILES)) {
  const folder = new URL(`node_modules/${name}/`, root);
  const { version, license, repository } = JSON.parse(await readFile(new URL("package.json", folder), "utf8"));
  const [known, text] = LICENCES[name];
  if (license !== known) throw new Error(`${name}: the licence is ${license}. Look at it, then change build.mjs.`);
  const source = repository?.url ?? repository ?? "npm";
  notices.push(`${name} ${version}, ${license}, ${source}\n\n${await readFile(new URL(text, root), "utf8")}`);
  for (const file of files) {
    const target = new URL(file.split("/").pop(), partial);
    await cp(new URL(file, folder), target);
    const bytes = await readFile(target);
    const packed = gzipSync(bytes).length;
    console.log(`${file.split("/").pop().padEnd(36)} ${(bytes.length / 1e6).toFixed(2)} MB, ${(packed / 1e6).toFixed(2)} MB by gzip`);
  }
}
await writeFile(new URL("NOTICE.txt", partial), notices.join("\n\n"));
await rm(new URL("vendor/", root), { recursive: true, force: true });
await cp(partial, new URL("vendor/", root), { recursive: true });
await rm(partial, { recursive: true });
