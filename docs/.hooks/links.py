"""The site has the repository's own README, CONTRIBUTING, … as pages, and the files that pages link to.

A document's links lead from its place in the repository, so that they work there, too. Here they become links of the
site, in the parsed document: code stays as it is.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
#: A document outside docs/ -> its page in the site.
PAGES = {
    "README.md": "index.md", "examples/README.md": "examples.md", "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md",
}  # fmt: skip
_DOCUMENTS = {page: document for document, page in PAGES.items()}
_ATTRIBUTES = {"a": "href", "img": "src"}
_TAG = re.compile(r"""(<(?:a|img)\s[^<>]*?\b(?:href|src)=["'])([^"']*)""")


class Links(Extension):
    """Turns links of `page` into links of the site. MkDocs makes one page after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.page: Page
        self.files: Files
        self.site: MkDocsConfig

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        # After links are parsed, before MkDocs checks and resolves them.
        md.treeprocessors.register(_Replace(md, self), "repository-links", 1)

    def in_tree(self, link: str) -> str:
        """A link of the page's document as MkDocs expects it: between sources of pages."""
        return self._mapped(link, self._between_sources)

    def in_html(self, link: str) -> str:
        """A link of the page's document as the built page has it; MkDocs leaves HTML in documents as it is."""

        def between_pages(target: str) -> str:
            file = self.files.get_file_from_path(target)
            return self._between_sources(target) if file is None else file.url_relative_to(self.page.file)

        return self._mapped(link, between_pages)

    def _between_sources(self, target: str) -> str:
        return posixpath.relpath(target, posixpath.dirname(self.page.file.src_uri))

    def _mapped(self, link: str, form: Callable[[str], str]) -> str:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc or not parts.path or parts.path.startswith("/"):
            return link
        source = self.page.file.src_uri
        folder = posixpath.dirname(_DOCUMENTS.get(source, f"docs/{source}"))
        name = posixpath.normpath(posixpath.join(folder, unquote(parts.path)))
        target = self._in_site(name)
        return link if target is None else parts._replace(path=form(target)).geturl()

    def _in_site(self, name: str) -> str | None:
        """Where in the site a file of the repository is; one beside docs/ is copied there. None: it does not exist."""
        if name in PAGES:
            return PAGES[name]
        if name.startswith("docs/"):
            return name.removeprefix("docs/")
        if not (ROOT / name).is_file():
            return None
        copy = f"repository/{name}" + ".txt" * name.endswith(".md")  # a document without a page is shown as text
        if self.files.get_file_from_path(copy) is None:
            self.files.append(File.generated(self.site, copy, abs_src_path=str(ROOT / name)))
        return copy


class _Replace(Treeprocessor):
    def __init__(self, md: Markdown, links: Links) -> None:
        super().__init__(md)
        self.links = links

    def run(self, root: Element) -> None:
        for element in root.iter():
            attribute = _ATTRIBUTES.get(str(element.tag), "")
            if link := element.get(attribute):
                element.set(attribute, self.links.in_tree(link))
        stash = self.md.htmlStash
        stash.rawHtmlBlocks = [
            _in_html(block, self.links) if isinstance(block, str) else block for block in stash.rawHtmlBlocks
        ]


def _in_html(text: str, links: Links) -> str:
    return _TAG.sub(lambda found: found[1] + links.in_html(found[2]), text)


_links = Links()


def on_config(config: MkDocsConfig) -> None:
    config.markdown_extensions.append(_links)  # Markdown takes the object, too


def on_files(files: Files, config: MkDocsConfig) -> None:
    for document, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / document)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    _links.page, _links.site, _links.files = page, config, files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    # Of a notebook only the HTML passes here.
    return _in_html(html, _links) if page.file.src_uri.endswith(".ipynb") else html
