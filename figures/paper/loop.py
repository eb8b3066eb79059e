"""A repetitive rollout token by token, with both models' probabilities (the paper's figure 3)."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style

COLUMNS = ("step", "position", "text", "student", "teacher", "repeated")
CAPTION = (
    "Both models' probabilities of every token of one rollout: of all saved rollouts, the one "
    "with the most tokens in repeated 8-grams (grey). It continues with lines that were not asked "
    "for and does not end. The teacher agrees with most of its tokens; it disagrees at single "
    "ones and then agrees again. Title: mean of log q - log p over the repeated tokens and over "
    "the other tokens of this rollout. In the paper the loop is a repeated final answer."
)
LINE_LENGTH, MIN_PROBABILITY = 96, 1e-5


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw both probabilities by token, and the text below."""
    figure = Figure(figsize=(width, 2.7), layout="constrained")
    axes, text_ax = figure.subplots(2, 1, height_ratios=[3, 0.7])
    x = table["position"]
    for name, colour in (("student", style.BLUE), ("teacher", style.RED)):
        axes.plot(x, table[name], color=colour, lw=1, label=name)
    axes.fill_between(
        x, 0, 1, where=table["repeated"], color="#DDDDDD", step="mid", lw=0, label="repeated"
    )
    axes.set(xlabel="token of the response", ylabel="probability", ylim=(-0.02, 1.03))
    axes.set_xlim(0, len(table) - 1)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=3)
    signal = np.log(table["teacher"].clip(lower=MIN_PROBABILITY)) - np.log(
        table["student"].clip(lower=MIN_PROBABILITY)
    )
    inside, outside = signal[table["repeated"]].mean(), signal[~table["repeated"]].mean()
    axes.set_title(
        f"Step {table['step'].iloc[0]}: mean gap {inside:.2f} in repeated tokens, "
        f"{outside:.2f} elsewhere"
    )
    text = "".join(table["text"].astype(str))
    lines = [text[i : i + LINE_LENGTH] for i in range(0, len(text), LINE_LENGTH)]
    text_ax.text(
        0, 1, "\n".join(lines), va="top", family="monospace", fontsize=5.6, parse_math=False
    )
    text_ax.set_axis_off()
    return figure


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
