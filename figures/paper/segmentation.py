"""A tag and an end that two models write in different ways (the paper's figure 5)."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from diagnostics.errors import InvalidInput
from figures import style

COLUMNS = ("place", "position", "text", "student", "teacher")
CAPTION = (
    "Log-probabilities that both models give to the tokens of one rollout, where the student "
    "opens its tag, closes it, and ends. The student spells tags in bytes; the teacher has a "
    "token for each, and gives the first byte of the spelling hardly any probability, and the "
    "bytes after it all: one token bears the whole disagreement. The end is the same case. The "
    "models are made to write so; the paper's do by their training, with -0.07 and -19.16 at < "
    "and -0.00 and -58.71 at <|im_end|>."
)
MARKS = (("teacher", "s", 5.5, style.RED), ("student", "o", 3, style.BLUE))
PLACES = {"open": "Opening the tag", "close": "Closing it, and the end"}


def draw(table: pd.DataFrame) -> Figure:
    """A pair of marks a token."""
    figure = Figure(figsize=(style.WIDTH, 2.3), layout="constrained")
    sizes = [int((table["place"] == place).sum()) for place in PLACES]
    axes = figure.subplots(1, 2, sharey=True, width_ratios=sizes)
    for place, (name, title) in zip(axes, PLACES.items(), strict=True):
        mine = table[table["place"] == name].reset_index()
        place.vlines(mine.index, mine["teacher"], mine["student"], color=style.GREY, lw=0.8)
        for who, mark, size, colour in MARKS:
            place.plot(mine.index, mine[who], mark, ms=size, color=colour, label=who)
        place.set_xticks(mine.index, mine["text"].replace("<|im_end|>", "end"), fontsize=7)
        for i, row in mine.iterrows():
            if row["teacher"] < -3:
                words = f"{row['student']:.2f}\n{row['teacher']:.1f}"
                place.text(i, row["teacher"] - 0.7, words, ha="center", va="top", fontsize=6)
        place.set_title(title)
        place.grid(axis="x", visible=False)
    axes[0].set(ylabel="log-probability", ylim=(1.25 * table["teacher"].min(), 0.8))
    axes[0].legend(loc="lower right")
    return figure


def collect(runs: list[Path]) -> pd.DataFrame:
    """The first response of the first run's first batch that ends and has both tags in bytes."""
    from diagnostics.records.run_folders import saved
    from diagnostics.records.vocabulary import read
    from figures.collect.tokens import tokens

    data, names = tokens(runs[:1], saved(runs[:1])[0]), read(runs[0])
    data["text"] = [names.name(int(i)) for i in data["id"]]
    for _, mine in data[data["ended"]].groupby("response"):
        text = mine["text"].tolist()
        spelled = text[:7] == list("<think>") and "</think>" not in text
        at = "".join(t if len(t) == 1 else "\0" for t in text).find("</think>")
        if spelled and at > 0:
            break
    else:
        raise InvalidInput(f"{runs[0]} has no response with spelled tags in its first batch")
    parts = {"open": mine.iloc[:10], "close": mine.iloc[at - 2 :]}
    rows = [
        {
            "place": place,
            "position": int(row.position),
            "text": row.text,
            "student": round(float(row.student_logp), 3),
            "teacher": round(float(row.teacher_logp), 3),
        }
        for place, some in parts.items()
        for row in some.itertuples()
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))
