"""Own-prefix baseline: the teacher's uncertainty on its own responses and on the student's."""

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
    "Own-prefix baseline: is the teacher less certain on the student's text than on its own? Left "
    "and middle: the teacher's entropy and its uncertainty (1 − its largest probability) by "
    "position in responses to the same held-out problems, on three kinds of text: the teacher's "
    "own, the untrained student's, and the trained student's. Points: means with 95 % intervals "
    "over prompts; shaded: the middle half of the tokens; dotted: their 90th percentile. Right: "
    "uncertainty on the student's text minus that on the teacher's own, paired by prompt. "
    "Position bins double in width and have at least 100 tokens. A difference that grows while "
    "the curve of the teacher's own text stays flat is caused by the student's drift; if both "
    "curves rise alike, by the length. Made by `opd probe-own-prefix RUN`."
)
QUANTITIES = {
    "teacher_entropy": "Teacher's entropy, nats",
    "doubt": "Teacher's uncertainty, 1 − max q",
}
SOURCES = {
    "teacher": ("teacher's own text", style.GREEN),
    "student": ("untrained student's text", style.RED),
    "trained": ("trained student's text", style.BLUE),
}
MIN_TOKENS, MAX_METHODS, FLOOR = 100, 3, 1e-5


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one row a method: entropy, doubt, and the difference in doubt."""
    methods = list(dict.fromkeys(table["method"]))[:MAX_METHODS]
    figure, axes = style.make_panels(len(methods), 3, 0.7 + 2.0 * len(methods), width=width)
    for i, method in enumerate(methods):
        method_rows = table[(table["method"] == method) & (table["tokens"] >= MIN_TOKENS)]
        row_axes = axes[3 * i : 3 * i + 3]
        for ax, (quantity, title) in zip(row_axes, QUANTITIES.items(), strict=False):
            rows = method_rows[method_rows["quantity"] == quantity]
            for source, (label, colour) in SOURCES.items():
                plot_quantiles(
                    ax, rows[rows["source"] == source].sort_values("first"), label, colour
                )
            ax.set(yscale="log", ylim=(FLOOR, None))
            ax.set_title(title if i == 0 else "", fontweight="normal")
        rows = method_rows[method_rows["quantity"] == "gap"]
        for source in ("student", "trained"):
            label, colour = SOURCES[source]
            source_rows = rows[rows["source"] == source].sort_values("first")
            options = {"color": colour, "marker": "o", "ms": 3}
            style.plot_band(
                row_axes[2],
                bin_centers(source_rows),
                source_rows["value"],
                source_rows["low"],
                source_rows["high"],
                **options,
            )
        row_axes[2].axhline(0, color="black", lw=0.6)
        row_axes[2].set_title("Uncertainty minus own text's" if i == 0 else "", fontweight="normal")
        row_axes[0].set_ylabel(method)
        for ax in row_axes:
            ax.set_xscale("log", base=2)
            ax.get_xaxis().set_major_formatter("{x:g}")
            if i + 1 == len(methods):
                ax.set_xlabel("position in the response")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def bin_centers(rows: pd.DataFrame) -> Any:
    """Return the geometric center of each position bin, counted from 1."""
    return np.sqrt((rows["first"] + 1) * (rows["last"] + 1))


def plot_quantiles(axes: Any, rows: pd.DataFrame, label: str, colour: str) -> None:
    """Plot the mean with its interval, the middle half of the tokens, and their 90th percentile."""
    x = bin_centers(rows)
    low, high = (rows[name].clip(lower=FLOOR) for name in ("q25", "q75"))
    axes.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
    axes.plot(x, rows["q90"].clip(lower=FLOOR), ":", color=colour, lw=0.8)
    value, low, high = (rows[name] for name in ("value", "low", "high"))
    options = {"color": colour, "marker": "o", "ms": 3, "elinewidth": 0.8, "label": label}
    axes.errorbar(x, value, yerr=[value - low, high - value], **options)


def collect(runs: list[Path]) -> pd.DataFrame:
    """Summarize the three sources by position bin, with all runs of a method pooled.

    Args:
        runs: Run folders in which `opd probe-own-prefix` has been run.

    Returns:
        A table with COLUMNS.
    """
    from diagnostics.records.run_groups import group_by_method

    records, generator = [], np.random.default_rng(0)
    for method, method_runs in group_by_method(runs).items():
        labels = {"method": method, "runs": len(method_runs)}
        tokens_by_source = {source: teacher_certainty(method_runs, source) for source in SOURCES}
        for source, data in tokens_by_source.items():
            for number, bin_tokens in data.groupby("bin"):
                for quantity in QUANTITIES:
                    keys = {"source": source, "quantity": quantity, **bin_edges(int(number))}
                    records.append(
                        labels | keys | summarize_tokens(bin_tokens, quantity, generator)
                    )
            if source != "teacher":
                keys = {"source": source, "quantity": "gap"}
                records += [
                    labels | keys | row
                    for row in paired_gaps(tokens_by_source["teacher"], data, generator)
                ]
    return pd.DataFrame(records, columns=list(COLUMNS))


def teacher_certainty(runs: list[Path], source: str) -> pd.DataFrame:
    """Return prompt, position bin, teacher_entropy and doubt of the tokens of all runs.

    Args:
        runs: Run folders.
        source: Who wrote the text: "teacher", "student" or "trained".

    Returns:
        A table with one row a token.

    Raises:
        MissingFile: A run has no control/ folder; the message names the command that makes it.
    """
    from diagnostics.core.position_bins import bin_indices
    from figures.collect.tokens import load_scored_batch

    frames = []
    for run in runs:
        path = run / "control" / f"{source}.safetensors"
        if not path.exists():
            raise MissingFile(f"{path} does not exist; make it with `opd probe-own-prefix {run}`")
        batch = load_scored_batch(path)
        mask, prefix = batch.sampled, batch.prefix
        assert prefix is not None  # load_scored_batch checks it
        values = {
            "prompt": batch.prompt[:, None].expand_as(mask),
            "bin": bin_indices(mask.shape[1], mask.device).expand_as(mask),
            "teacher_entropy": prefix.teacher_entropy,
            "doubt": 1 - prefix.teacher_max,
        }
        frames.append(pd.DataFrame({name: x[mask].numpy() for name, x in values.items()}))
    return pd.concat(frames, ignore_index=True)


def bin_edges(number: int) -> dict[str, int]:
    """Return the first and last position of a bin of `diagnostics.core.position_bins`."""
    return {"first": 2**number if number else 0, "last": 2 ** (number + 1) - 1}


def summarize_tokens(
    data: pd.DataFrame, quantity: str, generator: np.random.Generator
) -> dict[str, float | int]:
    """Return the number of tokens, their mean with a 95 % interval over prompts, and quantiles.

    Args:
        data: Tokens of one position bin.
        quantity: Column to summarize.
        generator: Random generator of the bootstrap.

    Returns:
        The columns tokens, value, low, high, q25, q75 and q90; no interval with one prompt.
    """
    from diagnostics.stats import round_significant

    sums = data.groupby("prompt")[quantity].agg(["sum", "size"]).to_numpy(float)
    values = {"value": data[quantity].mean()}
    if len(sums) > 1:
        ends = bootstrap_interval(sums, ratio_of_sums, generator, resamples=1000)
        values |= dict(zip(("low", "high"), ends, strict=True))
    values |= {f"q{q}": data[quantity].quantile(q / 100) for q in (25, 75, 90)}
    return {"tokens": len(data)} | {name: round_significant(float(x)) for name, x in values.items()}


def ratio_of_sums(x: np.ndarray) -> np.ndarray:
    """Return sum / number from rows of (sum, number)."""
    return x[:, 0].sum() / x[:, 1].sum()


def paired_gaps(
    teacher_tokens: pd.DataFrame, student_tokens: pd.DataFrame, generator: np.random.Generator
) -> list[dict[str, float | int]]:
    """Compute the mean doubt on the student's text minus that on the teacher's, by position bin.

    Prompts are resampled, which both models answered, so the interval is paired.

    Args:
        teacher_tokens: Tokens of the teacher's text.
        student_tokens: Tokens of the student's text.
        generator: Random generator of the bootstrap.

    Returns:
        One row a bin in which both have tokens of at least 8 prompts.
    """
    from diagnostics.stats import round_significant

    records = []
    for number in sorted(set(teacher_tokens["bin"]) & set(student_tokens["bin"])):
        parts = [
            x[x["bin"] == number].groupby("prompt")["doubt"]
            for x in (student_tokens, teacher_tokens)
        ]
        sums = pd.concat([part.agg(["sum", "size"]) for part in parts], axis=1).fillna(0)

        def gap(x: np.ndarray) -> np.ndarray:
            return ratio_of_sums(x[:, :2]) - ratio_of_sums(x[:, 2:])

        values = sums.to_numpy(float)
        if min((values[:, 1] > 0).sum(), (values[:, 3] > 0).sum()) < 8:
            continue  # a resample could have no token of one source
        low, high = bootstrap_interval(values, gap, generator, resamples=1000)
        bands = dict(zip(("value", "low", "high"), (gap(values), low, high), strict=True))
        tokens = int(min(values[:, 1].sum(), values[:, 3].sum()))
        row = bin_edges(int(number)) | {"tokens": tokens}
        records.append(row | {name: round_significant(float(x)) for name, x in bands.items()})
    return records
