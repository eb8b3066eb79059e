"""A tag and an EOS that the two models write in different tokens (the paper's figure 5)."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from diagnostics.errors import InvalidInput
from figures import style

COLUMNS = ("place", "position", "text", "student", "teacher")
CAPTION = (
    "Log-probabilities that both models give to the tokens of one rollout where the student opens "
    "its think tag (left), and where it closes the tag and ends (right). The student spells tags "
    "in bytes. The teacher has a single token for each tag: it gives the first byte of the "
    "spelled tag almost no probability, and the bytes after it nearly probability 1, so one token "
    "carries the whole disagreement. The EOS token is the same case. These models are built to "
    "differ so; the paper's do by their training, with log-probabilities of student and teacher "
    "of -0.07 and -19.16 at < and -0.00 and -58.71 at <|im_end|>."
)
MARKS = (("teacher", "s", 5.5, style.RED), ("student", "o", 3, style.BLUE))
PLACES = {"open": "Opening tag", "close": "Closing tag and EOS"}


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw both models' log-probabilities of every token."""
    figure = Figure(figsize=(width, 2.3), layout="constrained")
    sizes = [int((table["place"] == ax).sum()) for ax in PLACES]
    axes = figure.subplots(1, 2, sharey=True, width_ratios=sizes)
    for ax, (name, title) in zip(axes, PLACES.items(), strict=True):
        segment = table[table["place"] == name].reset_index()
        ax.vlines(segment.index, segment["teacher"], segment["student"], color=style.GREY, lw=0.8)
        for model, mark, size, colour in MARKS:
            ax.plot(segment.index, segment[model], mark, ms=size, color=colour, label=model)
        ax.set_xticks(segment.index, segment["text"].replace("<|im_end|>", "EOS"), fontsize=7)
        for i, row in segment.iterrows():
            if row["teacher"] < -3:
                label = f"{row['student']:.2f}\n{row['teacher']:.1f}"
                ax.text(i, row["teacher"] - 0.7, label, ha="center", va="top", fontsize=6)
        ax.set_title(title)
        ax.grid(axis="x", visible=False)
    axes[0].set(ylabel="log-probability", ylim=(1.25 * table["teacher"].min(), 0.8))
    axes[0].legend(loc="lower right")
    return figure


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
