"""A tag and an EOS that the two models write in different tokens (the paper's figure 5)."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from diagnostics.errors import InvalidInput
from figures import style

COLUMNS = ("place", "position", "text", "student", "teacher")
CAPTION = (
    "Log-probabilities that both models give to the tokens of one rollout: where the student "
    "opens its think tag, and where it closes the tag and ends; excluded, with numbers: tokens to "
    "which the teacher gives less than -3. The student spells tags in bytes. The teacher has a "
    "single token for each tag: it gives the first byte of the spelled tag almost no probability, "
    "and the bytes after it nearly probability 1, so one token carries the whole disagreement. "
    "The EOS token is the same case. These models are built to differ so; the paper's do by their "
    "training, with log-probabilities of student and teacher of -0.07 and -19.16 at < and -0.00 "
    "and -58.71 at <|im_end|>."
)
MARKS = (("teacher", "s", 5.5, style.RED), ("student", "o", 3, style.BLUE))
EXCLUDED = -3
"""Log-probability below which the teacher is said to exclude a token."""
PLACES = {"open": "Opening tag", "close": "Closing tag and EOS"}


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw both models' log-probabilities of every token."""
    sizes = [int((table["place"] == place).sum()) for place in PLACES]
    if style.is_column(width):
        figure = Figure(figsize=(width, 3.7), layout="constrained")
        axes = figure.subplots(2, 1, sharey=True)
    else:
        figure = Figure(figsize=(width, 2.3), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True, width_ratios=sizes)
    for ax, (place, title) in zip(axes, PLACES.items(), strict=True):
        segment = table[table["place"] == place].reset_index()
        draw_tokens(ax, segment)
        count = int((segment["teacher"] < EXCLUDED).sum())
        ax.set_title(f"{title}: {count} of {len(segment)} excluded")
    axes[0].set_ylim(1.3 * table["teacher"].min(), 0.8)
    for ax in axes if style.is_column(width) else axes[:1]:
        ax.set_ylabel("log-probability, nats")
    axes[0].legend(loc="lower right")
    return figure


def draw_tokens(axes: Any, segment: pd.DataFrame) -> None:
    """Draw the tokens of one place; those that the teacher excludes have their numbers."""
    axes.vlines(segment.index, segment["teacher"], segment["student"], color=style.GREY, lw=0.8)
    for model, mark, size, colour in MARKS:
        axes.plot(segment.index, segment[model], mark, ms=size, color=colour, label=model)
    names = segment["text"].replace("<|im_end|>", "EOS")
    axes.set_xticks(segment.index, names, fontsize=style.MIN_FONT_SIZE, parse_math=False)
    for i, row in enumerate(segment.itertuples()):
        if row.teacher < EXCLUDED:
            last = i + 2 > len(segment)
            options: dict[str, Any] = {"va": "center", "ha": "right" if last else "left"}
            x = i + (-0.3 if last else 0.3)
            student = round(row.student, 2) + 0.0  # no -0.00
            text = f"teacher {row.teacher:.1f}\nstudent {student:.2f}".replace("-", "−")
            axes.text(x, row.teacher, text, fontsize=style.MIN_FONT_SIZE, **options)
    axes.set_xlim(-0.5, len(segment) - 0.5)
    axes.set_xlabel("token of the response")
    axes.grid(axis="x", visible=False)


def collect(runs: list[Path]) -> pd.DataFrame:
    """Find the first response of the first batch that ends and spells both tags in bytes.

    Args:
        runs: Run folders; only the first is read.

    Returns:
        A table with COLUMNS for the beginning and the end of that response.

    Raises:
        InvalidInput: No response of the batch spells both tags.
    """
    from diagnostics.records.run_groups import common_saved_steps
    from diagnostics.records.vocabulary import load_run_vocabulary
    from figures.collect.tokens import token_table

    data, vocabulary = (
        token_table(runs[:1], common_saved_steps(runs[:1])[0]),
        load_run_vocabulary(runs[0]),
    )
    data["text"] = [vocabulary.name(int(i)) for i in data["id"]]
    for _, response in data[data["ended"]].groupby("response"):
        text = response["text"].tolist()
        has_spelled_tag = text[:7] == list("<think>") and "</think>" not in text
        tag_start = "".join(t if len(t) == 1 else "\0" for t in text).find("</think>")
        if has_spelled_tag and tag_start > 0:
            break
    else:
        raise InvalidInput(
            f"{runs[0]} has no response that spells both tags in its first batch; give another run"
        )
    parts = {"open": response.iloc[:10], "close": response.iloc[tag_start - 2 :]}
    rows = [
        {
            "place": place,
            "position": int(row.position),
            "text": row.text,
            "student": round(float(row.student_logp), 3),
            "teacher": round(float(row.teacher_logp), 3),
        }
        for place, part_tokens in parts.items()
        for row in part_tokens.itertuples()
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))
