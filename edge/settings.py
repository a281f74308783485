"""Claude Code's ``settings.json``: puts the hook's entry in and takes it out, and leaves every other byte as it is.

The text is edited, not a parse of it written anew. What is put in can be told from what was there: a container that
is made for the entry has white space behind its opening bracket, and where the entry goes into an empty container that
was there, it has none. So taking the entry out takes what was made for it, and no more.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
from collections.abc import Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]  # what json itself reads strings with
from pathlib import Path
from typing import Any, NamedTuple

from edge.errors import InputError
from edge.files import replaced

EVENT = "UserPromptSubmit"
VERB = "hook user-prompt-submit"
_TIMEOUT = 10  # seconds that Claude Code waits
_SPACE = re.compile(r"[ \t\r\n]*")
_SCALAR = re.compile(r"[^,\]}\s]+")
_OURS = re.compile(rf"(ruvltra|edge\.cli)\S*\s+{VERB}\b")
_CORRECT = "Correct it, or choose --user or --project."


class Node(NamedTuple):
    """A value of a JSON text, and where it stands.

    Attributes:
        start: Of its first character.
        end: Behind its last.
        members: Of an object, by name; the place where the name starts, and the value.
        items: Of an array.
    """

    start: int
    end: int
    members: dict[str, tuple[int, Node]] | None = None
    items: list[Node] | None = None

    def children(self) -> list[tuple[int, int]]:
        """Where members or items start and end."""
        if self.members is not None:
            return [(start, value.end) for start, value in self.members.values()]
        return [(item.start, item.end) for item in self.items or []]


def installed(text: str, command: str) -> str:
    """The settings with the entry in them; the same text where it is there already.

    Args:
        text: Of the file; empty for a file that is not there.
        command: What Claude Code shall run.

    Raises:
        InputError: It is not JSON, or its hooks are not what Claude Code reads.
    """
    if not text:
        return _written({"hooks": {EVENT: [_entry(command)]}}, "\n", "  ") + "\n"
    root = _scan(text)
    for group in _groups(text, root):
        for handler, stated in _handlers(text, group):
            if re.search(rf"(?<!\S){re.escape(command)}(?!\S)", stated):  # and more of the user's, perhaps
                return text
            place, ours = _member(handler, "command"), _OURS.search(stated)  # the program has moved
            assert place is not None
            assert ours is not None
            return text[: place.start] + json.dumps(command + stated[ours.end() :]) + text[place.end :]
    hooks = _member(root, "hooks")
    if hooks is None:
        return _inserted(text, root, {EVENT: [_entry(command)]}, "hooks")
    event = _member(hooks, EVENT)
    if event is None:
        return _inserted(text, hooks, [_entry(command)], EVENT)
    return _inserted(text, event, _entry(command))


def uninstalled(text: str) -> str:
    """The settings without the entry, and without what was made for it; empty if the whole file was.

    Raises:
        InputError: As for :func:`installed`.
    """
    while text:
        root = _scan(text)
        path = _first_of_ours(text, root)
        if path is None:
            return text
        # From within: a container goes with what is taken out of it, if it holds nothing else and was made for it.
        *outer, container, taken = path
        while len(container.children()) == 1 and text[container.start + 1] in " \t\r\n":
            if not outer:
                return ""
            taken = container
            container = outer.pop()
        text = _without(text, container, taken)
    return text


def _first_of_ours(text: str, root: Node) -> list[Node] | None:
    """From the root to the first handler that is ours."""
    hooks = _member(root, "hooks")
    event = None if hooks is None else _member(hooks, EVENT)
    for group in _groups(text, root):
        handlers = _member(group, "hooks")
        for handler, _ in _handlers(text, group):
            assert hooks is not None
            assert event is not None
            assert handlers is not None
            if group.members is not None and len(group.members) == 1 and len(handlers.items or []) == 1:
                return [root, hooks, event, group]  # all of it is the entry
            return [root, hooks, event, group, handlers, handler]
    return None


def _groups(text: str, root: Node) -> list[Node]:
    """The entries of our event; an error where the file is not what Claude Code reads."""
    if root.members is None:
        raise InputError(f"the settings are no JSON object. {_CORRECT}")
    hooks = _member(root, "hooks")
    if hooks is None:
        return []
    if hooks.members is None:
        raise InputError(f'"hooks" is no JSON object (line {_line(text, hooks)}). {_CORRECT}')
    event = _member(hooks, EVENT)
    if event is None:
        return []
    if event.items is None:
        raise InputError(f'"hooks": {{"{EVENT}"}} is no list (line {_line(text, event)}). {_CORRECT}')
    for group in event.items:
        handlers = _member(group, "hooks")
        if group.members is None or (handlers is not None and handlers.items is None):
            raise InputError(f'an entry of "{EVENT}" has no list "hooks" (line {_line(text, group)}). {_CORRECT}')
    return event.items


def _handlers(text: str, group: Node) -> Iterator[tuple[Node, str]]:
    """Those of a group that are ours, with their commands."""
    handlers = _member(group, "hooks")
    for handler in [] if handlers is None or handlers.items is None else handlers.items:
        stated = _member(handler, "command")
        if stated is not None and text[stated.start] == '"':
            command = json.loads(text[stated.start : stated.end])
            if _OURS.search(command):
                yield handler, command


def _entry(command: str) -> dict[str, Any]:
    return {"hooks": [{"type": "command", "command": command, "timeout": _TIMEOUT}]}


def _member(node: Node, name: str) -> Node | None:
    found = (node.members or {}).get(name)
    return None if found is None else found[1]


def _line(text: str, node: Node) -> int:
    return text.count("\n", 0, node.start) + 1


def _inserted(text: str, container: Node, value: Any, name: str | None = None) -> str:
    """With a value behind a container's last, in the style of that."""
    prefix = "" if name is None else f"{json.dumps(name)}: "
    children = container.children()
    if not children:
        place = container.start + 1
        return text[:place] + prefix + _written(value, None) + text[place:]
    before = children[-2][1] if len(children) > 1 else container.start
    between = _SPACE.search(text, text.index("," if len(children) > 1 else text[container.start], before) + 1)
    assert between is not None
    gap, place = between.group(), children[-1][1]
    newline = "\r\n" if "\r\n" in gap else "\n" if "\n" in gap else None
    indent = gap.rpartition("\n")[2]
    written = _written(value, None if newline is None else newline + indent, _unit(text))
    return f"{text[:place]},{gap}{prefix}{written}{text[place:]}"


def _without(text: str, container: Node, taken: Node) -> str:
    """Without one of a container's values, its name, and the comma and white space that came with it."""
    children = container.children()
    position = next(i for i, (_, end) in enumerate(children) if end == taken.end)
    if position:
        return text[: children[position - 1][1]] + text[taken.end :]
    if len(children) > 1:
        return text[: children[0][0]] + text[children[1][0] :]
    return text[: container.start + 1] + text[taken.end :]


def _unit(text: str) -> str:
    """What one level is indented by."""
    found = re.match(r"\ufeff?\s*[{\[][ \t]*\r?\n([ \t]+)", text)
    return found.group(1) if found else "  "


def _written(value: Any, line: str | None, unit: str = "  ") -> str:
    """JSON with white space behind each opening bracket: lines that begin with ``line``, or one line if it is None."""
    if not isinstance(value, dict | list):
        return json.dumps(value)
    inner = " " if line is None else line + unit
    deeper = None if line is None else line + unit
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_written(item, deeper, unit)}" for key, item in value.items()]
        opening, closing = "{}"
    else:
        parts = [_written(item, deeper, unit) for item in value]
        opening, closing = "[]"
    comma = ", " if line is None else f",{inner}"
    return f"{opening}{inner}{comma.join(parts)}{' ' if line is None else line}{closing}"


def _scan(text: str) -> Node:
    """Where everything stands.

    Raises:
        InputError: It is not JSON, or a name occurs twice in an object.
    """
    try:
        json.loads(text.removeprefix("\ufeff"))
        return _value(text, _skip(text, 1 if text.startswith("\ufeff") else 0))
    except RecursionError:
        raise InputError(f"the settings are nested too deeply. {_CORRECT}") from None
    except ValueError as error:
        raise InputError(f"the settings are not valid JSON ({error}). {_CORRECT}") from None


def _skip(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    assert found is not None
    return found.end()


def _value(text: str, start: int) -> Node:
    """The value that starts here, of a text that is known to be JSON."""
    kind = text[start]
    if kind == '"':
        return Node(start, scanstring(text, start + 1)[1])
    if kind not in "{[":
        found = _SCALAR.match(text, start)
        assert found is not None
        return Node(start, found.end())
    members: dict[str, tuple[int, Node]] = {}
    items: list[Node] = []
    place = _skip(text, start + 1)
    while text[place] not in "}]":
        at = place
        if kind == "{":
            name, place = scanstring(text, place + 1)
            place = _skip(text, _skip(text, place) + 1)  # the colon
            child = _value(text, place)
            if name in members:
                raise ValueError(f"the name {name!r} occurs twice in one object")
            members[name] = at, child
        else:
            child = _value(text, place)
            items.append(child)
        place = _skip(text, child.end)
        if text[place] == ",":
            place = _skip(text, place + 1)
    return Node(start, place + 1, members, None) if kind == "{" else Node(start, place + 1, None, items)


class Edit(NamedTuple):
    """A change of a file that is not made yet.

    Attributes:
        path: The file, with links followed.
        before: What is in it; None if it is not there.
        after: What shall be; empty if it shall go.
    """

    path: Path
    before: str | None
    after: str

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return (self.before or "") != self.after

    def diff(self) -> str:
        """What changes, as a unified diff."""
        old, new = (self.before or "").splitlines(keepends=True), self.after.splitlines(keepends=True)
        lines = difflib.unified_diff(old, new, str(self.path), str(self.path))
        return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)

    def make(self) -> None:
        """Write it, whole or not at all.

        Raises:
            InputError: The file has been changed meanwhile, or cannot be written.
        """
        if _read(self.path) != self.before:
            raise InputError(f"{self.path}: was changed by somebody else just now. Look at it, and run this again.")
        try:
            if not self.after and self.before is not None:
                self.path.unlink()
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replaced(self.path) as partial, partial.open("wb") as stream:
                if self.before is not None:  # before there is anything to read: settings may hold keys
                    partial.chmod(stat.S_IMODE(self.path.stat().st_mode))
                stream.write(self.after.encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error}). Check the permissions.") from None


def edit(path: Path, command: str | None) -> Edit:
    """The change that puts an entry into a file, or takes it out.

    Args:
        path: Of ``settings.json``.
        command: What Claude Code shall run; None to take it out.

    Raises:
        InputError: The file cannot be read, or is not what Claude Code reads.
    """
    try:
        path = path.resolve()
    except (OSError, RuntimeError) as error:  # links that lead back to themselves
        raise InputError(f"{path}: cannot be followed ({error}). Check the link.") from None
    before = _read(path)
    if before is not None and not before.strip("\ufeff \t\r\n"):
        raise InputError(f"{path}: is empty. Delete it, or write {{}} into it.")
    try:
        after = uninstalled(before or "") if command is None else installed(before or "", command)
    except InputError as error:
        error.args = (f"{path}: {error}",)
        raise
    return Edit(path, before, after)


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}). Check the file.") from None
