"""The page of dump formats: each tool's fields beside ours, from the declared tables."""

from diagnostics.formats.dump_format import DumpFormat
from diagnostics.formats.registry import FORMATS
from diagnostics.formats.row_files import SUFFIXES
from diagnostics.records.metric_logs import LOG_COLUMNS, STEP_COLUMNS
from docs.generate.attributes import table

HEADER = """# Dumps of other tools

*Generated from `diagnostics/formats/` by `python -m docs.generate`.*

`opd diagnose FILE` reads the dumps below as it reads [records](schema.md#records), computes every
metric whose columns are there, and ends with a verdict: the alarms that one file can raise, the
rules that cannot be applied and why, and ten numbers beside what they read in a healthy run.

    opd diagnose dump.jsonl
    opd diagnose dump.jsonl --format slime --rename kd_log_probs=teacher_log_probs
    opd diagnose completions.parquet --student STUDENT --teacher TEACHER

- A format is recognised by its fields, or named with `--format`; `records` means our own columns.
  A file whose rows have different formats is refused with the two rows.
- `--rename FIELD=COLUMN` reads a field as one of the format, or as one of our columns. A dot
  enters an object: `reward.accuracy=reward`.
- Fields that a format does not have are read as columns of records, so that columns may be added;
  one that could be a mask is an error.
- Without log-probabilities of the scored student, those of the sampler are read as the student's;
  `--scores sampler` keeps them apart. For servers, `--scores student` or `teacher` says whose
  log-probabilities an answer holds.
- Dumps of text are tokenised and scored with `--student` and `--teacher`; without them they are
  refused, since they hold no token ids.
- Suffixes: {suffixes}. Files of tensors are read without running code that they may contain.

From Python: `load_records(path, dump_format="slime", rename={{...}})`.
"""

LOGS = """## Metric logs

`opd diagnose` applies the alarm rules to plain logs of metrics by step too, as far as their columns
are there: TensorBoard event files or their folder (extra `tensorboard`), an export of W&B's history
(CSV, JSON or JSON Lines), the `trainer_state.json` of transformers and TRL, and rows of our own.
The step is the first of {steps}. "train/" before a name is ignored, and these names are ours:
"""


def format_section(dump_format: DumpFormat) -> list[str]:
    """Return the section of a format: how it is written and recognised, and its fields."""
    recognised = ", or by ".join(
        ", ".join(f"`{name}`" for name in sorted(names)) for names in dump_format.signatures
    )
    rows = [
        (
            ", ".join(f"`{name}`" for name in field.name.split(", ")),
            ", ".join(f"`{name}`" for name in filter(None, field.columns.split(", "))),
            field.remark,
        )
        for field in dump_format.fields
        if field.columns or field.remark
    ]
    unused = [f"`{f.name}`" for f in dump_format.fields if not f.columns and not f.remark]
    lines = [f"## {dump_format.title}", "", f"`--format {dump_format.name}`. Written by: "]
    lines[-1] += f"{dump_format.source}. Recognised by {recognised}."
    if dump_format.notes:
        lines[-1] += f" Note: {dump_format.notes}."
    lines += ["", *table(("field", "our column", "how"), rows), ""]
    if unused:
        lines += [f"Not used: {', '.join(unused)}.", ""]
    return lines


def page() -> str:
    """Return the page in Markdown."""
    suffixes = ", ".join(f"`{suffix}`" for suffix in SUFFIXES)
    lines = [HEADER.format(suffixes=suffixes)]
    for dump_format in FORMATS:
        lines += format_section(dump_format)
    lines += [LOGS.format(steps=", ".join(f"`{name}`" for name in STEP_COLUMNS))]
    rows = [(f"`{name}`", f"`{column}`") for name, column in LOG_COLUMNS.items()]
    lines += table(("column", "ours"), rows)
    return "\n".join(lines).rstrip() + "\n"
