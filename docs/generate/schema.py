"""The page of the data schema: columns of a record, batches and their files."""

import dataclasses
import inspect
import re

from diagnostics import batch
from diagnostics.records import columns
from docs.generate.attributes import attribute_docs, table

HEADER = """# Data schema

*Generated from `diagnostics/records/columns.py` and `diagnostics/batch.py` by
`python -m docs.generate`.*

Data from another trainer enters as **records** (a file with one row a response), as **batches** in
memory, or as **batch files**. All three hold the same quantities. Shapes: B responses, T response
positions, K support ids, V vocabulary.
"""

RECORDS = """## Records

A record file is JSON Lines (`.jsonl`) or Parquet (`.parquet`, extra `data`) with one row for each
response. Only `tokens` is required. Metrics whose columns are missing are left out, and
`opd diagnose` says which and why. [Dumps of other tools](formats.md) are converted to them.

    opd diagnose dump.jsonl
"""

FILES = """## Batch files

`ScoredRollouts.save(path)` writes one safetensors file, `diagnostics.records.batch_files` reads it.
The header holds `format` (`{format}`), `type` (the class) and `settings` (a JSON object with the
plain values, such as `temperature`, and the `source` of supports). Tensors have the names of the
fields; those of `support`, `student_support` and `prefix` have names such as `support.ids`. No
pickle is written or read.
"""


def record_columns() -> list[tuple[str, str, str]]:
    """Return (column, value, aliases) from the table in the docstring of `columns`.

    Returns:
        One row per row of that table, continued cells joined.

    Raises:
        ValueError: A name of `columns.NAMES` is not in the table.
    """
    rows: list[list[str]] = []
    for line in (inspect.getdoc(columns) or "").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("| ") or cells[0] == "column":
            continue
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1] = [f"{a} {b}".strip() for a, b in zip(rows[-1], cells, strict=True)]
    words = set(re.findall(r"[\w.]+", " ".join(" ".join(row) for row in rows)))
    words |= {*columns.STATS_COLUMNS}  # the table has prefix.NAME for all of these
    if missing := sorted(set(columns.NAMES) - words):
        raise ValueError(f"columns.py: the table in the docstring does not describe {missing}")
    return [(name, value, aliases) for name, value, aliases in rows]


def _code(names: str) -> str:
    """Return a list of column names as code, with words in parentheses and remarks unchanged."""
    known = {*columns.NAMES, "finish_reason", "truncated", "status", "mask_rule"}
    return re.sub(
        r"[A-Za-z_][\w.]*(?:\.NAME)?",
        lambda match: f"`{match[0]}`" if match[0] in known or "NAME" in match[0] else match[0],
        names,
    )


def _rules() -> str:
    """Return what the docstring of `columns` says after its table."""
    return (inspect.getdoc(columns) or "").rpartition("|\n")[2].strip()


def dataclass_section(cls: type) -> list[str]:
    """Return the section of a batch type: its own fields, with shapes and defaults."""
    docs = attribute_docs(cls)
    inherited = {
        f.name
        for base in cls.__mro__[1:]
        if dataclasses.is_dataclass(base)
        for f in dataclasses.fields(base)
    }
    rows = []
    for field in dataclasses.fields(cls):
        if field.name in inherited:
            continue
        required = field.default is dataclasses.MISSING
        rows.append((f"`{field.name}`", docs[field.name], "yes" if required else "no"))
    parents = [base.__name__ for base in cls.__mro__[1:] if dataclasses.is_dataclass(base)]
    lines = [f"### {cls.__name__}", "", inspect.getdoc(cls) or "", ""]
    if parents:
        lines += [f"All fields of [`{parents[0]}`](#{parents[0].lower()}), and:", ""]
    return [*lines, *table(("field", "value", "required"), rows), ""]


def page() -> str:
    """Return the page in Markdown."""
    rows = [(_code(name), value, _code(aliases)) for name, value, aliases in record_columns()]
    conventions = (inspect.getdoc(batch) or "").partition("Conventions:\n")[2]
    lines = [HEADER, RECORDS, *table(("column", "value", "also read as"), rows), "", _rules(), ""]
    lines += ["## Batches", "", "Types of `diagnostics.batch`. Conventions:", "", conventions, ""]
    for cls in (batch.Rollouts, batch.ScoredRollouts, batch.Support, batch.DistributionStats):
        lines += dataclass_section(cls)
    lines += [FILES.format(format=batch.FORMAT)]
    return "\n".join(lines).rstrip() + "\n"
