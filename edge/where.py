"""Conditions on metadata, as SQL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge.errors import InputError

_COMPARISONS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}


def condition(where: Mapping[str, Any], namespace: str | None = None) -> tuple[str, list[object]]:
    """A condition in SQL on ``documents d``, beginning with AND, and its values."""
    parts: list[str] = []
    values: list[object] = []
    if namespace is not None:
        parts.append("d.namespace = ?")
        values.append(namespace)
    for field, wanted in where.items():
        if not isinstance(field, str) or not field or "\0" in field:
            raise InputError(f"where: {field!r} is no name of metadata. Give a text.")
        path = "$" + "".join(f'."{part}"' for part in field.replace('"', "").split("."))
        inner, bound = _comparison(field, wanted)
        if wanted is None:
            parts.append("json_extract(d.metadata, ?) IS NULL")
            values.append(path)
            continue
        parts.append(
            f"json_type(d.metadata, ?) <> 'object' AND EXISTS (SELECT 1 FROM json_each(d.metadata, ?) e WHERE {inner})"
        )
        values += [path, path, *bound]
    return "".join(f" AND {part}" for part in parts), values


def _comparison(field: str, wanted: Any) -> tuple[str, list[object]]:
    if isinstance(wanted, Mapping):
        parts: list[str] = []
        values: list[object] = []
        for name, bound in wanted.items():
            if name == "contains" and isinstance(bound, str):
                parts.append("e.type = 'text' AND instr(casefold(e.value), ?)")
                values.append(bound.casefold())
            elif name in _COMPARISONS and isinstance(bound, (int, float, str)) and not isinstance(bound, bool):
                kind = "'text'" if isinstance(bound, str) else "'integer', 'real'"
                parts.append(f"e.type IN ({kind}) AND e.value {_COMPARISONS[name]} ?")
                values.append(bound)
            else:
                raise InputError(
                    f"where: {field!r} cannot be compared by {name!r} with {bound!r}. Use contains with a text, or gt, "
                    "gte, lt, lte with a number or a text."
                )
        if not parts:
            raise InputError(f"where: nothing is said of {field!r}. Give a value, a list, or a comparison.")
        return " AND ".join(parts), values
    if isinstance(wanted, (list, tuple, set, frozenset)):
        if not wanted:
            return "false", []
        alternatives = [_comparison(field, value) for value in wanted]
        return "(" + " OR ".join(f"({inner})" for inner, _ in alternatives) + ")", [
            v for _, vs in alternatives for v in vs
        ]
    if isinstance(wanted, bool):
        return f"e.type = '{str(wanted).lower()}'", []
    if wanted is None:
        return "e.type = 'null'", []
    if isinstance(wanted, (int, float)):
        return "e.type IN ('integer', 'real') AND e.value = ?", [wanted]
    if isinstance(wanted, str):
        return "e.type = 'text' AND e.value = ?", [wanted]
    raise InputError(f"where: {field!r} cannot be compared with {wanted!r}. Give a text, number, truth value or list.")
