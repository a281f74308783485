"""``ruvltra playground``: a page in which a bundle runs wholly in the browser, served from here or written as files."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from edge.address import port_number
from edge.bundle import MANIFEST, MANIFEST_DIGEST, Bundle, File, manifest_digest
from edge.errors import InputError, ProviderUnavailable

WEB = Path(__file__).with_name("web")
_SCRIPTS = ("browser.js", "bundle.js", "casefold.js", "encoder.js", "errors.js", "keywords.js", "router.js", "text.js")
_PAGE = ("index.html", "style.css", "page.js", "map.js", "editor.js", "icon.svg", *_SCRIPTS)
_VENDOR = (
    "vendor/NOTICE.txt",
    "vendor/ort.wasm.min.mjs",
    "vendor/ort-wasm-simd-threaded.mjs",
    "vendor/ort-wasm-simd-threaded.wasm",
    "vendor/tokenizers.min.mjs",
)
# WebGPU's part is as large as all the rest, and not in the wheel.
_WEBGPU = (
    "vendor/ort.webgpu.min.mjs",
    "vendor/ort-wasm-simd-threaded.asyncify.mjs",
    "vendor/ort-wasm-simd-threaded.asyncify.wasm",
)
_OURS = ".ruvltra-playground"  # marks a folder that was written by --output
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
    ".txt": "text/plain; charset=utf-8",
}
POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; connect-src 'self'; style-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asks each time, and is answered by 304
}


def fill(parser: argparse.ArgumentParser) -> None:
    """Give ``ruvltra playground`` its arguments."""
    parser.description = (
        "Serve a page on this machine alone, in which a bundle runs wholly in the browser: type a task, and see where "
        "it goes and why. With --output, write it as files for any web server instead."
    )
    parser.add_argument("--bundle", metavar="DIR", help="bundle folder or zip file (default: the one that is built in)")
    parser.add_argument("--port", type=port_number, default=8750, metavar="N", help="default: 8750; 0 takes a free one")
    parser.add_argument("--no-open", action="store_true", help="do not open the browser")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write files there instead of serving them")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    files = site(Bundle.open(options.bundle))
    if options.output is not None:
        total = write(files, options.output)
        print(f"{options.output}: {len(files)} files, {total / 1e6:.1f} MB. Serve them with any web server.")
        return 0
    try:
        server = Server(files, options.port)
    except OSError as error:
        raise InputError(f"port {options.port}: cannot be used ({error}). Choose another by --port.") from None
    print(f"{server.address}\nCtrl-C ends it.", flush=True)
    if not options.no_open:
        import webbrowser

        threading.Thread(target=webbrowser.open, args=(server.address,), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


def site(bundle: Bundle) -> dict[str, Callable[[], bytes]]:
    """The page's files by their relative address, each with what reads it.

    Raises:
        InputError: The JavaScript of other people was not built in.
        ProviderUnavailable: The bundle has no variant that runs in a browser.
    """
    missing = [name for name in _VENDOR if not (WEB / name).is_file()]
    if missing:
        raise InputError(
            f"{WEB / missing[0]}: the page's JavaScript packages are not here. Run, in a checkout: "
            "cd edge/web && npm ci --ignore-scripts && npm run build; then install it again, unless with -e."
        )
    variants = [variant for variant in bundle.variants if variant.runtime == "onnx"]
    if not variants:
        raise ProviderUnavailable(f"{bundle.path}: has no variant for a browser. Export it with an onnx variant.")
    listed: list[File] = [bundle.files[name] for name in ("agents", "tokenizer", "goldens")]
    for variant in variants:
        listed += [variant.model, *([] if variant.weights is None else [variant.weights])]
    files: dict[str, Callable[[], bytes]] = {name: (WEB / name).read_bytes for name in (*_PAGE, *_VENDOR)}
    if all((WEB / name).is_file() for name in _WEBGPU):
        files.update({name: (WEB / name).read_bytes for name in _WEBGPU})
    files[f"bundle/{MANIFEST}"] = lambda: bundle.manifest
    files[f"bundle/{MANIFEST_DIGEST}"] = lambda: manifest_digest(bundle.manifest)
    files.update({f"bundle/{file.file}": partial(bundle.read, file) for file in listed})
    return files


def write(files: dict[str, Callable[[], bytes]], folder: Path) -> int:
    """Write the page as a folder, whole or not at all; how many bytes there are.

    Raises:
        InputError: The folder holds something else, or cannot be written.
    """
    try:
        if folder.exists() and not (folder / _OURS).is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder}: holds something else. Choose a new or empty folder.")
        partial_folder = folder.resolve().with_name(f".{folder.name}.{os.getpid()}.partial")
        total = 0
        try:
            for name, read in files.items():
                target = partial_folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                total += target.write_bytes(read())
            (partial_folder / _OURS).touch()
            if folder.exists():
                shutil.rmtree(folder)
            partial_folder.rename(folder.resolve())
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error}). Choose another folder for --output.") from None
    return total


class Server(ThreadingHTTPServer):
    """Serves the page's files, and nothing else, to this machine's browsers.

    Attributes:
        address: Where the page is.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, Callable[[], bytes]], port: int = 0) -> None:
        """Listen on the loopback address.

        Raises:
            OSError: The port cannot be used.
        """
        self.files = files
        super().__init__(("127.0.0.1", port), _Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "ruvltra-playground"
    timeout = 30  # seconds for a request to come in

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if host not in ("127.0.0.1", "localhost"):  # a name of somebody else's that leads here
            self._send(
                HTTPStatus.FORBIDDEN, b"This page is for this machine alone. Use http://127.0.0.1.\n", ".txt", body
            )
            return
        name = self.path.partition("?")[0].removeprefix("/") or "index.html"
        read = self.server.files.get(name)
        if read is None:
            self._send(HTTPStatus.NOT_FOUND, b"There is no such file. Start at /.\n", ".txt", body)
            return
        content = read()
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        if self.headers.get("If-None-Match") == tag:
            self._send(HTTPStatus.NOT_MODIFIED, b"", Path(name).suffix, False, tag)
            return
        self._send(HTTPStatus.OK, content, Path(name).suffix, body, tag)

    def _send(self, status: HTTPStatus, content: bytes, suffix: str, body: bool, tag: str | None = None) -> None:
        self.send_response(status)
        for key, value in _HEADERS.items():
            self.send_header(key, value)
        if tag is not None:
            self.send_header("ETag", tag)
        if status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Type", _TYPES.get(suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what is asked for is the page's files, over and over."""
