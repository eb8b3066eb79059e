"""What the page of audits says beside its tables, written by hand."""

INTRODUCTIONS: dict[str, tuple[str, str]] = {
    "ours": ("opdlab", ""),
    "trl": ("TRL", ""),
    "verl": ("verl", ""),
}
"""Library -> title of its section, text above its table."""

NOTES: dict[str, str] = {}
"""TARGET of `opd audit` -> note."""

EXAMPLES: dict[str, dict[str, str]] = {}
"""Library -> heading -> example by hand."""
