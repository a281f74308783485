r"""Keyword rules: which agents' trigger phrases occur in a task.

A phrase matches whole tokens only, as the regular expression ``(?<!\w)phrase(?!\w)`` would on
Unicode-normalised, case-folded text: "c++", "c#" and ".net" work, and "ci" does not fire in
"decision". Where several phrases start at the same place the longest one counts, so that
"document the api" is not also taken for "document".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from edge.agents import Agent

_WORD = re.compile(r"\w")


def normalise(text: str) -> str:
    """NFKC, case-folded, white space collapsed: the form in which phrases are compared."""
    if text.isascii():
        return " ".join(text.lower().split())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


class Matches(NamedTuple):
    """What the rules say of one task, by position of the agent.

    Attributes:
        phrases: For each agent, its phrases that occur, in order of occurrence; empty if silenced.
        first: Agents that matched with the highest priority; empty if none matched.
    """

    phrases: tuple[tuple[str, ...], ...]
    first: tuple[int, ...]


class KeywordRules:
    """The compiled keywords and negatives of a list of agents. Immutable, thread-safe."""

    def __init__(self, agents: Sequence[Agent]) -> None:
        speaks: dict[str, list[int]] = {}
        silences: dict[str, list[int]] = {}
        for table, phrases_of in ((speaks, [a.keywords for a in agents]), (silences, [a.negatives for a in agents])):
            for position, phrases in enumerate(phrases_of):
                for phrase in phrases:
                    owners = table.setdefault(normalise(phrase), [])
                    if position not in owners:
                        owners.append(position)
        self._speaks, self._silences = _Phrases(speaks), _Phrases(silences, every=True)
        self._priority = [agent.priority for agent in agents]

    def match(self, text: str) -> Matches:
        """Find every phrase that occurs in ``text``."""
        normal = normalise(text)
        found: list[list[str]] = [[] for _ in self._priority]
        for phrase, owners in self._speaks.find(normal):
            for owner in owners:
                if phrase not in found[owner]:
                    found[owner].append(phrase)
        for _, owners in self._silences.find(normal):
            for owner in owners:
                found[owner].clear()
        matched = [position for position, phrases in enumerate(found) if phrases]
        top = max((self._priority[position] for position in matched), default=0)
        first = tuple(position for position in matched if self._priority[position] == top)
        return Matches(tuple(tuple(phrases) for phrases in found), first)


class _Phrases:
    """Phrases at the token boundaries of a text: the longest at each, or every one."""

    def __init__(self, owners: dict[str, list[int]], every: bool = False) -> None:
        self._owners = owners
        self._every = every
        self._by_initial: dict[str, list[str]] = {}
        for phrase in sorted(owners, key=len, reverse=True):
            self._by_initial.setdefault(phrase[:1], []).append(phrase)
        # Where a phrase may start: one of the initials, no word character before it.
        self._start = re.compile(rf"(?<!\w)[{re.escape(''.join(self._by_initial))}]") if owners else None

    def find(self, text: str) -> list[tuple[str, list[int]]]:
        if self._start is None:
            return []
        found = []
        for start in self._start.finditer(text):
            position = start.start()
            for phrase in self._by_initial[text[position]]:
                if text.startswith(phrase, position) and not _WORD.match(text, position + len(phrase)):
                    found.append((phrase, self._owners[phrase]))
                    if not self._every:
                        break
        return found
