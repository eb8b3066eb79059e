"""Tokenizer panel: tokens that the teacher excludes, and each model's EOS probability."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.errors import InvalidInput, MissingFile
from figures import style

if TYPE_CHECKING:
    from torch import Tensor

    from diagnostics.batch import ScoredRollouts
    from diagnostics.records.vocabulary import Vocabulary

COLUMNS = ("method", "runs", "step", "kind", "label", "first", "last", "value", "low", "high")
CAPTION = (
    "Left: ids of which the student is sure (p > 0.9) and which the teacher excludes (q < 1e-4), "
    "at the first saved step, by their share of the total signal |r|; * marks special tokens. "
    "Middle and right (first and last saved step): EOS probability by position (bins double in "
    "width) over the student's prefixes, of each model for its own EOS token, and of the teacher "
    "for the student's EOS token; bands are 95 % intervals over prompts. Exact where the saved "
    "top-K contains the EOS token, otherwise an unbiased estimate from the sampled tokens. Where "
    "the teacher would end with its own EOS but not with the student's, the two EOS tokens "
    "differ; where with neither, it would continue. Batches saved before December 2026 have "
    "supervised tokens only: there, the prefix of a masked EOS is missing."
)
HAZARDS = {
    "student": ("student, own EOS", style.BLUE, "-"),
    "teacher": ("teacher, own EOS", style.RED, "-"),
    "foreign": ("teacher, student's EOS", style.RED, ":"),
}
NUM_IDS, MIN_TOKENS = 8, 100


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one row a method: excluded ids, and EOS probabilities at the first and the last step."""
    methods = list(dict.fromkeys(table["method"]))[:3]
    figure, axes = style.make_panels(len(methods), 3, 0.6 + 1.9 * len(methods), width=width)
    for i, method in enumerate(methods):
        method_rows = table[table["method"] == method]
        draw_excluded(axes[3 * i], method_rows[method_rows["kind"] == "excluded"])
        axes[3 * i].set_title(method)
        hazards = method_rows[method_rows["kind"] != "excluded"]
        steps = sorted(hazards["step"].unique())
        for ax, step in zip(axes[3 * i + 1 : 3 * i + 3], (steps[0], steps[-1]), strict=True):
            draw_hazards(ax, hazards[hazards["step"] == step])
            ax.set_title(f"step {step:g}", fontweight="normal")
        axes[3 * i + 1].set_ylabel("EOS probability")
        if i + 1 == len(methods):
            axes[3 * i].set_xlabel("share of the signal |r|")
            for ax in axes[3 * i + 1 :]:
                ax.set_xlabel("position in the response")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_excluded(axes: Any, rows: pd.DataFrame) -> None:
    """Draw the ids with the largest shares as bars with intervals."""
    rows = rows.sort_values("value", ascending=False).head(NUM_IDS)
    if rows.empty:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color="#888888")
        axes.set(xticks=[], yticks=[])
        return
    y = np.arange(len(rows))
    spread = np.stack([rows["value"] - rows["low"], rows["high"] - rows["value"]]).clip(0)
    axes.barh(y, rows["value"], 0.75, xerr=spread, color=style.RED, ecolor="#333333")
    axes.set_yticks(y, rows["label"].astype(str), fontsize=6.5, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)


def draw_hazards(axes: Any, rows: pd.DataFrame) -> None:
    """Draw each model's EOS probability by position."""
    for kind, (label, colour, dash) in HAZARDS.items():
        kind_rows = rows[(rows["kind"] == kind)].sort_values("first")
        centers = np.sqrt((kind_rows["first"] + 1) * (kind_rows["last"] + 1))
        low, high = (kind_rows[name].clip(lower=1e-7) for name in ("low", "high"))
        value = kind_rows["value"].clip(lower=1e-7)
        options = {"color": colour, "ls": dash, "marker": "o", "ms": 3, "label": label}
        options["lw"] = 3 if kind == "student" else 1.2
        style.plot_band(axes, centers, value, low, high, **options)
    axes.set(yscale="log", ylim=(1e-7, 2))
    axes.set_xscale("log", base=2)
    axes.get_xaxis().set_major_formatter("{x:g}")


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
