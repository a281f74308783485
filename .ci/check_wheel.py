"""Checks a wheel's contents, and routes a task with it where it is installed: no network, no torch."""

from __future__ import annotations

import importlib.util
import os
import sys
import zipfile

LIMIT = 40_000_000  # bytes; the default bundle is most of it


def check_contents(wheel: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        size = sum(info.compress_size for info in archive.infolist())
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"edge", "export"}, f"the wheel holds {tops}"
    bundle = {name.removeprefix("edge/default_bundle/") for name in names if name.startswith("edge/default_bundle/")}
    needed = {"bundle.json", "bundle.json.sha256", "agents.json", "goldens.json", "tokenizer.json"}
    needed |= {"capabilities.json", "capabilities.npz"}
    assert needed < bundle, f"the default bundle holds {bundle}"
    assert "edge/web/vendor/ort-wasm-simd-threaded.wasm" in names, "the page's packages were not built in"
    assert not [name for name in names if "node_modules" in name or "asyncify" in name], "the wheel holds too much"
    assert any(name.endswith(".onnx") for name in bundle), "the default bundle has no model"
    assert not [name for name in names if "test" in name.split("/")[0]], "the wheel holds tests"
    assert any(name.endswith("LICENSE") for name in names), "the wheel has no licence"
    assert size < LIMIT, f"the wheel has {size} bytes"
    print(f"{os.path.basename(wheel)}: {len(names)} files, {size / 1e6:.1f} MB")


def refuse_network(event: str, arguments: tuple[object, ...]) -> None:
    if event.startswith("socket."):
        sys.stderr.write(f"network used: {event} {arguments}\n")
        os._exit(99)


if __name__ == "__main__":
    check_contents(sys.argv[1])
    for package in ("torch", "transformers", "onnx"):
        assert importlib.util.find_spec(package) is None, f"{package} is installed here"
    sys.addaudithook(refuse_network)
    from edge.cli import main

    assert main(["route", "--json", "Fix the null pointer in the login handler"]) == 0
    assert main(["capabilities", "review this pull request"]) == 0
    assert main(["doctor"]) == 0
    import edge

    assert edge.Router.load().route("Write unit tests for the parser").agent == "tester"
    print(f"routed from {os.path.dirname(edge.__file__)}, sockets blocked, torch absent")
