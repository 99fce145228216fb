"""The documentation site as mkdocs builds it: links and anchors of every page, nothing that a browser would fetch from
elsewhere, and what the build refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

pytest.importorskip("mkdocs", reason="needs mkdocs (the extra `docs`)")

CONFIG = Path(__file__).resolve().parents[2] / ".github" / "mkdocs.yml"
HERE = "http://site/"


def mkdocs(config, folder):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", folder]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


class Page(HTMLParser):
    """What a page refers to, what can be referred to in it, and the texts of its titles and returned types."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loads, self.texts = set(), [], [], defaultdict(list)
        self._open = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag != "a":
            self.loads += [found[key] for key in ("src", "href", "data", "poster") if found.get(key)]
        if tag in ("h1", "title"):
            self._open = tag
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        if tag == self._open:
            self._open = ""

    def handle_data(self, data):
        if self._open:
            self.texts[self._open][-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder of the site, and its pages by address."""
    folder = tmp_path_factory.mktemp("site")
    done = mkdocs(CONFIG, folder)
    assert done.returncode == 0, done.stderr
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.html")}
    return folder, {re.sub(r"(^|/)index\.html$", r"\1", name): Page(path) for name, path in paths.items()}


def test_every_link_of_the_site_leads_somewhere(site):
    folder, pages = site
    broken, inside = [], 0
    for name, page in pages.items():
        for link in page.links:
            target = urlsplit(urljoin(HERE + name, link))
            if target.netloc != "site":
                # Others' pages are not asked for: only that the address is one.
                whole = target.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", target.netloc)
                broken += [] if whole else [(name, link)]
                continue
            inside += 1
            path, anchor = unquote(target.path.lstrip("/")), unquote(target.fragment)
            there = path in pages and (not anchor or anchor in pages[path].anchors)
            if not there and not (path and not anchor and (folder / path).is_file()):
                broken.append((name, link))
    assert not broken
    assert inside > 500


def test_nothing_is_fetched_from_elsewhere(site):
    """The site is to work without a network: no fonts, scripts, styles or pictures but its own."""
    folder, pages = site
    used = [(name, urljoin(HERE + name, load)) for name, page in pages.items() for load in page.loads]
    for path in folder.rglob("*.css"):
        name, text = path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
        found = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", text)
        used += [(name, urljoin(HERE + name, one or other)) for one, other in found]
    used = [(name, urlsplit(load)) for name, load in used if not load.startswith("data:")]
    assert [(name, load.geturl()) for name, load in used if load.netloc != "site"] == []
    files = {unquote(load.path.lstrip("/")) for _, load in used} - set(pages)
    assert [file for file in files if not (folder / file).is_file()] == []
    assert any(file.endswith(".css") for file in files)


def test_every_page_has_one_title_and_is_in_the_navigation(site):
    _, pages = site
    front = {urljoin(HERE, link) for link in pages[""].links}
    for name, page in pages.items():
        assert len(page.texts["h1"]) == 1, name
        assert page.texts["title"][0].strip(), name
        assert name == "404.html" or HERE + name in front, f"{name} is not in the navigation"


def test_what_is_returned_is_a_type_and_not_half_a_sentence(site):
    """The docstrings' reader takes all before a colon for the type, wherever in the sentence that is."""
    folder, _ = site
    text = (folder / "reference" / "index.html").read_text(encoding="utf-8")
    types = [re.sub(r"<[^>]+>", "", one) for one in re.findall(r">Returns:<.*?<code>(.*?)</code>", text, re.DOTALL)]
    assert len(types) >= 30
    assert [one for one in types if ". " in one or one.count("(") != one.count(")")] == []


@pytest.mark.parametrize(
    ("link", "refused"),
    [("#here", ""), ("#gone", "no such anchor"), ("gone.md", "not found among"), ("/here.md", "absolute link")],
)
def test_a_broken_link_or_anchor_fails_the_build(link, refused, tmp_path):
    """The settings are the site's; of its pages and plugins none is needed."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Here\n\n[there]({link})\n", encoding="utf-8")
    config = tmp_path / "mkdocs.yml"
    own = f"INHERIT: {CONFIG}\ndocs_dir: docs\nnav: [index.md]\nhooks: []\nextra_css: []\nplugins: [search]\n"
    config.write_text(own, encoding="utf-8")
    done = mkdocs(config, tmp_path / "site")
    assert (done.returncode != 0) == bool(refused), done.stderr
    assert refused in done.stderr
