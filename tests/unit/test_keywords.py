from __future__ import annotations

import re
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from edge import Agent
from edge.keywords import KeywordRules, normalise


def phrases(text: str, *keywords: str) -> tuple[str, ...]:
    return KeywordRules([Agent("a", keywords=keywords)]).match(text).phrases[0]


def test_whole_tokens_only() -> None:
    assert phrases("a decision on precision", "ci") == ()
    assert phrases("the CI is red", "ci") == ("ci",)
    assert phrases("ci_runner and ci2", "ci") == ()
    assert phrases("set up ci/cd", "ci", "ci/cd") == ("ci/cd",)


def test_symbols_are_part_of_tokens() -> None:
    assert phrases("port it from C++ to C#, then .NET", "c++", "c#", ".net") == ("c++", "c#", ".net")
    assert phrases("asp.net", ".net") == ()
    assert phrases("rewrite it in C, not in cobol", "c") == ("c",)


def test_unicode_case_and_white_space() -> None:
    assert phrases("UNIT\n\ttests", "unit tests") == ("unit tests",)
    assert phrases("\uff21\uff30\uff29 docs", "api docs") == ("api docs",)  # full-width letters
    assert phrases("die STRASSE", "straße") == ("strasse",)


def test_longest_phrase_at_a_place_counts() -> None:
    rules = KeywordRules([Agent("docs", keywords=("document",)), Agent("api", keywords=("document the api",))])
    assert rules.match("document the api").phrases == ((), ("document the api",))
    assert rules.match("document the code").phrases == (("document",), ())


def test_priority_and_negatives() -> None:
    rules = KeywordRules(
        [
            Agent("slow", keywords=("slow",), priority=1, negatives=("slow motion",)),
            Agent("look", keywords=("investigate",), priority=2),
            Agent("dig", keywords=("investigate",), priority=2),
        ]
    )
    assert rules.match("investigate the slow page").first == (1, 2)
    assert rules.match("slow page").first == (0,)
    assert rules.match("slow motion is slow").phrases[0] == ()
    assert rules.match("nothing here").first == ()


def test_one_agents_negative_does_not_hide_anothers() -> None:
    rules = KeywordRules(
        [
            Agent("x", keywords=("home",), negatives=("robot",)),
            Agent("y", keywords=("dust",), negatives=("robot vacuum",)),
        ]
    )
    assert rules.match("home robot vacuum dust").phrases == ((), ())


WORDS = st.lists(st.sampled_from(["c", "ci", "c++", ".net", "unit", "tests", "a-b", "ß", "é", "x_y", "#1"]), max_size=6)


@given(st.lists(WORDS.map(" ".join).filter(bool), min_size=1, max_size=5, unique=True), st.text() | WORDS.map(" ".join))
def test_agrees_with_the_regular_expression(keywords: list[str], text: str) -> None:
    """Each found phrase is one that the defining regular expression finds, and the other way round."""
    found = set(phrases(text, *keywords))
    normal = normalise(text)
    matches = {
        k: [m.start() for m in re.finditer(rf"(?<!\w)(?={re.escape(k)}(?!\w))", normal)]
        for k in map(normalise, keywords)
    }
    expected = set()
    for keyword, starts in matches.items():
        longer = {s for other, places in matches.items() if len(other) > len(keyword) for s in places}
        if set(starts) - longer:
            expected.add(keyword)
    assert found == expected


@given(st.text())
def test_normalise_is_stable(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFKC", once)
