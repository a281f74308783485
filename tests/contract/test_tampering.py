"""A bundle that is not whole is refused by name, whatever was done to whichever file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from edge import BackendError, Bundle, BundleError, ChecksumError, ManifestError, Router, VersionError
from edge.bundle import MANIFEST, MANIFEST_DIGEST, manifest_digest
from edge.cli import main
from tests.conftest import MINI

# What routing reads; tests/unit/test_capabilities.py damages the rest.
FILES = sorted(path.name for path in (MINI / "bundle").iterdir() if not path.name.startswith("capabilities."))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MINI / "bundle", tmp_path / "bundle"))


def flip(path: Path, at: float) -> None:
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.seek(min(size - 1, int(size * at)))
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 0x20]))


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def grow(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"\n")


def link_outside(path: Path) -> None:
    outside = path.parent.parent / f"outside-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "first byte flipped": lambda path: flip(path, 0.0),
    "middle byte flipped": lambda path: flip(path, 0.5),
    "last byte flipped": lambda path: flip(path, 1.0),
    "cut in half": halve,
    "emptied": empty,
    "grown": grow,
    "missing": Path.unlink,
    "link outside": link_outside,
}


def test_the_bundle_has_the_files_that_are_damaged_below() -> None:
    assert {MANIFEST, MANIFEST_DIGEST, "agents.json", "goldens.json", "tokenizer.json"} < set(FILES)
    assert any(name.endswith(".onnx") for name in FILES)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused_and_named(copy: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    DAMAGE[damage](copy / name)
    with pytest.raises(ChecksumError) as error:
        Router.load(copy)
    message = str(error.value)
    assert name in message
    assert "Copy the bundle again" in message
    assert main(["route", "--bundle", str(copy), "Fix the login"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert name in captured.err
    assert main(["doctor", str(copy)]) == 1


def rewrite(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change the manifest and its digest, as somebody who knows the format would."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    change(manifest)
    data = json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(data)
    (folder / MANIFEST_DIGEST).write_bytes(manifest_digest(data))


def nested(*keys: str | int) -> Callable[[object], Callable[[dict[str, object]], object]]:
    def setter(value: object) -> Callable[[dict[str, object]], object]:
        def change(manifest: dict[str, object]) -> None:
            place: object = manifest
            for key in keys[:-1]:
                place = place[key]  # type: ignore[index]
            place[keys[-1]] = value  # type: ignore[index]

        return change

    return setter


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (nested("format")(2), VersionError, "Update ruvltra-edge"),
        (nested("format")("1"), ManifestError, "'format' must be an integer"),
        (nested("name")(None), ManifestError, "'name' must be a string"),
        (nested("variants")([]), ManifestError, "no variants"),
        (nested("variants")({}), ManifestError, "'variants' must be a list"),
        (nested("default_variant")("int2"), BundleError, "no variant 'int2'"),
        (nested("encoder", "pooling")("banana"), ManifestError, "must pool by one of"),
        (nested("encoder", "max_length")(10**30), ManifestError, "absurdly large"),
        (nested("variants", 0, "minimum_cosine")(10**400), ManifestError, "must be finite"),
        (nested("variants", 0, "bytes")(2**62), ManifestError, "absurdly large"),
        (nested("encoder", "dim")(0), ManifestError, "'dim' must be at least 1"),
        (nested("encoder", "dim")(383), ManifestError, "must be finite, of unit length and of shape"),
        (nested("encoder", "dim")(True), ManifestError, "'dim' must be an integer"),
        (nested("tokenizer", "file")("../tokenizer.json"), ManifestError, "not a path inside the bundle"),
        (nested("tokenizer", "file")("/etc/passwd"), ManifestError, "not a path inside the bundle"),
        (nested("variants", 0, "file")("C:\\model.onnx"), ManifestError, "not a path inside the bundle"),
        (nested("variants", 0, "calibration", "trained", "hybrid", "cosine")("1"), ManifestError, "must be a number"),
        (nested("variants", 0, "calibration", "trained")({}), ManifestError, "no calibration"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    copy: Path, change: Callable[[dict[str, object]], object], error: type[BundleError], words: str
) -> None:
    rewrite(copy, change)
    with pytest.raises(error, match=words):
        Router.load(copy)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(copy: Path, value: str) -> None:
    text = (copy / MANIFEST).read_text(encoding="utf-8")
    start = text.index('"threshold": ') + len('"threshold": ')
    end = text.index("\n", start)
    data = (text[:start] + value + text[end:]).encode()
    (copy / MANIFEST).write_bytes(data)
    (copy / MANIFEST_DIGEST).write_bytes(manifest_digest(data))
    with pytest.raises(ManifestError, match="must be finite"):
        Router.load(copy)


def test_a_pipe_in_place_of_a_file_is_refused(copy: Path) -> None:
    (copy / "agents.json").unlink()
    os.mkfifo(copy / "agents.json")
    with pytest.raises(ChecksumError, match=r"agents\.json.*not a plain file"):
        Router.load(copy)


def test_a_file_that_changes_after_it_was_hashed_ahead_is_refused(copy: Path) -> None:
    bundle = Bundle.open(copy)
    weights = bundle.variant().weights
    assert weights is not None
    bundle.hash_ahead(weights)
    assert bundle.locate(weights) == copy / weights.file
    flip(copy / weights.file, 0.5)
    bundle.hash_ahead(weights)
    with pytest.raises(ChecksumError, match="has changed"):
        bundle.locate(weights)
    flip(copy / weights.file, 0.5)
    bundle.hash_ahead(weights)
    flip(copy / weights.file, 0.5)  # in between
    with pytest.raises(ChecksumError, match="has changed"):
        bundle.locate(weights)
    (copy / weights.file).unlink()
    bundle.hash_ahead(weights)
    with pytest.raises(ChecksumError, match="is missing"):
        bundle.locate(weights)


def test_files_that_the_manifest_does_not_list_are_not_pulled_in(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(copy, nested("variants", 0, "weights")(None))
    monkeypatch.chdir(copy)  # where the weights lie, and where ONNX Runtime would look
    with pytest.raises(BackendError, match="cannot load it"):
        Router.load(copy)


def test_no_bundle_here(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no bundle here"):
        Bundle.open(tmp_path / "nothing")
    (tmp_path / "file").write_text("hello")
    with pytest.raises(ManifestError, match="not a whole zip file"):
        Bundle.open(tmp_path / "file")
    with pytest.raises(ChecksumError, match=MANIFEST):
        Bundle.open(tmp_path)


def zipped(folder: Path, target: Path, root: str) -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for path in folder.iterdir():
            archive.write(path, root + path.name)
    return target


@pytest.mark.parametrize("root", ["", "ruvltra-mini/"])
def test_a_zipped_bundle_works_and_is_checked(copy: Path, tmp_path: Path, root: str, router: Router) -> None:
    archive = zipped(copy, tmp_path / "bundle.zip", root)
    task = "Write unit tests for the parser"
    assert Router.load(archive).route(task) == router.route(task)
    flip(copy / "agents.json", 0.5)
    with pytest.raises(ChecksumError, match=r"agents\.json"):
        Router.load(zipped(copy, tmp_path / "changed.zip", root))
    (copy / "agents.json").unlink()
    with pytest.raises(ChecksumError, match=r"agents\.json.*missing"):
        Router.load(zipped(copy, tmp_path / "missing.zip", root))
    whole = archive.read_bytes()
    for at in range(0, len(whole), len(whole) // 150):
        archive.write_bytes(whole[:at] + bytes([whole[at] ^ 0x20]) + whole[at + 1 :])
        with contextlib.suppress(BundleError):  # a flip in a time stamp changes nothing
            assert Router.load(archive, strategy="keyword").route(task).agent == "tester"
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BundleError):
        Router.load(archive)
