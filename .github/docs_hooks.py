"""What mkdocs cannot do by itself: pages that lie elsewhere in the repository, and links between all of them.

Sources link to each other by their places in the repository, so that they can be read there too. On the site a link to
a page's source leads to the page, one to a picture brings it along, and one to any other file becomes its name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {
    "kernels.md": "kernels/README.md",
    "measurements.md": "bench/README.md",
    "contributing.md": ".github/CONTRIBUTING.md",
    "changelog.md": ".github/CHANGELOG.md",
}
"""Page of the site → its source in the repository."""
IMAGES = ("bench/results",)
"""Folders whose pictures pages show."""

_INLINE = re.compile(r"(?<!<pre>)(?<!</span>)<code>([^<]+)</code>")
"""Code within a line: that of a block follows its <pre>, or the empty <span> after that."""
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for folder in IMAGES:
        for image in sorted((ROOT / folder).glob("*.png")):
            files.append(File.generated(config, f"images/{image.name}", abs_src_path=str(image)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's text with links as the site has them."""
    source = Path(str(page.file.abs_src_path)).resolve()
    pages = {(ROOT / path).resolve(): name for name, path in ELSEWHERE.items()}

    def on_site(match: re.Match[str]) -> str:
        shown, text, target, anchor = match.groups()
        path = (source.parent / target).resolve()
        name = pages.get(path)
        if name is None and path.is_relative_to(config.docs_dir):
            name = path.relative_to(config.docs_dir).as_posix()
        if name is None and path.suffix == ".png":
            name = f"images/{path.name}"
        if name is not None:
            there = os.path.relpath(name, Path(page.file.src_uri).parent)
            return f"{shown}[{text}]({there}{_slug(anchor)})"
        if not path.exists():
            raise FileNotFoundError(f"{source}: a link leads to {target}, which is not there")
        place = path.relative_to(ROOT).as_posix()
        return f"`{place}`" if place.endswith(text.strip("`/")) else f"{text} (`{place}`)"

    return _outside_code(markdown, lambda text: _LINK.sub(on_site, text))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with words in code that stay in one line where they are short, and else break between their parts: a
    browser breaks `--name` after its hyphens."""

    def word(text: str) -> str:
        return f"<span>{text}</span>" if len(text) <= 32 else re.sub(r"(?<=[./:=|])(?=\w)", "<wbr>", text)

    return _INLINE.sub(lambda match: f"<code>{' '.join(map(word, match[1].split()))}</code>", html)


def _outside_code(markdown: str, change: Any) -> str:
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else change(part) for part in parts)


def _slug(anchor: str | None) -> str:
    """GitHub's name of a heading as the site's: no two hyphens in a row."""
    return re.sub(r"-{2,}", "-", anchor or "")
