"""The hook of mkdocs: adds README, figures and project files, and checks what the pages load.

Run mkdocs as `python -m mkdocs`, so that this package is found.
"""

import logging
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.generate.site_files import (
    FIGURES,
    SITE_PAGES,
    external_resources,
    external_style_resources,
    mend_links,
    site_path,
)

ROOT = Path(__file__).resolve().parents[2]
LOG = logging.getLogger("mkdocs.hooks.opdlab")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, pictures and tables that are outside docs/."""
    figures = [f"{FIGURES}/{path.name}" for path in sorted((ROOT / FIGURES).iterdir())]
    for repository_path in dict.fromkeys((*SITE_PAGES, *figures)):
        place = site_path(repository_path)
        if place is not None:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / repository_path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mend the links of a page."""
    sources = {place: source for source, place in SITE_PAGES.items()}
    uri = page.file.src_uri
    return mend_links(markdown, sources.get(uri, f"docs/{uri}"))


def on_post_build(config: MkDocsConfig) -> None:
    """Report what pages and styles would load from other servers; an error in a strict build."""
    for suffix, find in ((".html", external_resources), (".css", external_style_resources)):
        for path in sorted(Path(config.site_dir).rglob(f"*{suffix}")):
            for address in find(path.read_text(encoding="utf-8")):
                LOG.warning("%s loads %s from another server", path, address)
