"""The site has the repository's own README, CONTRIBUTING and CHANGELOG as pages, and the files that pages link to.

Links of a document lead from its place in the repository, so that they work there, too.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
#: A file of the repository -> the page of the site that holds it.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=_as_in_docs((ROOT / source).read_text("utf-8"), ".")))
    for name in sorted(_repository_files()):
        files.append(File.generated(config, f"repository/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return markdown if page.file.src_uri in PAGES.values() else _as_in_docs(markdown, f"docs/{page.file.src_uri}/..")


def _as_in_docs(text: str, folder: str) -> str:
    """A document with its links from a folder of the repository as links from the same place in the site."""
    here = posixpath.relpath(posixpath.normpath(folder), "docs") if folder != "." else "."

    def replaced(found: re.Match[str]) -> str:
        return f"{found[1]}{posixpath.relpath(_page_of(posixpath.normpath(f'{folder}/{found[2]}')), here)}{found[3]}"

    return _LINK.sub(replaced, text)


def _page_of(name: str) -> str:
    """Where in the site a file of the repository is."""
    if name in PAGES:
        return PAGES[name]
    return name.removeprefix("docs/") if name.startswith("docs/") else f"repository/{name}"


def _repository_files() -> set[str]:
    """Files beside the documentation that a page links to."""
    found = set()
    for path in [*map(ROOT.joinpath, PAGES), *(ROOT / "docs").rglob("*.md")]:
        folder = path.parent.relative_to(ROOT).as_posix()
        found |= {posixpath.normpath(f"{folder}/{link[2]}") for link in _LINK.finditer(path.read_text("utf-8"))}
    return {name for name in found if name not in PAGES and not name.startswith("docs/") and (ROOT / name).is_file()}
