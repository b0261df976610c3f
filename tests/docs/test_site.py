"""The documentation as a site: it builds without a warning, all links lead somewhere, each page fits a phone."""

import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

import ncollapse
import ncollapse.kernels

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000", "--allow-file-access-from-files"]
#: Where a page asks a host by itself; `a` waits for a click.
LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src"}
#: Opens each page in a frame at each width. What is sticking out: an element wider than the window that no box scrolls.
BROWSER = """<!doctype html><title>waiting</title><body><script>
const scrolls = (element) => element.tagName !== "ARTICLE" &&
  (/auto|scroll/.test(getComputedStyle(element).overflowX) || scrolls(element.parentElement));
const found = [];
const look = async (page, width, height, judge) => {
  const frame = document.createElement("iframe");
  Object.assign(frame.style, { width: width + "px", height: height + "px" });
  frame.src = page;
  document.body.append(frame);
  await new Promise((loaded) => { frame.onload = loaded; });
  const result = await judge(frame.contentWindow);
  frame.remove();
  return result;
};
const fits = (inside) => {
  const root = inside.document.documentElement;
  const wide = [...inside.document.querySelectorAll("article *")].filter((element) =>
    element.getBoundingClientRect().right > root.clientWidth + 1 && !scrolls(element.parentElement));
  const asked = inside.performance.getEntriesByType("resource").map((one) => one.name);
  return { over: root.scrollWidth - root.clientWidth, wide: wide.map((element) => element.outerHTML.slice(0, 80)),
    asked: asked.filter((name) => !name.startsWith("file:") && !name.startsWith("data:")) };
};
const searches = async (inside) => {
  const query = inside.document.querySelector("[data-md-component=search-query]");
  query.focus();
  query.value = "coupling";
  query.dispatchEvent(new inside.KeyboardEvent("keyup"));
  for (let i = 0; i < 100; i++) {
    const results = inside.document.querySelectorAll(".md-search-result__item");
    if (results.length) return [...results].map((one) => one.querySelector("a").getAttribute("href"));
    await new Promise((later) => setTimeout(later, 50));
  }
  return [];
};
(async () => {
  for (const page of PAGES) for (const width of [400, 1400])
    found.push({ page, width, ...await look(page, width, 900, fits) });
  document.title = JSON.stringify({ found, searched: await look(PAGES[0], 1400, 900, searches) });
})();
</script></body>"""


class Page(HTMLParser):
    """The ids of a page and what it links to: pairs of tag and address."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids = {""}
        self.links: list[tuple[str, str]] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {values.get("id") or "", values.get("name") or ""}
        if link := values.get("href" if tag == "a" else LOADED.get(tag, "")):
            self.links.append((tag, link))


def public_names() -> Iterator[str]:
    """What users import: all of the package, of its public modules and of the kernels that have something public."""
    kernels = [found.name for found in pkgutil.iter_modules(ncollapse.kernels.__path__, "ncollapse.kernels.")]
    modules = {name for name in ncollapse.__all__ if name.islower()} - {"measure", "cross_entropy"}
    for module in ["ncollapse", "ncollapse.train", *(f"ncollapse.{name}" for name in sorted(modules)), *kernels]:
        for name in getattr(importlib.import_module(module), "__all__", ()):
            if module != "ncollapse" or name not in modules:
                yield f"{module}.{name}"


def test_every_public_name_has_its_place() -> None:
    shown = [
        name
        for page in (ROOT / "docs" / "api").glob("*.md")
        for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)
    ]
    assert len(set(shown)) == len(shown)
    assert set(public_names()) - set(shown) == set()


DOCUMENT = """
[a](../optimizers.md#an-anchor "title") [b][reference] [c](../../examples/README.md) [d](../../kernels/update/gpu.py)
![e](../nc0.png) [f](../../train/none.py) [g](https://host/x.md) [h](#here) <a href="../../README.md#i">i</a>
[j](../../bench/NOTES.md) `[x](../../README.md)`

```html
<a href="../../README.md">[x](../../README.md)</a>
```

[reference]: ../../CHANGELOG.md
"""


def test_links_of_a_document_become_links_of_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    markdown = pytest.importorskip("markdown")
    defaults, files = pytest.importorskip("mkdocs.config.defaults"), importlib.import_module("mkdocs.structure.files")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / ".hooks"))
    hook = importlib.import_module("links")
    links = hook.Links()
    links.site = defaults.MkDocsConfig()
    links.site.load_dict({"site_name": "", "docs_dir": str(ROOT / "docs"), "use_directory_urls": False})
    assert links.site.validate() == ([], [])
    links.site.plugins.on_startup(command="build", dirty=False)
    links.files = files.Files([])
    hook.on_files(links.files, links.site)
    links.page = SimpleNamespace(file=files.File.generated(links.site, "api/page.md", content=""))
    shown = markdown.markdown(DOCUMENT, extensions=[links, "pymdownx.superfences"])
    found = re.findall(r'(?:href|src)="([^"]*)"', shown)
    assert found == [
        "../optimizers.md#an-anchor", "../changelog.md", "../examples.md", "../repository/kernels/update/gpu.py",
        "../nc0.png", "../../train/none.py", "https://host/x.md", "#here", "../index.html#i",
        "../repository/bench/NOTES.md.txt",
    ]  # fmt: skip
    assert shown.count("[x](../../README.md)") == 2
    copied = {file.src_uri for file in links.files} - set(hook.PAGES.values())
    assert copied == {"repository/kernels/update/gpu.py", "repository/bench/NOTES.md.txt"}


def test_the_site(tmp_path: Path) -> None:
    """In one test, since the site is built once."""
    pytest.importorskip("mkdocs")
    # Not --quiet: MkDocs then counts no warnings.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    # The notebook has a test of its own.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "NCOLLAPSE_RUN_NOTEBOOK": "false"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    site = tmp_path / "site"
    # 404.html is for a server: its links begin at the root.
    pages = {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    assert not [f"{path.relative_to(site)}: {link}" for path in pages for link in broken(path, pages)]
    assert not [path for path in site.rglob("*.css") if re.search(r"url\(\W?https?:|@import", path.read_text("utf-8"))]
    if CHROMIUM:
        look_at([path.as_uri() for path in pages], tmp_path)


def broken(path: Path, pages: dict[Path, Page]) -> Iterator[str]:
    """Links to what does not exist, and what is loaded from another host."""
    for tag, link in pages[path].links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            if tag in LOADED and parts.scheme != "data":
                yield link
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if not target.is_file() or (target in pages and unquote(parts.fragment) not in pages[target].ids):
            yield link


def look_at(pages: list[str], folder: Path) -> None:
    """Open each page in Debian's chromium, from its folder, and search."""
    (folder / "frame.html").write_text(BROWSER.replace("PAGES", json.dumps(pages)), "utf-8")
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1500,1000", "--dump-dom"]
    shown = subprocess.run([*command, (folder / "frame.html").as_uri()], capture_output=True, text=True, check=True)
    title = re.search(r"<title>(.*?)</title>", shown.stdout, re.S)
    assert title
    seen = json.loads(unescape(title[1]))
    assert len(seen["found"]) == 2 * len(pages)
    assert not [one for one in seen["found"] if one["over"] > 0 or one["wide"] or one["asked"]]
    assert any("optimizers.html" in link for link in seen["searched"]), seen["searched"]
