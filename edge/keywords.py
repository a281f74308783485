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
_START = re.compile(r"\w+|(?<!\w)\W")  # where a phrase can begin


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
        self._nothing: list[tuple[str, ...]] = [()] * len(agents)

    def match(self, text: str) -> Matches:
        """Find every phrase that occurs in ``text``."""
        normal = normalise(text)
        found: dict[int, list[str]] = {}
        for phrase, owners in self._speaks.find(normal):
            for owner in owners:
                heard = found.setdefault(owner, [])
                if phrase not in heard:
                    heard.append(phrase)
        if found:
            for _, owners in self._silences.find(normal):
                for owner in owners:
                    found.pop(owner, None)
        phrases = list(self._nothing)
        for position, heard in found.items():
            phrases[position] = tuple(heard)
        top = max((self._priority[position] for position in found), default=0)
        first = tuple(position for position in sorted(found) if self._priority[position] == top)
        return Matches(tuple(phrases), first)


class _Phrases:
    """Phrases at the token boundaries of a text: the longest at each, or every one."""

    def __init__(self, owners: dict[str, list[int]], every: bool = False) -> None:
        self._owners = owners
        self._every = every
        # By what a phrase starts with: its first word, whole, or one character that is part of no word.
        self._by_start: dict[str, list[str]] = {}
        for phrase in sorted(owners, key=len, reverse=True):
            self._by_start.setdefault(_START.findall(phrase)[0], []).append(phrase)

    def find(self, text: str) -> list[tuple[str, list[int]]]:
        if not self._owners:
            return []
        found: list[tuple[str, list[int]]] = []
        position = 0
        for token in text.split(" "):
            if token.isalnum():  # mostly, and then no regular expression is needed
                if token in self._by_start:
                    self._add(found, text, position, token)
            else:
                for start in _START.finditer(text, position, position + len(token)):
                    if start.group() in self._by_start:
                        self._add(found, text, start.start(), start.group())
            position += len(token) + 1
        return found

    def _add(self, found: list[tuple[str, list[int]]], text: str, position: int, start: str) -> None:
        for phrase in self._by_start[start]:
            if text.startswith(phrase, position) and not _WORD.match(text, position + len(phrase)):
                found.append((phrase, self._owners[phrase]))
                if not self._every:
                    return
