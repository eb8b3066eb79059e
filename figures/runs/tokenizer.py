"""The tokenizer sheet: tokens that the teacher excludes, and how likely each model is to end."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import style

if TYPE_CHECKING:
    from torch import Tensor

    from diagnostics.batch import ScoredRollouts

COLUMNS = ("method", "runs", "step", "kind", "label", "first", "last", "value", "low", "high")
CAPTION = (
    "Left: ids of which the student is sure (p > 0.9) and which the teacher excludes (q < 1e-4), "
    "at the first saved step, by their share of the whole signal |r|; * marks special tokens. "
    "Right: probability of ending at a position (bins double in width) over the prefixes that the "
    "student wrote, of each model by its tokenizer's end token, and of the teacher by the "
    "student's; bands are 95 % over prompts. Exact where the kept top-K holds the end, elsewhere "
    "estimated without bias from the sampled tokens. Where the teacher would end in its own way, "
    "but not in the student's, the names of the ends differ; where in neither, it would go on. "
    "In batches that hold supervised tokens alone, as all saved before December 2026, a masked end "
    "takes its prefix out."
)
ENDS = {
    "student": ("student, its own end", style.BLUE, "-"),
    "teacher": ("teacher, its own end", style.RED, "-"),
    "foreign": ("teacher, the student's end", style.RED, ":"),
}
TOP, THIN = 8, 100


def draw(table: pd.DataFrame) -> Figure:
    """A row a method: the excluded ids, the hazards at the first step, those at the last."""
    methods = list(dict.fromkeys(table["method"]))[:3]
    figure, axes = style.panels(len(methods), 3, 0.6 + 1.9 * len(methods))
    for i, method in enumerate(methods):
        mine = table[table["method"] == method]
        excluded(axes[3 * i], mine[mine["kind"] == "excluded"])
        axes[3 * i].set_title(method)
        hazards = mine[mine["kind"] != "excluded"]
        steps = sorted(hazards["step"].unique())
        for place, step in zip(axes[3 * i + 1 : 3 * i + 3], (steps[0], steps[-1]), strict=True):
            ends(place, hazards[hazards["step"] == step])
            place.set_title(f"step {step:g}", fontweight="normal")
        axes[3 * i + 1].set_ylabel("probability of ending")
        if i + 1 == len(methods):
            axes[3 * i].set_xlabel("share of the signal |r|")
            for place in axes[3 * i + 1 :]:
                place.set_xlabel("position in the response")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def excluded(axes: Any, rows: pd.DataFrame) -> None:
    """Bars of the ids with the largest share, each with its interval."""
    rows = rows.sort_values("value", ascending=False).head(TOP)
    if rows.empty:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color="#888888")
        axes.set(xticks=[], yticks=[])
        return
    place = np.arange(len(rows))
    spread = np.stack([rows["value"] - rows["low"], rows["high"] - rows["value"]]).clip(0)
    axes.barh(place, rows["value"], 0.75, xerr=spread, color=style.RED, ecolor="#333333")
    axes.set_yticks(place, rows["label"].astype(str), fontsize=6.5, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)


def ends(axes: Any, rows: pd.DataFrame) -> None:
    """Both models' probability of ending, by position."""
    for kind, (label, colour, dash) in ENDS.items():
        at = rows[(rows["kind"] == kind)].sort_values("first")
        middle = np.sqrt((at["first"] + 1) * (at["last"] + 1))
        low, high = (at[name].clip(lower=1e-7) for name in ("low", "high"))
        value = at["value"].clip(lower=1e-7)
        how = {"color": colour, "ls": dash, "marker": "o", "ms": 3, "label": label}
        how["lw"] = 3 if kind == "student" else 1.2
        style.curve(axes, middle, value, low, high, **how)
    axes.set(yscale="log", ylim=(1e-7, 2))
    axes.set_xscale("log", base=2)
    axes.get_xaxis().set_major_formatter("{x:g}")


def collect(runs: list[Path]) -> pd.DataFrame:
    """The excluded ids at the first saved step, and hazards at the first and the last."""
    from diagnostics.records.run_folders import methods, saved
    from diagnostics.records.vocabulary import read
    from figures.collect.tokens import tokens

    records, generator = [], np.random.default_rng(0)
    for method, mine in methods(runs).items():
        vocabulary, steps = read(mine[0]), saved(mine)
        for step in sorted({steps[0], steps[-1]}):
            about = {"method": method, "runs": len(mine), "step": step}
            data = tokens(mine, step)
            if step == steps[0]:
                mark = dict.fromkeys(vocabulary.special, "*")
                for token, band in impossible(data, generator).items():
                    label = f"{vocabulary.name(token)} {mark.get(token, '')}".strip()
                    records.append(about | entry("excluded", band) | {"label": label})
            records += [about | row for row in hazards(mine, step, generator)]
    return pd.DataFrame(records, columns=list(COLUMNS))


def entry(kind: str, band: tuple[float, float, float]) -> dict[str, Any]:
    from diagnostics.records.run_folders import short

    value, low, high = map(short, band)
    return {"kind": kind, "value": value, "low": low, "high": high}


def impossible(
    data: pd.DataFrame, generator: np.random.Generator
) -> dict[int, tuple[float, float, float]]:
    """{id: share of sum |r|, low, high} of the TOP ids among the excluded tokens."""
    from figures.collect.tokens import shares

    signal = data["cost"].abs()
    sums = signal[data["impossible"]].groupby(data["id"]).sum().sort_values(ascending=False)
    top = [int(token) for token in sums.index[:TOP]]
    kinds = data["id"].where(data["impossible"] & data["id"].isin(top), -1)
    found = shares(data, kinds, signal, generator)
    return {token: found[str(token)] for token in top}


def hazards(runs: list[Path], step: int, generator: np.random.Generator) -> list[dict[str, Any]]:
    """Mean probability of an end by position bin over the prefixes, of the kinds in ENDS."""
    from diagnostics.core.position_bins import numbers
    from diagnostics.records.run_folders import batch_path
    from diagnostics.records.vocabulary import end, model, read
    from diagnostics.stats import bootstrap_interval
    from figures.collect.tokens import scored

    ours, theirs = (end(model(runs[0], role), read(runs[0])) for role in ("student", "teacher"))
    frames = []
    for run in runs:
        batch = scored(batch_path(run, step))
        mask = batch.sampled
        prompt = batch.prompt[:, None].expand_as(mask)[mask]
        columns = {
            "cluster": [f"{run.name} {int(p)}" for p in prompt],
            "bin": numbers(mask.shape[1], mask.device).expand_as(mask)[mask].numpy(),
            "student": ending(batch, ours, "student")[mask].numpy(),
            "teacher": ending(batch, theirs, "teacher")[mask].numpy(),
            "foreign": ending(batch, ours, "teacher")[mask].numpy(),
        }
        frames.append(pd.DataFrame(columns))
    data, records = pd.concat(frames).assign(n=1.0), []

    def mean(x: np.ndarray) -> np.ndarray:
        return x[:, 1:].sum(0) / x[:, 0].sum()

    for number, some in data.groupby("bin"):
        edge = {"first": 2**number if number else 0, "last": 2 ** (number + 1) - 1}
        values = some.groupby("cluster")[["n", *ENDS]].sum().to_numpy(float)
        if len(some) >= THIN and len(values) > 1:
            low, high = bootstrap_interval(values, mean, generator, resamples=1000)
            bands = zip(ENDS, mean(values), low, high, strict=True)
            records += [entry(kind, tuple(band)) | edge for kind, *band in bands]
    return records


def ending(batch: "ScoredRollouts", token: int, role: str) -> "Tensor":
    """(B, T) probability of a token by the model of that role at every prefix, or an estimate.

    With the support S and the sampled token y: exact where S holds the token; elsewhere
    1[y is it] w(y) / p(y), w the role's probability, whose mean over y ~ p is w(token).
    """
    import torch

    from diagnostics.core.optional_fields import support_of

    support = support_of(batch)
    here = support.ids == token
    if support.present is not None:
        here = here & support.present
    on = support.student_logp if role == "student" else support.teacher_logp
    sampled = batch.student_logp if role == "student" else batch.teacher_logp
    drawn = (batch.tokens == token) & batch.sampled & ~here.any(-1)
    ratio = (sampled - batch.student_logp).exp()
    return (on.exp() * here).sum(-1) + torch.where(drawn, ratio, torch.zeros_like(ratio))
