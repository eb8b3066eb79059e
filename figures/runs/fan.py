"""The own-prefix control: the teacher's certainty on its own text and on the student's."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.errors import MissingFile
from diagnostics.stats import bootstrap_interval
from figures import style

COLUMNS = (
    *("method", "runs", "source", "quantity", "first", "last", "tokens"),
    *("value", "low", "high", "q25", "q75", "q90"),
)
CAPTION = (
    "Teacher's entropy and doubt (1 − its largest probability) at the same positions of responses "
    "to the same held-out problems, on its own text, on the student's as it was, and on the "
    "trained student's (bins double in width; at least 100 tokens). Lines: means with 95 % "
    "intervals over prompts; fans: the middle half of the tokens, dotted: nine tenths of them are "
    "below. Right: how much more sure it is on its own text, paired by prompt. A gap that grows "
    "while its own line stays flat is the student's drift; both rising alike is length. Made by "
    "`opd probe-own-prefix RUN`."
)
QUANTITIES = {
    "teacher_entropy": "Teacher's entropy, nats",
    "doubt": "Teacher's doubt, 1 − max q",
}
SOURCES = {
    "teacher": ("its own text", style.GREEN),
    "student": ("the student's, before", style.RED),
    "trained": ("the student's, trained", style.BLUE),
}
THIN, MOST, FLOOR = 100, 3, 1e-5


def draw(table: pd.DataFrame) -> Figure:
    """A row a method: both fans, and the gap in certainty."""
    methods = list(dict.fromkeys(table["method"]))[:MOST]
    figure, axes = style.panels(len(methods), 3, 0.7 + 2.0 * len(methods))
    for i, method in enumerate(methods):
        mine = table[(table["method"] == method) & (table["tokens"] >= THIN)]
        here = axes[3 * i : 3 * i + 3]
        for place, (quantity, title) in zip(here, QUANTITIES.items(), strict=False):
            rows = mine[mine["quantity"] == quantity]
            for source, (label, colour) in SOURCES.items():
                fan(place, rows[rows["source"] == source].sort_values("first"), label, colour)
            place.set(yscale="log", ylim=(FLOOR, None))
            place.set_title(title if i == 0 else "", fontweight="normal")
        rows = mine[mine["quantity"] == "gap"]
        for source in ("student", "trained"):
            label, colour = SOURCES[source]
            at = rows[rows["source"] == source].sort_values("first")
            how = {"color": colour, "marker": "o", "ms": 3}
            style.curve(here[2], middle(at), at["value"], at["low"], at["high"], **how)
        here[2].axhline(0, color="black", lw=0.6)
        here[2].set_title("More sure on its own text by" if i == 0 else "", fontweight="normal")
        here[0].set_ylabel(method)
        for place in here:
            place.set_xscale("log", base=2)
            place.get_xaxis().set_major_formatter("{x:g}")
            if i + 1 == len(methods):
                place.set_xlabel("position in the response")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def middle(rows: pd.DataFrame) -> Any:
    """Where a bin of positions is drawn: the geometric middle of its ends, counted from 1."""
    return np.sqrt((rows["first"] + 1) * (rows["last"] + 1))


def fan(axes: Any, rows: pd.DataFrame, label: str, colour: str) -> None:
    """The mean with its interval, the middle half of the tokens, and their 90th percentile."""
    x = middle(rows)
    low, high = (rows[name].clip(lower=FLOOR) for name in ("q25", "q75"))
    axes.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
    axes.plot(x, rows["q90"].clip(lower=FLOOR), ":", color=colour, lw=0.8)
    value, low, high = (rows[name] for name in ("value", "low", "high"))
    how = {"color": colour, "marker": "o", "ms": 3, "elinewidth": 0.8, "label": label}
    axes.errorbar(x, value, yerr=[value - low, high - value], **how)


def collect(runs: list[Path]) -> pd.DataFrame:
    """The three sources by position bin, all runs of a method together."""
    from diagnostics.records.run_folders import methods

    records, generator = [], np.random.default_rng(0)
    for method, mine in methods(runs).items():
        about = {"method": method, "runs": len(mine)}
        found = {source: certainty(mine, source) for source in SOURCES}
        for source, data in found.items():
            for number, some in data.groupby("bin"):
                for quantity in QUANTITIES:
                    here = {"source": source, "quantity": quantity, **edges(int(number))}
                    records.append(about | here | summary(some, quantity, generator))
            if source != "teacher":
                here = {"source": source, "quantity": "gap"}
                records += [about | here | row for row in gaps(found["teacher"], data, generator)]
    return pd.DataFrame(records, columns=list(COLUMNS))


def certainty(runs: list[Path], source: str) -> pd.DataFrame:
    """Tokens of all runs: prompt, bin of its position, teacher_entropy and doubt.

    Raises:
      FileNotFoundError: a run has no control/; says what makes it.
    """
    from diagnostics.core.position_bins import numbers
    from figures.collect.tokens import scored

    frames = []
    for run in runs:
        path = run / "control" / f"{source}.safetensors"
        if not path.exists():
            raise MissingFile(f"{path} does not exist; make it with `opd probe-own-prefix {run}`")
        batch = scored(path)
        mask, prefix = batch.sampled, batch.prefix
        assert prefix is not None  # `scored` refuses others
        columns = {
            "prompt": batch.prompt[:, None].expand_as(mask),
            "bin": numbers(mask.shape[1], mask.device).expand_as(mask),
            "teacher_entropy": prefix.teacher_entropy,
            "doubt": 1 - prefix.teacher_max,
        }
        frames.append(pd.DataFrame({name: x[mask].numpy() for name, x in columns.items()}))
    return pd.concat(frames, ignore_index=True)


def edges(number: int) -> dict[str, int]:
    """First and last position of a bin of `diagnostics.core.position_bins`."""
    return {"first": 2**number if number else 0, "last": 2 ** (number + 1) - 1}


def summary(
    data: pd.DataFrame, quantity: str, generator: np.random.Generator
) -> dict[str, float | int]:
    """Number of tokens, their mean with a 95 % interval over prompts, and three quantiles."""
    from diagnostics.records.run_folders import short

    sums = data.groupby("prompt")[quantity].agg(["sum", "size"]).to_numpy(float)
    found = {"value": data[quantity].mean()}
    if len(sums) > 1:
        ends = bootstrap_interval(sums, mean, generator, resamples=1000)
        found |= dict(zip(("low", "high"), ends, strict=True))
    found |= {f"q{q}": data[quantity].quantile(q / 100) for q in (25, 75, 90)}
    return {"tokens": len(data)} | {name: short(float(x)) for name, x in found.items()}


def mean(x: np.ndarray) -> np.ndarray:
    """sum / number over rows of (sum, number)."""
    return x[:, 0].sum() / x[:, 1].sum()


def gaps(
    own: pd.DataFrame, other: pd.DataFrame, generator: np.random.Generator
) -> list[dict[str, float | int]]:
    """Mean doubt on the other's text minus that on the teacher's own, bin by bin.

    The interval resamples prompts, which both answered, so it is paired.
    """
    from diagnostics.records.run_folders import short

    found = []
    for number in sorted(set(own["bin"]) & set(other["bin"])):
        parts = [x[x["bin"] == number].groupby("prompt")["doubt"] for x in (other, own)]
        sums = pd.concat([part.agg(["sum", "size"]) for part in parts], axis=1).fillna(0)

        def gap(x: np.ndarray) -> np.ndarray:
            return mean(x[:, :2]) - mean(x[:, 2:])

        values = sums.to_numpy(float)
        if min((values[:, 1] > 0).sum(), (values[:, 3] > 0).sum()) < 8:
            continue  # a resample might hold none of one of the two
        low, high = bootstrap_interval(values, gap, generator, resamples=1000)
        bands = dict(zip(("value", "low", "high"), (gap(values), low, high), strict=True))
        tokens = int(min(values[:, 1].sum(), values[:, 3].sum()))
        row = edges(int(number)) | {"tokens": tokens}
        found.append(row | {name: short(float(x)) for name, x in bands.items()})
    return found
