"""What people have, as records for a memory store: Markdown notes, JSON lines, lists of texts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from edge.errors import InputError

LONGEST = 1000  # characters of a passage; some 250 tokens, which is what the default encoder reads
_MARKDOWN = (".md", ".markdown")


def is_markdown(path: Path) -> bool:
    """Whether :func:`read` takes it as notes."""
    return path.is_dir() or path.suffix.lower() in _MARKDOWN


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a file or a folder, as :meth:`edge.MemoryStore.add_many` takes them.

    A folder, or a ``.md`` file, is read as Markdown: a record is a passage below one heading, with ``source`` (the
    file), ``heading`` and ``line`` in its metadata, and an id made of file, heading and place, so that reading a
    changed note again replaces its passages. ``.jsonl`` has a JSON object a line, with the names of ``add``'s
    arguments. Any other file is a text a line.

    Raises:
        InputError: It cannot be read; the message names file and line.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _MARKDOWN and file.is_file())
        if not files:
            raise InputError(f"{path}: no Markdown files in this folder. Give a folder of .md files, or a file.")
        for file in files:
            yield from passages(_text(file), file.relative_to(path).as_posix())
    elif path.suffix.lower() in _MARKDOWN:
        yield from passages(_text(path), path.name)
    elif path.suffix.lower() in (".jsonl", ".ndjson"):
        yield from json_lines(_text(path).split("\n"), str(path))
    else:
        yield from lines(_text(path).split("\n"))


def json_lines(rows: Iterable[str], where: str) -> Iterator[dict[str, Any]]:
    """A record for each line that is not blank.

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
        if not isinstance(record, dict):
            raise InputError(f'{where}:{number}: not an object. Write {{"text": ...}}, one a line.')
        yield {key: value for key, value in record.items() if key not in ("created", "expires")}


def lines(rows: Iterable[str]) -> Iterator[dict[str, Any]]:
    """A record for each line that is not blank."""
    for row in rows:
        if row.strip():
            yield {"text": row.strip()}


def passages(text: str, source: str) -> Iterator[dict[str, Any]]:
    """The passages of a Markdown text; front matter is left out, code blocks stay whole."""
    rows = text.split("\n")
    start = 0
    if rows[0].rstrip() == "---":
        start = next((i + 1 for i, row in enumerate(rows[1:], 1) if row.rstrip() in ("---", "...")), 0)
    headings: list[str] = []
    seen: dict[str, int] = {}
    for first, block in _blocks(rows, start):
        heading = re.match(r"(#{1,6})\s+(.*?)\s*#*$", block)
        if heading:
            del headings[len(heading.group(1)) - 1 :]
            headings.append(heading.group(2))
            continue
        title = " > ".join(headings)
        seen[title] = seen.get(title, 0) + 1
        yield {
            "id": f"{source}#{title}#{seen[title]}",
            "text": f"{title}\n{block}" if title else block,
            "metadata": {"source": source, "heading": title, "line": first + 1},
        }


def _blocks(rows: list[str], start: int) -> Iterator[tuple[int, str]]:
    """Headings by themselves, and what is between them in pieces of whole paragraphs; with their first lines."""
    fence = None
    paragraphs: list[tuple[int, str]] = []
    first, paragraph = start, list[str]()

    def end() -> None:
        if any(row.strip() for row in paragraph):
            paragraphs.append((first, "\n".join(paragraph).strip("\n")))
        paragraph.clear()

    for number, row in enumerate([*rows[start:], "# "], start):
        mark = re.match(r"\s*(```+|~~~+)", row)
        if mark and (fence is None or mark.group(1).startswith(fence)):
            fence = None if fence else mark.group(1)
        if number == len(rows):
            fence = None
        if fence is None and re.match(r"#{1,6}\s", row):
            end()
            yield from _joined(paragraphs)
            paragraphs.clear()
            if number < len(rows):
                yield number, row.strip()
        elif fence is None and not mark and not row.strip():
            end()
        else:
            if not paragraph:
                first = number
            paragraph.append(row)


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


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or folder. Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}). Check the file.") from None
