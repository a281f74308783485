from __future__ import annotations

import json
import random
import stat
from pathlib import Path
from typing import Any

import pytest

from edge import InputError
from edge.settings import EVENT, edit, installed, uninstalled

COMMAND = "/opt/venv/bin/ruvltra hook user-prompt-submit"
GAPS = {"tight": [""], "lines": ["\n  ", "\n    ", "\n\t"], "odd": ["", " ", "\n", "\r\n  ", "\t", "\n\n  ", "  "]}


class Maker:
    """Random settings, written in random styles."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.style = self.random.choice(["tight", "lines", "odd", "dumped", "one line"])

    def text(self) -> str:
        settings = self.settings()
        if self.style == "dumped":
            text = json.dumps(
                settings, indent=self.random.choice([2, 4, "\t"]), ensure_ascii=self.random.random() < 0.5
            )
        elif self.style == "one line":
            text = json.dumps(settings)
        else:
            text = self.written(settings)
        if self.random.random() < 0.2 and "\r" not in text:
            text = text.replace("\n", "\r\n")
        return self.random.choice(["", "", "\ufeff", "\n"]) + text + self.random.choice(["", "\n", "\r\n\n"])

    def settings(self) -> dict[str, Any]:
        found = {name: self.value() for name in self.random.sample(["permissions", "env", "model", "ünï\u2028"], 2)}
        if self.random.random() < 0.7:
            events = self.random.sample(["PreToolUse", "Stop", EVENT], self.random.randrange(4))
            found["hooks"] = {event: [self.group() for _ in range(self.random.randrange(3))] for event in events}
        names = list(found)
        self.random.shuffle(names)
        return {name: found[name] for name in names[self.random.randrange(2) :]}

    def group(self) -> dict[str, Any]:
        commands = self.random.choices(["echo hi", "ruvltra route x", 'python "a b.py"'], k=self.random.randrange(3))
        matcher = {"matcher": "*"} if self.random.random() < 0.4 else {}
        return matcher | {"hooks": [{"type": "command", "command": command} for command in commands]}

    def value(self, depth: int = 0) -> Any:
        kind = self.random.randrange(8)
        if kind == 0 and depth < 3:
            return {f"{i}{self.random.choice(['a', 'ü', chr(34)])}": self.value(depth + 1) for i in range(2)}
        if kind == 1 and depth < 3:
            return [self.value(depth + 1) for _ in range(self.random.randrange(4))]
        return self.random.choice(["s", '{"hooks": [', 1, 1.5, True, None, "🚀", "\\", "", "a,b}"])

    def gap(self) -> str:
        return self.random.choice(GAPS[self.style])

    def written(self, value: Any) -> str:
        if isinstance(value, dict):
            parts = [f"{self.written(key)}:{self.gap()}{self.written(item)}" for key, item in value.items()]
        elif isinstance(value, list):
            parts = [self.written(item) for item in value]
        elif isinstance(value, float):
            return self.random.choice(["1.0", "1e400", "-0.0", "2E+5"])
        else:
            return json.dumps(value, ensure_ascii=self.random.random() < 0.5)
        opening, closing = "{}" if isinstance(value, dict) else "[]"
        inner = self.gap() + f",{self.gap()}".join(parts) if parts else ""
        return opening + inner + self.gap() + closing


def test_random_settings_survive_byte_for_byte() -> None:
    for seed in range(2000):
        text = Maker(seed).text()
        before = json.loads(text.removeprefix("\ufeff"))
        changed = installed(text, COMMAND)
        after = json.loads(changed.removeprefix("\ufeff"))
        groups = after["hooks"][EVENT]
        assert groups.pop()["hooks"][0]["command"] == COMMAND
        if not groups and EVENT not in before.get("hooks", {}):
            del after["hooks"][EVENT]
        if not after["hooks"] and "hooks" not in before:
            del after["hooks"]
        assert json.dumps(after) == json.dumps(before), text  # the order of names as well
        assert installed(changed, COMMAND) == changed
        assert uninstalled(changed) == text


def test_a_new_file_is_made_and_goes() -> None:
    text = installed("", COMMAND)
    assert text.endswith("}\n")
    assert json.loads(text)["hooks"][EVENT][0]["hooks"][0] == {"type": "command", "command": COMMAND, "timeout": 10}
    assert uninstalled(text) == ""


def test_a_program_that_has_moved_is_found() -> None:
    text = installed('{"model": "x"}', "'/old place/ruvltra' hook user-prompt-submit")
    moved = installed(text, COMMAND)
    assert moved == text.replace("'/old place/ruvltra' hook user-prompt-submit", COMMAND)
    assert uninstalled(moved) == '{"model": "x"}'
    assert installed(installed("{}", f"/old{COMMAND}"), COMMAND) == installed("{}", COMMAND)
    assert uninstalled(installed("{}", "/usr/bin/python3 -m edge.cli hook user-prompt-submit")) == "{}"


@pytest.mark.parametrize("moved", [False, True])
def test_options_that_the_user_gave_it_stay(moved: bool) -> None:
    theirs = installed("{}", COMMAND).replace("submit", "submit --agents team.toml")
    if moved:
        theirs = theirs.replace("/opt/venv", "/old")
    again = installed(theirs, COMMAND)
    assert f"{COMMAND} --agents team.toml" in again
    assert installed(again, COMMAND) == again
    assert uninstalled(again) == "{}"


def test_a_link_that_leads_to_itself(tmp_path: Path) -> None:
    (tmp_path / "settings.json").symlink_to("settings.json")
    with pytest.raises(InputError, match="cannot be"):
        edit(tmp_path / "settings.json", COMMAND)


def test_what_somebody_added_beside_it_stays() -> None:
    settings = json.loads(installed("{}", COMMAND))
    settings["hooks"][EVENT][0]["hooks"].append({"type": "command", "command": "echo hi"})
    settings["hooks"][EVENT].append({"hooks": []})
    left = json.loads(uninstalled(json.dumps(settings, indent=2)))
    assert left == {"hooks": {EVENT: [{"hooks": [{"type": "command", "command": "echo hi"}]}, {"hooks": []}]}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ('{"a": 1,}', "not valid JSON"),
        ("// comment\n{}", "not valid JSON"),
        ("[]", "no JSON object"),
        ('{"hooks": []}', '"hooks" is no JSON object'),
        ('{"hooks": {"UserPromptSubmit": {}}}', "is no list"),
        ('{"hooks":\n {"UserPromptSubmit": [1]}}', r"has no list .hooks. \(line 2\)"),
        ('{"hooks": {"UserPromptSubmit": [{"hooks": 1}]}}', "has no list"),
        ('{"hooks": {}, "hooks": {}}', "occurs twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_claude_code_would_not_read_is_left_alone(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(text, "utf-8")
    for command in (COMMAND, None):
        with pytest.raises(InputError, match=said):
            edit(path, command)
    assert path.read_text("utf-8") == text


def test_an_empty_file_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    for content in (b"", b" \n", b"\xff\xfe{}"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"is empty|UTF-8"):
            edit(path, COMMAND)


def test_a_link_and_the_mode_are_kept(tmp_path: Path) -> None:
    real = tmp_path / "dotfiles.json"
    real.write_text("{}", "utf-8")
    real.chmod(0o600)
    link = tmp_path / "settings.json"
    link.symlink_to(real)
    edit(link, COMMAND).make()
    assert link.is_symlink()
    assert COMMAND in real.read_text("utf-8")
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dotfiles.json", "settings.json"]


def test_a_change_of_somebody_else_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text("{}", "utf-8")
    change = edit(path, COMMAND)
    path.write_text('{"model": "x"}', "utf-8")
    with pytest.raises(InputError, match="changed by somebody else"):
        change.make()
    assert path.read_text("utf-8") == '{"model": "x"}'
