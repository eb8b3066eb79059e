"""Tokenizer panel: tokens that the teacher excludes, and each model's EOS probability."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from diagnostics.errors import InvalidInput, MissingFile
from figures import style
from figures.labels import method_label

if TYPE_CHECKING:
    from torch import Tensor

    from diagnostics.batch import ScoredRollouts
    from diagnostics.records.vocabulary import Vocabulary

COLUMNS = ("method", "runs", "step", "kind", "label", "first", "last", "value", "low", "high")
CAPTION = (
    "Where the two models write the same text in other tokens. Excluded tokens: ids of which the "
    "student is sure (p > 0.9) and which the teacher excludes (q < 1e-4), at the first saved "
    "step, by their share of the total signal |r| = |log p - log q| (the largest, with 95 % "
    "intervals over prompts, all methods on one scale; <|…|>* is a special token). EOS "
    "probability at the first and the last saved step: mean over the student's prefixes by "
    "position (bins double in width), of each model for its own EOS token, and of the teacher for "
    "the student's EOS token; whiskers are 95 % intervals over prompts; values below 1e-7 are "
    "drawn there. Exact where the saved top-K contains the EOS token, otherwise an unbiased "
    "estimate from the sampled tokens. Where the teacher would end with its own EOS but not with "
    "the student's, the two EOS tokens differ; where with neither, it would continue. A mask "
    "leaves tags and EOS out of the signal. Batches saved before December 2026 have supervised "
    "tokens only: there, the prefix of a masked EOS is missing."
)
HAZARDS = {
    "student": ("student, own EOS", style.BLUE, "-", "o"),
    "teacher": ("teacher, own EOS", style.RED, "--", "s"),
    "foreign": ("teacher, student's EOS", style.GREEN, ":", "^"),
}
NUM_IDS, MIN_TOKENS = 8, 100
NUM_SHOWN, MAX_METHODS = 4, 3
"""Ids in a panel and methods in the figure."""
SMALLEST = 1e-7
"""Smallest EOS probability that is drawn."""


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw excluded ids, and EOS probabilities at the first and the last step, by method.

    Across a page the panels of a method are a row; in one column the ids are above the rest.
    """
    methods = list(dict.fromkeys(table["method"]))[:MAX_METHODS]
    height = 0.6 + (2.3 if style.is_column(width) else 1.75) * len(methods)
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = make_grid(figure, len(methods), width)
    excluded = table[(table["kind"] == "excluded") & table["method"].isin(methods)]
    highest = float(np.nanmax([*excluded["high"], 0.01]))
    for method, (id_axes, *eos_axes) in zip(methods, panels, strict=True):
        draw_excluded(id_axes, excluded[excluded["method"] == method], highest)
        title = f"{method_label(method)}: excluded tokens"
        id_axes.set_title(textwrap.fill(title, 44 if style.is_column(width) else 32))
        hazards = table[(table["method"] == method) & (table["kind"] != "excluded")]
        steps = sorted(hazards["step"].unique())
        for ax, step in zip(eos_axes, (steps[0], steps[-1]), strict=True):
            draw_hazards(ax, hazards[hazards["step"] == step])
            ax.set_title(f"EOS, step {step:g}", fontweight="normal")
        eos_axes[0].set_ylabel("probability")
        eos_axes[1].tick_params(labelleft=False)
    label_lowest(panels, table, style.is_column(width))
    handles, labels = panels[0][1].get_legend_handles_labels()
    columns = 2 if style.is_column(width) else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


def make_grid(figure: Figure, num_methods: int, width: float) -> list[list[Any]]:
    """Return the three axes of every method."""
    if style.is_column(width):
        ratios = [0.55, 1] * num_methods
        grid = figure.add_gridspec(2 * num_methods, 2, height_ratios=ratios)
        places = [
            (grid[2 * i, :], grid[2 * i + 1, 0], grid[2 * i + 1, 1]) for i in range(num_methods)
        ]
    else:
        grid = figure.add_gridspec(num_methods, 3)
        places = [(grid[i, 0], grid[i, 1], grid[i, 2]) for i in range(num_methods)]
    return [[figure.add_subplot(place) for place in row] for row in places]


def label_lowest(panels: list[list[Any]], table: pd.DataFrame, narrow: bool) -> None:
    """Label the axes of the lowest panels, and give all EOS panels the same positions."""
    id_axes, *eos_axes = panels[-1]
    id_axes.set_xlabel("share of the signal |r|, %")
    for ax in eos_axes:
        ax.set_xlabel("position")
    first, last = table["first"].min() + 1, table["last"].max() + 1
    for row in panels:
        for ax in row[1:]:
            ax.set_xlim(0.8 * first, last)


def draw_excluded(axes: Any, rows: pd.DataFrame, highest: float) -> None:
    """Draw the ids with the largest shares as bars with intervals, in percent."""
    rows = rows.sort_values("value", ascending=False).head(NUM_SHOWN)
    axes.set(xlim=(0, 125 * highest), ylim=(NUM_SHOWN - 0.5, -0.5))
    axes.grid(axis="y", visible=False)
    if rows.empty:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color="#888888")
        axes.set(yticks=[])
        return
    y = np.arange(len(rows))
    value, low, high = 100 * rows[["value", "low", "high"]].to_numpy().T
    spread = np.stack([value - low, high - value]).clip(0)
    axes.barh(y, value, 0.7, xerr=spread, color=style.RED, error_kw={"lw": 1, "ecolor": "#333333"})
    for i in y:
        text = f"{value[i]:.2g} %"
        axes.text(high[i] + 2 * highest, i, text, va="center", fontsize=style.MIN_FONT_SIZE)
    names = [str(label).replace(" *", "*") for label in rows["label"]]
    axes.set_yticks(y, names, fontsize=style.MIN_FONT_SIZE, parse_math=False)


def draw_hazards(axes: Any, rows: pd.DataFrame) -> None:
    """Draw each model's EOS probability by position, with the intervals beside each other."""
    for i, (kind, (label, colour, dash, mark)) in enumerate(HAZARDS.items()):
        kind_rows = rows[(rows["kind"] == kind)].sort_values("first")
        centers = np.sqrt((kind_rows["first"] + 1) * (kind_rows["last"] + 1)) * 1.1 ** (i - 1)
        value, low, high = (kind_rows[x].clip(lower=SMALLEST) for x in ("value", "low", "high"))
        axes.vlines(centers, low, high, color=colour, lw=0.8, alpha=0.6)
        options: dict[str, Any] = {"color": colour, "ls": dash, "marker": mark, "ms": 3}
        axes.plot(centers, value, lw=1.2, label=label, **options)
    axes.set(yscale="log", ylim=(0.4 * SMALLEST, 2))
    axes.set_yticks((SMALLEST, 1e-4, 0.1), ("≤ 1e-7", "1e-4", "0.1"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xscale("log", base=2)
    axes.set_xticks((2, 8, 32, 128))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def collect(runs: list[Path]) -> pd.DataFrame:
    """Collect excluded ids at the first saved step, and EOS probabilities at the first and last.

    Args:
        runs: Run folders.

    Returns:
        A table with COLUMNS.
    """
    from diagnostics.records.run_groups import common_saved_steps, group_by_method
    from diagnostics.records.vocabulary import load_run_vocabulary
    from figures.collect.tokens import token_table

    records, generator = [], np.random.default_rng(0)
    for method, method_runs in group_by_method(runs).items():
        vocabulary, steps = load_run_vocabulary(method_runs[0]), common_saved_steps(method_runs)
        for step in sorted({steps[0], steps[-1]}):
            labels = {"method": method, "runs": len(method_runs), "step": step}
            data = token_table(method_runs, step)
            if step == steps[0]:
                mark = dict.fromkeys(vocabulary.special, "*")
                for token, band in excluded_shares(data, generator).items():
                    label = f"{vocabulary.name(token)} {mark.get(token, '')}".strip()
                    records.append(labels | make_row("excluded", band) | {"label": label})
            records += [labels | row for row in eos_hazards(method_runs, step, generator)]
    return pd.DataFrame(records, columns=list(COLUMNS))


def make_row(kind: str, band: tuple[float, float, float]) -> dict[str, Any]:
    """Return a row of the table with rounded values."""
    from diagnostics.stats import round_significant

    value, low, high = map(round_significant, band)
    return {"kind": kind, "value": value, "low": low, "high": high}


def excluded_shares(
    data: pd.DataFrame, generator: np.random.Generator
) -> dict[int, tuple[float, float, float]]:
    """Compute the share of sum |r| of the NUM_IDS largest ids among the excluded tokens.

    Args:
        data: A table of tokens.
        generator: Random generator of the bootstrap.

    Returns:
        {id: (share, low, high)}.
    """
    from figures.collect.tokens import shares_by_kind

    signal = data["cost"].abs()
    sums = signal[data["impossible"]].groupby(data["id"]).sum().sort_values(ascending=False)
    top = [int(token) for token in sums.index[:NUM_IDS]]
    kinds = data["id"].where(data["impossible"] & data["id"].isin(top), -1)
    shares = shares_by_kind(data, kinds, signal, generator)
    return {token: shares[str(token)] for token in top}


def eos_hazards(
    runs: list[Path], step: int, generator: np.random.Generator
) -> list[dict[str, Any]]:
    """Compute the mean EOS probability over prefixes by position bin, for each of HAZARDS.

    Args:
        runs: Run folders of one method.
        step: A step whose batch every run saved.
        generator: Random generator of the bootstrap.

    Returns:
        One row a bin and kind, for bins with at least MIN_TOKENS prefixes of two prompts.
    """
    from diagnostics.core.position_bins import bin_indices
    from diagnostics.records.run_folder import RunFolder
    from diagnostics.records.vocabulary import load_run_vocabulary
    from diagnostics.stats import bootstrap_interval
    from figures.collect.tokens import load_scored_batch

    vocabulary = load_run_vocabulary(runs[0])
    student_eos, teacher_eos = (
        tokenizer_eos_id(RunFolder(runs[0]).model_folder(role), vocabulary)
        for role in ("student", "teacher")
    )
    frames = []
    for run in runs:
        batch = load_scored_batch(RunFolder(run).batch_path(step))
        mask = batch.sampled
        prompt = batch.prompt[:, None].expand_as(mask)[mask]
        columns = {
            "cluster": [f"{run.name} {int(p)}" for p in prompt],
            "bin": bin_indices(mask.shape[1], mask.device).expand_as(mask)[mask].numpy(),
            "student": eos_probability(batch, student_eos, "student")[mask].numpy(),
            "teacher": eos_probability(batch, teacher_eos, "teacher")[mask].numpy(),
            "foreign": eos_probability(batch, student_eos, "teacher")[mask].numpy(),
        }
        frames.append(pd.DataFrame(columns))
    data, records = pd.concat(frames).assign(n=1.0), []

    def mean(x: np.ndarray) -> np.ndarray:
        return x[:, 1:].sum(0) / x[:, 0].sum()

    for number, bin_tokens in data.groupby("bin"):
        edge = {"first": 2**number if number else 0, "last": 2 ** (number + 1) - 1}
        values = bin_tokens.groupby("cluster")[["n", *HAZARDS]].sum().to_numpy(float)
        if len(bin_tokens) >= MIN_TOKENS and len(values) > 1:
            low, high = bootstrap_interval(values, mean, generator, resamples=1000)
            bands = zip(HAZARDS, mean(values), low, high, strict=True)
            records += [make_row(kind, tuple(band)) | edge for kind, *band in bands]
    return records


def tokenizer_eos_id(folder: Path, vocabulary: "Vocabulary") -> int:
    """Return the id of the EOS token of a model's tokenizer.

    Args:
        folder: The model folder.
        vocabulary: The run's vocabulary.

    Returns:
        The id.

    Raises:
        MissingFile: The folder names no EOS token.
        InvalidInput: The vocabulary does not have it.
    """
    from diagnostics.records.eos_ids import read_eos_token

    text = read_eos_token(folder)
    if text is None:
        raise MissingFile(f"no eos_token in {folder / 'tokenizer_config.json'}")
    if text.encode() not in vocabulary.ids:
        raise InvalidInput(f"the eos_token {text!r} of {folder} is not in the run's vocabulary")
    return vocabulary.ids[text.encode()]


def eos_probability(batch: "ScoredRollouts", token: int, role: str) -> "Tensor":
    """Estimate a model's probability of a token at every prefix.

    Exact where the support S contains the token. Elsewhere the estimate is 1[y = token] w(y) / p(y)
    with the sampled token y and the model's probability w, whose mean over y ~ p is w(token).

    Args:
        batch: Scored rollouts with a support.
        token: Id of the token.
        role: "student" or "teacher".

    Returns:
        (B, T) probabilities.
    """
    import torch

    from diagnostics.core.optional_fields import require_support

    support = require_support(batch)
    in_support = support.ids == token
    if support.present is not None:
        in_support = in_support & support.present
    support_logp = support.student_logp if role == "student" else support.teacher_logp
    sampled = batch.student_logp if role == "student" else batch.teacher_logp
    sampled_outside = (batch.tokens == token) & batch.sampled & ~in_support.any(-1)
    ratio = (sampled - batch.student_logp).exp()
    return (support_logp.exp() * in_support).sum(-1) + torch.where(
        sampled_outside, ratio, torch.zeros_like(ratio)
    )
