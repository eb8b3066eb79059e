"""What the site consists of: files of the repository, links between them, resources of its pages.

Pages link to files of the repository by relative paths, so that they also work where the repository
is read as files. On the site some of these files lie elsewhere; `SITE_PAGES` says where.
"""

import posixpath
import re
from html.parser import HTMLParser

SITE_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    "figures/shown/README.md": "figures/index.md",
}
"""File of the repository outside docs/ -> page of the site."""

FIGURES = "figures/shown"
"""Folder of the repository whose pictures and tables are on the site in figures/."""

LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
"""A Markdown link to a file: its path, and perhaps an anchor."""

LOADED = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "img": ("src", "srcset"),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "track": ("src",),
    "video": ("src", "poster"),
}
"""Element -> attributes whose addresses a browser loads with the page."""

_ADDRESS = re.compile(r"(?:https?:)?//", re.IGNORECASE)
_STYLE_ADDRESS = re.compile(
    r"""(?:url\(|@import)\s*["']?\s*((?:https?:)?//[^"')\s]+)""", re.IGNORECASE
)


def site_path(repository_path: str) -> str | None:
    """Return where a file of the repository is on the site; None if it is not on the site."""
    if repository_path in SITE_PAGES:
        return SITE_PAGES[repository_path]
    folder, name = posixpath.split(repository_path)
    if folder == FIGURES and name.endswith((".png", ".md")):
        return f"figures/{name}"
    if repository_path.startswith("docs/"):
        return repository_path.removeprefix("docs/")
    return None


def link_target(link_path: str, repository_path: str) -> str:
    """Return the repository path that a relative link of a file leads to."""
    folder = posixpath.dirname(repository_path)
    return posixpath.normpath(posixpath.join(folder, link_path.rstrip("/")))


def mend_links(markdown: str, repository_path: str) -> str:
    """Replace relative links between files of the repository by links between pages of the site.

    Args:
        markdown: The page.
        repository_path: The file that the page is read from, relative to the repository.

    Returns:
        The page. Links to files that are not on the site are unchanged; mkdocs reports them.
    """
    page = site_path(repository_path) or repository_path

    def mend(match: re.Match[str]) -> str:
        place = site_path(link_target(match[1], repository_path))
        if place is None:
            return match[0]
        relative = posixpath.relpath(place, posixpath.dirname(page) or ".")
        return f"]({relative}{match[2] or ''})"

    return LINK.sub(mend, markdown)


def external_resources(html: str) -> list[str]:
    """Return the addresses on other servers that a browser would load with a page."""
    parser = _ResourceParser()
    parser.feed(html)
    parser.close()
    return parser.addresses


def external_style_resources(css: str) -> list[str]:
    """Return the addresses on other servers that a style sheet loads."""
    return _STYLE_ADDRESS.findall(css)


class _ResourceParser(HTMLParser):
    """Collects what a page loads from other servers; links that a reader clicks are no resource."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Check the attributes that load something, and styles within the element."""
        self.in_style = tag == "style"
        values = dict(attrs)
        if tag == "link" and (values.get("rel") or "") in ("canonical", "next", "prev"):
            return
        for name in LOADED.get(tag, ()):
            for address in (values.get(name) or "").split(","):
                if _ADDRESS.match(address.strip()):
                    self.addresses.append(address.strip())
        self.addresses += external_style_resources(values.get("style") or "")

    def handle_data(self, data: str) -> None:
        """Check the text of style elements."""
        if self.in_style:
            self.addresses += external_style_resources(data)
