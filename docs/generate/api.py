"""The page of the API reference: one entry for every public name."""

import diagnostics
import opd

HEADER = """# API

*Generated from the public names by `python -m docs.generate`; the descriptions are the docstrings.*

Modules are private; only names exported by `opd` and `diagnostics` are stable. Import them from
these two packages: `from opd import train`. Everything else may change without notice.
"""

OPTIONS = {"Config": ["members: false", "show_attributes: false"]}
"""Name -> options of its entry."""


def page() -> str:
    """Return the page in Markdown, with the directives of mkdocstrings."""
    lines = [HEADER]
    for package in (opd, diagnostics):
        lines += [f"## {package.__name__}", ""]
        names = [name for name in package.__all__ if name != "__version__"]
        for name in names:
            lines += [f"::: {package.MODULES[name]}.{name}", ""]
    return "\n".join(lines).rstrip() + "\n"
