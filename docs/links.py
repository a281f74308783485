"""Of mkdocs: pages link to files beside docs/ as a forge shows them, which have no page in the site.

Such files get one (``files/...``), as they are; the links lead there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\((\.\./[^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to outside docs/; of a folder its card, or what it holds."""
    for page in list(files.documentation_pages()):
        for target in LINK.findall(Path(page.abs_src_path or "").read_text("utf-8")):
            path = ROOT / "docs" / target
            if path.is_file() and path.suffix == ".md":
                # What such a page links to in turn is not in the site.
                content = re.sub(r"!?\[([^\]]*)\]\((?!https?://|#)[^)]*\)", r"\1", path.read_text("utf-8"))
            elif path.is_file():
                content = f"# {path.name}\n\n```text\n{path.read_text('utf-8')}```\n"
            else:
                names = "".join(f"* {item.name}\n" for item in sorted(path.iterdir()))
                content = f"# {path.relative_to(ROOT)}\n\n{names}"
            name = _name(target)
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links that leave docs/ to these pages."""
    here = posixpath.dirname(page.file.src_uri)
    return LINK.sub(lambda found: f"]({posixpath.relpath(_name(found.group(1)), here or '.')}", markdown)


def _name(target: str) -> str:
    path = target.removeprefix("../").rstrip("/")
    return f"files/{path if path.endswith('.md') else path + '.md'}"
