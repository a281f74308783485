"""Conditions on metadata, as SQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge.encoder import clean
from edge.errors import InputError

Where = Mapping[str, Any] | Sequence[Mapping[str, Any]]

_COMPARISONS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_LARGEST = 2**63 - 1  # SQLite's integers; what is beyond is compared as a real number


def condition(where: Where, namespace: str | None = None) -> tuple[str, list[object]]:
    """A condition in SQL on ``documents d``, beginning with AND, and its values.

    Raises:
        InputError: It is not what :meth:`edge.MemoryStore.search` says.
    """
    parts: list[str] = []
    values: list[object] = []
    if namespace is not None:
        parts.append("d.namespace = ?")
        values.append(namespace)
    several = [where] if isinstance(where, Mapping) else where
    if isinstance(several, str) or not isinstance(several, Sequence):
        raise InputError(f"where is {where!r}. Give a mapping of names to values, or a list of such mappings.")
    for one in several:
        if not isinstance(one, Mapping):
            raise InputError(f"where has {one!r} in it. Give a mapping of names to values, or a list of such mappings.")
        for field, wanted in one.items():
            part, bound = _condition(field, wanted)
            parts.append(part)
            values += bound
    return "".join(f" AND {part}" for part in parts), values


def _condition(field: object, wanted: Any) -> tuple[str, list[object]]:
    if not isinstance(field, str) or not field:
        raise InputError(f"where: {field!r} is no name of metadata. Give a text.")
    if any(character in '"\\' or not character.isprintable() for character in field):
        raise InputError(
            f"where: {field!r} has characters that a condition cannot name. Use plainer names of metadata."
        )
    path = "$" + "".join(f'."{part}"' for part in clean(field).split("."))
    missing = "json_extract(d.metadata, ?) IS NULL"
    if wanted is None:
        return missing, [path]
    several = isinstance(wanted, (list, tuple, set, frozenset))
    inner, bound = _any_of(field, [value for value in wanted if value is not None]) if several else _one(field, wanted)
    part = f"(json_type(d.metadata, ?) <> 'object' AND EXISTS (SELECT 1 FROM json_each(d.metadata, ?) e WHERE {inner}))"
    found: list[object] = [path, path, *bound]
    return (f"({part} OR {missing})", [*found, path]) if several and None in wanted else (part, found)


def _any_of(field: str, wanted: Sequence[Any]) -> tuple[str, list[object]]:
    """Plain values in one list each of their kinds, so that there may be thousands."""
    texts = [clean(value) for value in wanted if isinstance(value, str)]
    numbers = [_number(v) for v in wanted if isinstance(v, (int, float)) and not isinstance(v, bool)]
    rest = [value for value in wanted if isinstance(value, bool) or not isinstance(value, (int, float, str))]
    parts = [_one(field, value) for value in rest]
    for kinds, values in (("'text'", texts), ("'integer', 'real'", numbers)):
        if values:
            parts.append((f"e.type IN ({kinds}) AND e.value IN ({','.join('?' * len(values))})", [*values]))
    if not parts:
        return "false", []
    return "(" + " OR ".join(f"({inner})" for inner, _ in parts) + ")", [v for _, bound in parts for v in bound]


def _one(field: str, wanted: Any) -> tuple[str, list[object]]:
    if isinstance(wanted, Mapping):
        parts: list[str] = []
        values: list[object] = []
        for name, bound in wanted.items():
            if name == "contains" and isinstance(bound, str):
                parts.append("e.type = 'text' AND instr(casefold(e.value), ?)")
                values.append(clean(bound).casefold())
            elif name in _COMPARISONS and isinstance(bound, (int, float, str)) and not isinstance(bound, bool):
                kind = "'text'" if isinstance(bound, str) else "'integer', 'real'"
                parts.append(f"e.type IN ({kind}) AND e.value {_COMPARISONS[name]} ?")
                values.append(clean(bound) if isinstance(bound, str) else _number(bound))
            else:
                raise InputError(
                    f"where: {field!r} cannot be compared by {name!r} with {bound!r}. Use contains with a text, or gt, "
                    "gte, lt, lte with a number or a text."
                )
        if not parts:
            raise InputError(f"where: nothing is said of {field!r}. Give a value, a list, or a comparison.")
        return " AND ".join(parts), values
    if isinstance(wanted, bool):
        return f"e.type = '{str(wanted).lower()}'", []
    if isinstance(wanted, (int, float)):
        return "e.type IN ('integer', 'real') AND e.value = ?", [_number(wanted)]
    if isinstance(wanted, str):
        return "e.type = 'text' AND e.value = ?", [clean(wanted)]
    raise InputError(f"where: {field!r} cannot be compared with {wanted!r}. Give a text, number, truth value or list.")


def _number(value: float) -> float:
    if value != value:
        raise InputError("where: NaN equals nothing. Give a number.")
    if isinstance(value, int) and abs(value) > _LARGEST:
        try:
            return float(value)
        except OverflowError:
            raise InputError(f"where: {value} is beyond all numbers of metadata. Give a smaller one.") from None
    return value
