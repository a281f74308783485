"""What people have, as records for a memory store: Markdown notes, JSON lines, lists of texts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from edge.errors import InputError

LONGEST = 1000  # characters of a passage; some 250 tokens, which is what the default encoder reads
_MARKDOWN = (".md", ".markdown")
_PASSED_OVER = {"node_modules", "venv", "__pycache__"}  # and what begins with a dot


def is_markdown(path: Path) -> bool:
    """Whether :func:`notes` finds something in it: a folder, or a Markdown file."""
    return path.is_dir() or path.suffix.lower() in _MARKDOWN


def notes(path: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each Markdown note of a folder, or the one that it is, with its passages.

    A note is called by its whole path, so that notes of two folders do not take each other's place, and one that is
    imported again, from wherever, takes its own. Hidden folders and those of installed packages are passed over.

    Raises:
        InputError: A note cannot be read, or there are none; the message names the file.
    """
    if not path.is_dir():
        yield _called(path), list(passages(_text(path), _called(path)))
        return
    files = []
    for folder, inner, names in os.walk(path, onerror=_refuse):
        inner[:] = sorted(name for name in inner if name not in _PASSED_OVER and not name.startswith("."))
        files += [Path(folder, name) for name in sorted(names) if Path(name).suffix.lower() in _MARKDOWN]
    if not files:
        raise InputError(f"{path}: no Markdown files in this folder. Give a folder of .md files, or a file.")
    for file in files:
        yield _called(file), list(passages(_text(file), _called(file)))


def within(path: Path) -> str:
    """What the names of the notes of a folder begin with."""
    return f"{_called(path).rstrip('/')}/"


def read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of a file that is no Markdown, each with where it stands.

    ``.jsonl`` has a JSON object a line, with the names of the arguments of :meth:`edge.MemoryStore.add`; ``.json`` a
    list of them. Any other file is a text a line.

    Raises:
        InputError: It cannot be read; the message names file and line.
    """
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        yield from json_lines(_text(path).split("\n"), str(path))
    elif path.suffix.lower() == ".json":
        yield from _json_list(_text(path), str(path))
    else:
        yield from lines(_text(path).split("\n"), str(path))


def json_lines(rows: Iterable[str], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A record for each line that is not blank, with file and line.

    Raises:
        InputError: A line is no JSON object; the message names it.
    """
    for number, row in enumerate(rows, 1):
        if not row.strip():
            continue
        try:
            record = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}:{number}: not valid JSON ({error}). Write one object a line.") from None
        yield f"{where}:{number}", _record(record, f"{where}:{number}")


def lines(rows: Iterable[str], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A record for each line that is not blank, with file and line."""
    for number, row in enumerate(rows, 1):
        if row.strip():
            yield f"{where}:{number}", {"text": row.strip()}


def passages(text: str, source: str) -> Iterator[dict[str, Any]]:
    """The passages of a Markdown text, each with ``source``, ``heading`` and ``line`` in its metadata.

    Its id is made of source, heading and place, so that reading a changed note again replaces its passages. Front
    matter is left out, code blocks stay whole, headings are those that begin with ``#``.
    """
    rows = text.split("\n")
    start = 0
    if rows[0].rstrip() == "---":
        start = next((i + 1 for i, row in enumerate(rows[1:], 1) if row.rstrip() in ("---", "...")), 0)
    headings: list[tuple[int, str]] = []  # of which the passage is, outermost first, with their levels
    seen: dict[str, int] = {}
    for first, level, block in _blocks(rows, start):
        if level:
            headings = [*(outer for outer in headings if outer[0] < level), (level, block)]
            continue
        title = " > ".join(heading for _, heading in headings if heading)
        seen[title] = seen.get(title, 0) + 1
        yield {
            "id": f"{source}#{title}#{seen[title]}",
            "text": f"{title}\n{block}" if title else block,
            "metadata": {"source": source, "heading": title, "line": first + 1},
        }


def _blocks(rows: list[str], start: int) -> Iterator[tuple[int, int, str]]:
    """Headings with their levels, and with 0 what is between them in pieces of whole paragraphs; and first lines."""
    fence = None
    paragraphs: list[tuple[int, str]] = []
    first, paragraph = start, list[str]()

    def end() -> None:
        if any(row.strip() for row in paragraph):
            paragraphs.append((first, "\n".join(paragraph).strip("\n")))
        paragraph.clear()

    for number, row in enumerate(rows[start:], start):
        mark = re.match(r" {0,3}(```+|~~~+)([^`]*)$", row)
        heading = re.match(r" {0,3}(#{1,6})(?:[ \t]+(.*?))??(?:[ \t]+#+)?[ \t]*$", row)
        if mark and fence is None:
            fence = mark.group(1)
        elif mark and fence is not None and mark.group(1).startswith(fence) and not mark.group(2).strip():
            fence = None
        elif fence is None and heading:
            end()
            yield from ((line, 0, text) for line, text in _joined(paragraphs))
            paragraphs.clear()
            yield number, len(heading.group(1)), (heading.group(2) or "").strip()
            continue
        elif fence is None and not row.strip():
            end()
            continue
        if not paragraph:
            first = number
        paragraph.append(row)
    end()
    yield from ((line, 0, text) for line, text in _joined(paragraphs))


def _joined(paragraphs: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Short paragraphs together, long ones cut between words."""
    first, text = 0, ""
    for number, paragraph in paragraphs:
        if text and len(text) + len(paragraph) + 2 > LONGEST:
            yield first, text
            text = ""
        if not text:
            first = number
        text = f"{text}\n\n{paragraph}" if text else paragraph
        while len(text) > LONGEST:
            cut = max(text.rfind("\n", 1, LONGEST), text.rfind(" ", LONGEST // 2, LONGEST))
            cut = LONGEST if cut < 1 else cut
            yield first, text[:cut].strip()
            first += text[:cut].count("\n")
            text = text[cut:].strip()
    if text:
        yield first, text


def _json_list(text: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error}). For one object a line, call it .jsonl.") from None
    if not isinstance(records, list):
        raise InputError(f'{where}: not a list. Write [{{"text": ...}}, ...], or one object a line into a .jsonl.')
    for number, record in enumerate(records, 1):
        yield f"{where}, record {number}", _record(record, f"{where}, record {number}")


def _record(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise InputError(f'{where}: not an object. Write {{"text": ...}}.')
    return {key: value for key, value in record.items() if key not in ("created", "expires")}


def _called(path: Path) -> str:
    return Path(os.path.abspath(path)).as_posix()  # noqa: PTH100 (resolve() would follow links)


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be read ({error}). Check the permissions.") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or folder. Check the path.") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder. Give a file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}). Check the file.") from None
