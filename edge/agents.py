"""Agents: what a router chooses between, and the files that users describe them in.

Three sources, one result (a list of :class:`Agent`):

* TOML with ``[[agents]]`` tables;
* JSON, either a list of objects or ``{"agents": [...]}``;
* a folder of Markdown files with front matter, as ``.claude/agents/`` has (or one such file).

TOML and JSON take the fields of :class:`Agent` and no others. Markdown takes ``name`` and
``description``, our ``keywords``, ``negatives`` and ``examples``, and passes over the fields
that Claude Code and claude-flow define for their own use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from edge.errors import AgentError

# Front matter that other tools define and that says nothing about routing.
# Claude Code's sub-agent fields, then claude-flow's.
_FOREIGN_FIELDS = frozenset(
    "tools disallowedTools model permissionMode maxTurns skills mcpServers hooks memory background effort isolation "
    "color initialPrompt type version category capabilities priority complexity autonomous metadata tags author "
    "created updated triggers constraints behavior communication integration optimization specialization "
    "sparc_phase adr_references requires platform platforms extends singleton temperature when_to_use".split()
)
RESERVED = "none"  # the label of tasks that no agent should take
_LIST_FIELDS = ("keywords", "negatives", "examples")


@dataclass(frozen=True, slots=True)
class Agent:
    """One agent that a task can be routed to.

    Attributes:
        name: Unique, non-empty.
        description: What the agent delivers, in a sentence or two; becomes a prototype.
        keywords: Phrases that speak for this agent (whole tokens, case-folded).
        negatives: Phrases that silence this agent's keywords when they occur in the task.
        examples: Tasks that belong to this agent; each sharpens the prototype.
        priority: Settles keyword conflicts: the highest matching priority wins.
    """

    name: str
    description: str = ""
    keywords: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    priority: int = 0


_FIELDS = tuple(f.name for f in fields(Agent))


def load_agents(path: str | Path) -> list[Agent]:
    """Read agents from a TOML, JSON or Markdown file, or from a folder of Markdown files.

    Raises:
        AgentError: The file is missing or broken, a field is unknown or of the wrong type, a
            name is empty or occurs twice. The message names file and line.
    """
    if not str(path):
        raise AgentError("the path of the agents is empty. Give a file or folder to --agents.")
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*.md") if p.is_file() and p.name.lower() != "readme.md")
        if not files:
            raise AgentError(f"{path}: no Markdown files in this folder. Add one .md file per agent.")
        located = [_from_markdown(file, _read(file)) for file in files]
    else:
        text = _read(path)
        readers = {".toml": _from_toml, ".json": _from_json}
        if path.suffix.lower() == ".md":
            located = [_from_markdown(path, text)]
        elif path.suffix.lower() in readers:
            located = readers[path.suffix.lower()](path, text)
        else:
            raise AgentError(
                f"{path}: cannot tell the format. Use a .toml, .json or .md file, or a folder of .md files."
            )
    if not located:
        raise AgentError(f"{path}: no agents in this file. Add at least one [[agents]] table with a name.")
    return _unique(located)


def agents_from_records(records: Iterable[Mapping[str, Any]], where: str) -> list[Agent]:
    """Check plain records (as in a bundle's ``agents.json``) and turn them into agents.

    Raises:
        AgentError: As for :func:`load_agents`; ``where`` stands for file and line.
    """
    return _unique([(where, _agent(record, where, lambda _field: where)) for record in records])


def check_agents(agents: Iterable[Agent]) -> tuple[Agent, ...]:
    """Hold agents made in Python to the rules of the files.

    Raises:
        AgentError: A name is empty, reserved or occurs twice, or a field is of the wrong type.
    """
    records = [
        {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in ((name, getattr(agent, name)) for name in _FIELDS)
        }
        for agent in agents
    ]
    return tuple(agents_from_records(records, "agents"))


def _unique(located: list[tuple[str, Agent]]) -> list[Agent]:
    first: dict[str, str] = {}
    for place, agent in located:
        if agent.name in first:
            raise AgentError(f"{place}: agent {agent.name!r} was already defined at {first[agent.name]}. Rename one.")
        first[agent.name] = place
    return [agent for _, agent in located]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise AgentError(f"{path}: no such file or folder. Check the path given to --agents.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise AgentError(f"{path}: cannot be read as UTF-8 text ({error}). Check the file.") from None


def _from_toml(path: Path, text: str) -> list[tuple[str, Agent]]:
    import tomllib  # here, since most starts of the router read no TOML

    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are a plain ValueError
        line = re.search(r"line (\d+)", str(error))
        place = f"{path}:{line.group(1)}" if line else f"{path}:{text.count(chr(10)) + 1}"
        raise AgentError(f"{place}: not valid TOML ({error}). Correct the syntax.") from None
    for key in document:
        if key != "agents":
            line_number = _line(text, re.search(rf"^\s*\[*\s*{re.escape(key)}", text, re.M))
            raise AgentError(f"{path}:{line_number}: unknown key {key!r}. Use [[agents]] tables only.")
    starts = [match.start() for match in re.finditer(r"^[ \t]*\[\[[ \t]*agents[ \t]*\]\]", text, re.M)]
    records = document.get("agents", [])
    return _located(path, text, records, starts, r"^[ \t]*[\"']?{}[\"']?[ \t]*=")


def _from_json(path: Path, text: str) -> list[tuple[str, Agent]]:
    try:
        document = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise AgentError(f"{path}:{error.lineno}: not valid JSON ({error.msg}). Correct the syntax.") from None
    except RecursionError:
        raise AgentError(f"{path}:1: nested too deeply. Use a list of flat objects.") from None
    except ValueError as error:
        raise AgentError(f"{path}:1: not usable JSON ({error}). Correct it.") from None
    if isinstance(document, dict):
        for key in document:
            if key != "agents":
                line_number = _line(text, re.search(rf'"{re.escape(key)}"\s*:', text))
                raise AgentError(f'{path}:{line_number}: unknown key {key!r}. Use one list under the key "agents".')
        records = document.get("agents", [])
        opening = re.search(r'"agents"\s*:\s*\[', text)
    else:
        records = document
        opening = re.search(r"\[", text)
    starts: list[int] = []
    if isinstance(records, list) and opening:
        decoder, position = json.JSONDecoder(), opening.end()
        for _ in records:
            position = re.compile(r"[\s,]*").match(text, position).end()  # type: ignore[union-attr]
            starts.append(position)
            _, position = decoder.raw_decode(text, position)
    return _located(path, text, records, starts, r'"{}"\s*:')


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key!r} occurs twice in one object")
    return dict(pairs)


def _located(path: Path, text: str, records: Any, starts: list[int], pattern: str) -> list[tuple[str, Agent]]:
    if not isinstance(records, list):
        raise AgentError(f"{path}:1: 'agents' must be a list. Write one entry per agent.")
    located = []
    for i, record in enumerate(records):
        # An inline array of tables has no header lines; fall back to the file's first line.
        start = starts[i] if i < len(starts) else 0
        end = starts[i + 1] if i + 1 < len(starts) else len(text)
        entry = f"{path}:{text.count(chr(10), 0, start) + 1}"

        def place(field: str, start: int = start, end: int = end, entry: str = entry) -> str:
            found = re.compile(pattern.format(re.escape(field)), re.M).search(text, start, end)
            return f"{path}:{_line(text, found)}" if found else entry

        located.append((entry, _agent(record, entry, place)))
    return located


def _line(text: str, match: re.Match[str] | None) -> int:
    if match is None:
        return 1
    lead = len(match.group()) - len(match.group().lstrip())
    return text.count("\n", 0, match.start() + lead) + 1


def _agent(record: Any, entry: str, place: Any) -> Agent:
    if not isinstance(record, Mapping):
        raise AgentError(f"{entry}: an agent must be a table of fields, not {type(record).__name__}. Give it a name.")
    values: dict[str, Any] = {}
    for key, value in record.items():
        if key not in _FIELDS:
            raise AgentError(f"{place(key)}: unknown field {key!r}. Known fields: {', '.join(_FIELDS)}.")
        if key in _LIST_FIELDS:
            if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
                raise AgentError(f"{place(key)}: {key} must be a list of non-empty strings. Correct it.")
            values[key] = tuple(value)
        elif key == "priority":
            if not isinstance(value, int) or isinstance(value, bool):
                raise AgentError(f"{place(key)}: priority must be an integer. Correct it.")
            values[key] = value
        else:
            if not isinstance(value, str):
                raise AgentError(f"{place(key)}: {key} must be a string. Put it in quotes.")
            values[key] = value.strip()
    if not values.get("name"):
        raise AgentError(f"{place('name')}: the agent has no name. Give it a unique, non-empty name.")
    if values["name"] == RESERVED:
        raise AgentError(f"{place('name')}: the name {RESERVED!r} stands for 'no agent'. Rename the agent.")
    if not values["name"].isprintable():
        raise AgentError(
            f"{place('name')}: the name {values['name']!r} has characters that cannot be printed. Rename it."
        )
    if not (values.get("description") or values.get("examples")):
        raise AgentError(
            f"{entry}: agent {values['name']!r} has neither description nor examples. "
            "Add a description: tasks are compared with it."
        )
    return Agent(**values)


def _from_markdown(path: Path, text: str) -> tuple[str, Agent]:
    """Read front matter: the flat part of YAML that agent files use.

    Real agent files hold colons and tags in unquoted descriptions, which strict YAML refuses and
    Claude Code accepts; so a top-level ``key: rest of line`` is taken as it stands.
    """
    lines = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
    if not lines or lines[0].rstrip() != "---":
        raise AgentError(f"{path}:1: no front matter. Start the file with '---', name, description, '---'.")
    closing = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() in ("---", "...")), None)
    if closing is None:
        raise AgentError(f"{path}:{len(lines)}: the front matter is not closed. End it with a line '---'.")
    record: dict[str, Any] = {}
    number_of: dict[str, int] = {}
    i = 1
    while i < closing:
        line = lines[i]
        if not line.strip() or line.lstrip().startswith("#"):
            i += 1
            continue
        match = re.match(r"([A-Za-z_][\w-]*)[ \t]*:(?:[ \t]+(.*)|[ \t]*)$", line)
        if match is None:
            raise AgentError(
                f"{path}:{i + 1}: broken front matter: {line.strip()[:60]!r}. Write 'field: value', and indent the "
                "further lines of a long value."
            )
        key, inline = match.group(1), (match.group(2) or "").strip()
        if key in number_of:
            raise AgentError(f"{path}:{i + 1}: field {key!r} occurs twice in the front matter. Remove one.")
        number_of[key] = i + 1
        block_end = i + 1
        while block_end < closing and (not lines[block_end].strip() or re.match(r"[ \t]|-[ \t]|\]", lines[block_end])):
            block_end += 1
        block = lines[i + 1 : block_end]
        if key not in _FOREIGN_FIELDS:
            try:
                record[key] = _front_matter_value(key, inline, block)
            except ValueError as error:
                raise AgentError(
                    f"{path}:{i + 1}: broken front matter in {key!r}: {error}. Correct the line."
                ) from None
        i = block_end
    first = f"{path}:1"
    return first, _agent(record, first, lambda field: f"{path}:{number_of.get(field, 1)}")


def _front_matter_value(key: str, inline: str, block: list[str]) -> str | list[str]:
    stripped = [line.strip() for line in block]
    if key in _LIST_FIELDS:
        if inline.startswith("["):
            whole = " ".join([inline, *stripped])
            if not whole.rstrip().endswith("]"):
                raise ValueError("the list is not closed; end it with ']'")
            parts = re.findall(r'\s*("(?:[^"\\]|\\.)*"|\'(?:[^\']|\'\')*\'|[^,]+)', whole.rstrip()[1:-1])
            return [_scalar(part.strip()) for part in parts if part.strip()]
        if inline:
            return [_scalar(part.strip()) for part in inline.split(",") if part.strip()]
        # claude-flow writes examples as objects: the trigger is the task, the response is not ours.
        items = [re.sub(r"^-\s*trigger\s*:", "- ", line) for line in stripped if line]
        items = [line for line in items if not re.match(r"response\s*:", line)]
        if not all(line.startswith("-") for line in items):
            raise ValueError("write each item as '- item'")
        return [_scalar(line[1:].strip()) for line in items]
    if key == "name" and inline.startswith(("[", "{")):
        raise ValueError("the name must be text")
    if key == "name" and inline[:1] not in ("'", '"'):
        inline = re.split(r"\s+#", inline)[0]
    if re.fullmatch(r"[|>][+-]?\d*", inline):
        separator = "\n" if inline.startswith("|") else " "
        return separator.join(stripped).strip()
    return _scalar(" ".join([inline, *stripped]).strip())


def _scalar(value: str) -> str:
    if value[:1] == '"':
        try:
            parsed, end = json.JSONDecoder(strict=False).raw_decode(value)
        except json.JSONDecodeError:
            raise ValueError("the double quotes are not closed, or an escape is wrong") from None
        _only_comment(value[end:])
        return str(parsed)
    if value[:1] == "'":
        quoted = re.match(r"'((?:[^']|'')*)'", value)
        if quoted is None:
            raise ValueError("the single quotes are not closed")
        _only_comment(value[quoted.end() :])
        return quoted.group(1).replace("''", "'")
    return value


def _only_comment(rest: str) -> None:
    if rest.strip() and not re.match(r"\s+#", rest):
        raise ValueError("there is text after the closing quote")
