"""Builds the documentation site like `make docs`, and checks its links."""

from html import unescape
from html.parser import HTMLParser
import os
from pathlib import Path
import re
import subprocess
import sys
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTED = (
    "grit_jax.inference.gritlm.GritLM.encode",
    "grit_jax.rag.index.build_index",
    "grit_jax.rag.index.DocumentIndex.search",
    "grit_jax.rag.pipeline.RagPipeline.ask",
    "grit_jax.text.templates.embedding_prefix",
    "grit_jax.models.decoder.Decoder.__call__",
    "grit_jax.sharding.make_mesh",
    "grit_jax.conversion.open_model",
    "grit_jax.conversion.export.write_hugging_face",
    "grit_jax.run.run",
)


class Page(HTMLParser):
    """The links, loaded files and anchors of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.ids = [], [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids.add(attributes.get("id") or "")
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        elif tag in ("script", "img", "link"):
            self.loaded.append(attributes.get("src") or attributes.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    finished = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "WARNING" not in finished.stderr, finished.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def is_external(link):
    return re.match(r"[a-z]+:", link) is not None


def test_every_page_is_there(site):
    sources = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    assert len(sources) > 10
    for source in sources:
        assert (site / source.with_suffix(".html")).is_file()
    assert (site / "search" / "search_index.json").stat().st_size > 10_000
    assert not list(site.rglob("*.py"))


def test_links_resolve(pages):
    for path, page in pages.items():
        for link in page.links:
            if is_external(link):
                continue
            file, anchor = urldefrag(link)
            target = (path.parent / unquote(file)).resolve() if file else path
            assert target.is_file(), f"{path.name}: {link}"
            if anchor and target in pages:
                assert unquote(anchor) in pages[target].ids, f"{path.name}: {link}"


def test_nothing_external_is_loaded(pages):
    for path, page in pages.items():
        for file in page.loaded:
            assert not is_external(file), f"{path.name} loads {file}"
            assert not file or (path.parent / urldefrag(file).url).resolve().is_file()


def test_the_reference_documents_the_public_interface(site, pages):
    ids = {
        name for path, page in pages.items() if path.parent.name == "reference" for name in page.ids
    }
    assert set(DOCUMENTED) <= ids
    # Signatures show shapes.
    text = re.sub(r"<[^>]+>", "", (site / "reference" / "models.html").read_text())
    assert 'Float[Array, "B S D"]' in unescape(text)


def test_links_of_files_outside_the_site_resolve(site, pages):
    for name in ("README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text()):
            if is_external(link) or link.startswith("#"):
                continue
            file, anchor = urldefrag(link)
            assert (ROOT / file).exists(), f"{name}: {link}"
            if anchor:
                page = site / Path(file).relative_to("docs").with_suffix(".html")
                assert anchor in pages[page].ids, f"{name}: {link}"
