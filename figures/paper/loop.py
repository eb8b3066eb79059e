"""A repetitive rollout token by token, with both models' probabilities (the paper's figure 3)."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from figures import style

COLUMNS = ("step", "position", "text", "student", "teacher", "repeated")
CAPTION = (
    "Both models' probabilities of every token of one rollout: of all saved rollouts, the one "
    "with the most tokens in repeated 8-grams (grey, in the curves and in the text below them). "
    "It continues with lines that were not asked for and does not end. The teacher agrees with "
    "most of its tokens; it disagrees at single ones and then agrees again. Title: mean of log q "
    "- log p (teacher and student) over the repeated tokens and over the other tokens of this "
    "rollout. In the paper the loop is a repeated final answer."
)
MIN_PROBABILITY = 1e-5
FONT_SIZE, LINE_HEIGHT, MAX_LINES = 7, 10.5, 8
"""Of the text, in points."""
CHARACTER_WIDTH = 0.602 * FONT_SIZE
"""Of the monospaced font, in points."""
GREY = "#DDDDDD"


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the probabilities of student and teacher by token, one below the other, and the text."""
    line_length = int(72 * (width - 0.15) / CHARACTER_WIDTH)
    segments = text_segments(table, line_length)
    num_lines = 1 + max(line for line, *_ in segments)
    text_height = (num_lines * LINE_HEIGHT + 4) / 72
    figure = Figure(figsize=(width, 2.6 + text_height), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.6, text_height])
    curves, text = parts
    student, teacher = curves.subplots(2, 1, sharex=True, sharey=True)
    for axes, name, symbol, colour in (
        (student, "student", "p", style.BLUE),
        (teacher, "teacher", "q", style.RED),
    ):
        x, where = table["position"], table["repeated"]
        axes.fill_between(x, 0, 1, where=where, color=GREY, step="mid", lw=0)
        axes.plot(x, table[name], color=colour, lw=1)
        axes.set_ylabel(f"{name}'s {symbol}", color=colour)
        axes.set(ylim=(-0.03, 1.05), yticks=(0, 0.5, 1), xlim=(0, len(table) - 1))
    teacher.set_xlabel("token of the response (grey: repeated)")
    student.set_title(gap_title(table, style.is_column(width)))
    draw_text(text.subplots(), segments, line_length)
    return figure


def gap_title(table: pd.DataFrame, narrow: bool) -> str:
    """Return the step, and the mean gap of repeated and of other tokens."""
    probabilities = table[["student", "teacher"]].clip(lower=MIN_PROBABILITY)
    gap = np.log(probabilities["teacher"]) - np.log(probabilities["student"])
    inside, outside = gap[table["repeated"]].mean(), gap[~table["repeated"]].mean()
    numbers = f"{inside:.2f} if repeated, {outside:.2f} elsewhere".replace("-", "−")
    separator = "\n" if narrow else ": "
    return f"Step {table['step'].iloc[0]}, mean of log q − log p{separator}{numbers}"


def text_segments(table: pd.DataFrame, line_length: int) -> list[tuple[int, int, str, bool]]:
    """Cut the text into lines, and these where a repetition begins or ends.

    Args:
        table: Tokens of a rollout.
        line_length: Characters in a line.

    Returns:
        (line, first character in it, text, repeated) of each segment, of at most MAX_LINES lines.
    """
    characters = [
        (character, bool(repeated))
        for text, repeated in zip(table["text"].astype(str), table["repeated"], strict=True)
        for character in text
    ]
    if len(characters) > MAX_LINES * line_length:
        characters = [*characters[: MAX_LINES * line_length - 1], ("…", False)]
    segments: list[tuple[int, int, str, bool]] = []
    for line in range(-(-len(characters) // line_length)):
        start = 0
        row = characters[line * line_length : (line + 1) * line_length]
        for repeated, group in itertools.groupby(row, key=lambda x: x[1]):
            text = "".join(character for character, _ in group)
            segments.append((line, start, text, repeated))
            start += len(text)
    return segments


def draw_text(axes: Any, segments: list[tuple[int, int, str, bool]], line_length: int) -> None:
    """Write the response, its repeated part on grey; one text a character, as in a grid."""
    options: dict[str, Any] = {"family": "monospace", "fontsize": FONT_SIZE, "parse_math": False}
    options |= {"ha": "center", "va": "center_baseline"}
    for line, start, text, repeated in segments:
        if repeated:
            axes.add_patch(Rectangle((start, line), len(text), 0.95, color=GREY, lw=0))
        for i, character in enumerate(text):
            axes.text(start + i + 0.5, line + 0.5, character, **options)
    axes.set(xlim=(0, line_length), ylim=(1 + max(line for line, *_ in segments), 0))
    axes.set_axis_off()


def collect(runs: list[Path]) -> pd.DataFrame:
    """Find the response with most repeated tokens in the batches that every run saved.

    Args:
        runs: Run folders.

    Returns:
        A table with COLUMNS, one row a token of that response.
    """
    from diagnostics.records.run_groups import common_saved_steps
    from diagnostics.records.vocabulary import load_run_vocabulary
    from figures.collect.tokens import token_table

    data = pd.concat(
        [token_table(runs, step).assign(step=step) for step in common_saved_steps(runs)]
    )
    rollout_key = data.groupby(["step", "response"])["repeated"].sum().idxmax()
    rollout = data.set_index(["step", "response"]).loc[[rollout_key]].reset_index()
    vocabulary = load_run_vocabulary(runs[0])
    return pd.DataFrame(
        {
            "step": rollout["step"],
            "position": rollout["position"].to_numpy(),
            "text": [vocabulary.name(int(i)) for i in rollout["id"]],
            "student": np.exp(rollout["student_logp"].to_numpy(float)).round(5),
            "teacher": np.exp(rollout["teacher_logp"].to_numpy(float)).round(5),
            "repeated": rollout["repeated"].to_numpy(),
        }
    )
