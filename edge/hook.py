"""``ruvltra hook``: what Claude Code runs for each prompt, and how it comes to run it.

The hook reads Claude Code's JSON on standard input and answers with the agent that fits as additional context. It never
stands in the way: it ends with status 0 and says nothing where it abstains or anything fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge.agents import Agent, load_agents
from edge.errors import EdgeError, InputError
from edge.router import Decision, Router

LOG = "RUVLTRA_HOOK_LOG"
_LEAST = 0.5  # confidence: a suggestion that is as likely wrong as right is noise
_MOST = 16 * 1024 * 1024  # bytes of standard input
_COMMAND = re.compile(r"\s*/[^\s/]*(\s|$)")  # of Claude Code; "/etc/hosts is wrong" is none


def fill(parser: argparse.ArgumentParser) -> None:
    """Give ``ruvltra hook`` its verbs."""
    parser.description = (
        "Suggest an agent for each prompt in Claude Code: `ruvltra hook install` once, then Claude Code runs it."
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    answer = verbs.add_parser(
        "user-prompt-submit",
        help="answer Claude Code's UserPromptSubmit hook",
        description="Read Claude Code's JSON on standard input, and name the agent that fits as additional context; "
        "nothing if none does with more certainty than doubt, or anything fails. Agents are those of the project's and "
        "the user's .claude/agents, or the thirteen that are built in.",
    )
    answer.add_argument("--bundle", metavar="DIR", help="bundle folder or zip file (default: the one that is built in)")
    answer.add_argument("--agents", metavar="PATH", help="agents instead of those of .claude/agents")
    answer.add_argument("--log", type=Path, metavar="FILE", help=f"append a JSON line a prompt (default: ${LOG})")
    answer.set_defaults(run=_answer)
    for verb, what in (("install", "have Claude Code run it"), ("uninstall", "have Claude Code no longer run it")):
        change = verbs.add_parser(
            verb,
            help=what,
            description=f"Edit Claude Code's settings.json to {what}. Shows the change, and asks before it is made; "
            "all else in the file stays as it is, byte for byte.",
        )
        where = change.add_mutually_exclusive_group()
        where.add_argument(
            "--project", dest="user", action="store_false", help="this folder's .claude/settings.json (default)"
        )
        where.add_argument("--user", action="store_true", help="~/.claude/settings.json")
        change.add_argument("--yes", action="store_true", help="do not ask")
        change.set_defaults(run=_change, user=False, verb=verb)


def _answer(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    said: dict[str, Any] = {"time": time.time()}
    try:
        request = _request()
        decision, own = _decide(options, request["prompt"], request, said)
        if decision is not None:
            said |= {"agent": decision.agent, "method": decision.method, "confidence": round(decision.confidence, 4)}
            if decision.agent is not None and decision.confidence >= _LEAST:
                print(json.dumps(_context(decision, own[decision.agent])), flush=True)
    except Exception as error:  # whatever it is, the prompt goes its way
        # Of errors that are not ours the kind alone: their words may quote the prompt.
        said["error"] = str(error) if isinstance(error, EdgeError) else type(error).__name__
    said["ms"] = round(1000 * (time.perf_counter() - started), 1)
    _log(options.log, said)
    return 0


def _request() -> dict[str, Any]:
    data = b"" if sys.stdin is None else sys.stdin.buffer.read(_MOST + 1)
    if len(data) > _MOST:
        raise InputError(f"standard input has more than {_MOST} bytes. Give Claude Code's JSON.")
    try:
        request = json.loads(data)
    except (ValueError, RecursionError):
        raise InputError("standard input is no JSON. Give Claude Code's JSON.") from None
    if not isinstance(request, dict) or not isinstance(request.get("prompt"), str):
        raise InputError('standard input has no "prompt". Give the JSON of a UserPromptSubmit hook.')
    return request


def _decide(
    options: argparse.Namespace, prompt: str, request: dict[str, Any], said: dict[str, Any]
) -> tuple[Decision | None, dict[str, Agent | None]]:
    """The decision, None for what is no task; and by name the user's own agent, or None."""
    if not prompt.strip() or _COMMAND.match(prompt):
        return None, {}
    if options.agents is not None:
        agents = load_agents(options.agents)
    else:
        project = os.environ.get("CLAUDE_PROJECT_DIR") or request.get("cwd")
        folders = [Path(project) / ".claude" / "agents"] if isinstance(project, str) and project else []
        agents, broken = _agents([*folders, Path.home() / ".claude" / "agents"])
        if broken:
            said["passed over"] = broken
    router = Router.load(options.bundle, agents=agents or None)
    own: dict[str, Agent | None] = {agent.name: agent if agents else None for agent in router.agents}
    return router.route(prompt), own


def _agents(folders: list[Path]) -> tuple[list[Agent], list[str]]:
    """The agents of some folders, the first of a name; and what is wrong with the files that are passed over."""
    found: dict[str, Agent] = {}
    broken = []
    for path in _files(folders):
        try:
            for agent in load_agents(path):
                found.setdefault(agent.name, agent)
        except EdgeError as error:
            broken.append(str(error))
    return list(found.values()), broken


def _files(folders: list[Path]) -> Iterator[Path]:
    for folder in folders:
        try:
            # Files alone: a link to a device or a pipe would never end.
            yield from sorted(p for p in folder.rglob("*.md") if p.is_file() and p.name.lower() != "readme.md")
        except OSError:
            continue


def _context(decision: Decision, own: Agent | None) -> dict[str, Any]:
    """Claude Code's answer. No word of the prompt is in it, but for keywords that an agent's author wrote."""
    sure = f"{decision.confidence:.0%} sure"
    if decision.matched:
        sure += f", keywords: {', '.join(decision.matched)}"
    if own is None:
        text = f'ruvltra takes this prompt for work of the kind "{decision.agent}" ({sure}).'
    else:
        text = (
            f'ruvltra suggests the sub-agent "{decision.agent}" for this prompt ({sure}). Use it, unless the user asks '
            "for another or the conversation speaks against it."
        )
    return {"hookSpecificOutput": {"hookEventName": "UserPromptSubmit", "additionalContext": text}}


def _log(path: Path | None, said: dict[str, Any]) -> None:
    path = path or (Path(os.environ[LOG]) if os.environ.get(LOG) else None)
    if path is None:
        return
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(said) + "\n")
    except (OSError, ValueError):
        return  # nothing may come of it


def _change(options: argparse.Namespace) -> int:
    from edge.settings import edit  # which the hook itself does without

    folder = Path.home() if options.user else Path.cwd()
    change = edit(folder / ".claude" / "settings.json", _command() if options.verb == "install" else None)
    if not change.changes:
        there = "there already" if options.verb == "install" else "not there"
        print(f"{change.path}: the hook is {there}; nothing to do.")
        return 0
    print(change.diff(), end="")
    if not options.yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise InputError(f"{change.path}: is not changed, as nobody can be asked. Give --yes.")
        try:
            agreed = input("Make this change? [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            agreed = False
        if not agreed:
            print("Nothing was changed.")
            return 1
    change.make()
    print(f"{change.path}: {'removed' if not change.after else 'written'}.")
    return 0


def _command() -> str:
    """What Claude Code shall run: this very program, by its absolute path."""
    from edge.settings import VERB

    script = Path(sys.executable).with_name("ruvltra.exe" if sys.platform == "win32" else "ruvltra")
    # -P: what lies in the project that Claude Code works on is no module to import.
    words = [str(script)] if script.is_file() else [sys.executable, "-P", "-m", "edge.cli"]
    if sys.platform == "win32":
        return " ".join(f'"{word}"' if " " in word else word for word in words) + f" {VERB}"
    return f"{shlex.join(words)} {VERB}"
