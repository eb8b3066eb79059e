"""The page of the API reference: one entry for every public name."""

import diagnostics
import opd

HEADER = """# API

*Generated from the public names by `python -m docs.generate`; the descriptions are the docstrings.*

Modules are private; only names exported by `opd` and `diagnostics` are stable. Import them from
these two packages: `from opd import train`. Everything else may change without notice. The page
[Settings](settings.md) describes the fields of `Config`.
"""

OPTIONS = {"Config": "members: false"}
"""Name -> option of its entry; the settings have a page of their own."""


def page() -> str:
    """Return the page in Markdown, with the directives of mkdocstrings; functions come first."""
    lines = [HEADER]
    for package in (opd, diagnostics):
        lines += [f"## {package.__name__}", ""]
        names = [name for name in package.__all__ if name != "__version__"]
        for name in sorted(names, key=lambda name: (name[0].isupper(), name)):
            lines += [f"::: {package.MODULES[name]}.{name}"]
            lines += [f"    options:\n      {OPTIONS[name]}"] if name in OPTIONS else []
            lines += [""]
    return "\n".join(lines).rstrip() + "\n"
