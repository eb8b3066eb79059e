"""A rollout that loops, token by token (the paper's figure 3): does the teacher object?"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style

COLUMNS = ("step", "position", "text", "student", "teacher", "repeated")
CAPTION = (
    "Both models' probabilities of every token of one rollout: of all saved ones, the one with "
    "most tokens in repeated 8-grams (grey). It goes on with lines that nobody asked for and does "
    "not end. At most of its tokens the teacher follows; it objects at single ones, and then "
    "follows again. In the title: the mean of log q - log p over the repeated tokens and the "
    "others of this rollout. In the paper the loop is a repeated final answer."
)
LINE, LEAST = 96, 1e-5


def draw(table: pd.DataFrame) -> Figure:
    """Two curves over the tokens, and the text in lines."""
    figure = Figure(figsize=(style.WIDTH, 2.7), layout="constrained")
    axes, words = figure.subplots(2, 1, height_ratios=[3, 0.7])
    x = table["position"]
    for name, colour in (("student", style.BLUE), ("teacher", style.RED)):
        axes.plot(x, table[name], color=colour, lw=1, label=name)
    axes.fill_between(
        x, 0, 1, where=table["repeated"], color="#DDDDDD", step="mid", lw=0, label="repeated"
    )
    axes.set(xlabel="token of the response", ylabel="probability", ylim=(-0.02, 1.03))
    axes.set_xlim(0, len(table) - 1)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=3)
    signal = np.log(table["teacher"].clip(lower=LEAST)) - np.log(table["student"].clip(lower=LEAST))
    inside, outside = signal[table["repeated"]].mean(), signal[~table["repeated"]].mean()
    axes.set_title(
        f"Step {table['step'].iloc[0]}: mean gap {inside:.2f} in repeated tokens, "
        f"{outside:.2f} elsewhere"
    )
    text = "".join(table["text"].astype(str))
    lines = [text[i : i + LINE] for i in range(0, len(text), LINE)]
    words.text(0, 1, "\n".join(lines), va="top", family="monospace", fontsize=5.6, parse_math=False)
    words.set_axis_off()
    return figure


def collect(runs: list[Path]) -> pd.DataFrame:
    """Of the responses in all batches that every run saved, the one with most repeated tokens."""
    from diagnostics.records.run_folders import saved
    from diagnostics.records.vocabulary import read
    from figures.collect.tokens import tokens

    data = pd.concat([tokens(runs, step).assign(step=step) for step in saved(runs)])
    chosen = data.groupby(["step", "response"])["repeated"].sum().idxmax()
    mine = data.set_index(["step", "response"]).loc[[chosen]].reset_index()
    names = read(runs[0])
    return pd.DataFrame(
        {
            "step": mine["step"],
            "position": mine["position"].to_numpy(),
            "text": [names.name(int(i)) for i in mine["id"]],
            "student": np.exp(mine["student_logp"].to_numpy(float)).round(5),
            "teacher": np.exp(mine["teacher_logp"].to_numpy(float)).round(5),
            "repeated": mine["repeated"].to_numpy(),
        }
    )
