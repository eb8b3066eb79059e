"""Write the generated pages: `python -m docs.generate [PAGE ...]`, such as `schema`."""

import sys
from pathlib import Path

from docs.generate import api, audits, commands, formats, schema, settings, topk

DOCS = Path(__file__).resolve().parents[1]

PAGES = {
    "api": api.page,
    "audits": audits.page,
    "commands": commands.page,
    "formats": formats.page,
    "schema": schema.page,
    "settings": settings.page,
    "topk": topk.page,
}
"""Name of a page in docs/ -> its generator."""


def main() -> None:
    """Write the pages that the command line names, or all."""
    for name in sys.argv[1:] or PAGES:
        (DOCS / f"{name}.md").write_text(PAGES[name]())


if __name__ == "__main__":
    main()
