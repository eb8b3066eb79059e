"""Own-prefix baseline: the teacher's uncertainty on its own responses and on the student's."""

from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from diagnostics.errors import MissingFile
from diagnostics.stats import bootstrap_interval
from figures import style
from figures.labels import method_label

COLUMNS = (
    *("method", "runs", "source", "quantity", "first", "last", "tokens"),
    *("value", "low", "high", "q25", "q75", "q90"),
)
CAPTION = (
    "Own-prefix baseline: is the teacher less certain on the student's text than on its own? "
    "Teacher's entropy and uncertainty (1 − its largest probability max q), by position in "
    "responses to the same held-out problems, on three kinds of text: the teacher's own, the "
    "untrained student's, and the trained student's. Markers: means with 95 % intervals over "
    "prompts; wide bars: the middle half of the tokens; dashes: their 90th percentile. Difference: "
    "uncertainty on the student's text minus that on the teacher's own, paired by prompt; bands: "
    "95 % intervals. Its title tells whether the trained student's is clear at the last positions. "
    "Position bins double in width and have at least 100 tokens. A difference that grows while "
    "the curve of the teacher's own text stays flat is caused by the student's drift; if both "
    "curves rise alike, by the length. In one column the entropy, which tells the same as the "
    "uncertainty, and the quantiles are omitted. Made by `opd probe-own-prefix RUN`."
)
QUANTITIES = {
    "teacher_entropy": "teacher's entropy (nats)",
    "doubt": "uncertainty 1 − max q",
}
SOURCES = {
    "teacher": ("teacher's own text", style.GREEN, "o", "-"),
    "student": ("untrained student's text", style.RED, "s", "--"),
    "trained": ("trained student's text", style.BLUE, "^", "-"),
}
"""Who wrote the text: label, color, marker and line style."""
MIN_TOKENS, MAX_METHODS, FLOOR = 100, 3, 1e-5


def draw(table: pd.DataFrame, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw one row a method: entropy (on a page only), doubt, and the difference in doubt."""
    narrow = style.is_column(width)
    methods = list(dict.fromkeys(table["method"]))[:MAX_METHODS]
    table = table[table["method"].isin(methods) & (table["tokens"] >= MIN_TOKENS)]
    quantities = [*QUANTITIES][narrow:]
    columns = len(quantities) + 1
    figure, axes = style.make_panels(
        len(methods), columns, 1.0 + (1.5 if narrow else 1.8) * len(methods), width=width
    )
    for i, method in enumerate(methods):
        rows = table[table["method"] == method]
        *level_axes, gap_axes = axes[columns * i : columns * (i + 1)]
        for ax, quantity in zip(level_axes, quantities, strict=True):
            draw_levels(ax, rows[rows["quantity"] == quantity], quantiles=not narrow)
            ax.set_ylabel(QUANTITIES[quantity])
        draw_gaps(gap_axes, rows[rows["quantity"] == "gap"], narrow)
        level_axes[0].set_title(fill(method_label(method), 22, break_on_hyphens=False))
        for ax in (*level_axes, gap_axes):
            set_position_axis(ax, table)
            ax.set_xlabel("position (tokens)" if i + 1 == len(methods) else "")
            ax.tick_params(labelbottom=i + 1 == len(methods))
    for column in range(columns):
        share_limits(axes[column::columns])
    add_legend(figure, axes[0], narrow)
    return figure


def bin_centers(rows: pd.DataFrame) -> Any:
    """Return the geometric center of each position bin, counted from 1."""
    return np.sqrt((rows["first"] + 1) * (rows["last"] + 1))


def draw_levels(axes: Any, rows: pd.DataFrame, quantiles: bool) -> None:
    """Draw means with intervals, and quantiles of the tokens; sources stand beside each other."""
    for i, (source, (_, color, marker, dash)) in enumerate(SOURCES.items()):
        part = rows[rows["source"] == source].sort_values("first")
        x = bin_centers(part) * 2.0 ** (0.22 * (i - 1))
        if quantiles:
            low, high, tail = (part[name].clip(lower=FLOOR) for name in ("q25", "q75", "q90"))
            axes.vlines(x, low, high, color=color, alpha=0.3, lw=3)
            axes.plot(x, tail, "_", color=color, ms=4, mew=1)
        value = part["value"]
        spread = [value - part["low"], part["high"] - value]
        options = {"color": color, "marker": marker, "ls": dash, "ms": 3, "lw": 0.9}
        axes.errorbar(x, value, yerr=spread, elinewidth=0.8, **options)
    axes.set_yscale("log")


def draw_gaps(axes: Any, rows: pd.DataFrame, narrow: bool) -> None:
    """Draw the difference to the teacher's own text; the title tells its sign at the end."""
    for source in ("student", "trained"):
        _, color, marker, dash = SOURCES[source]
        part = rows[rows["source"] == source].sort_values("first")
        options = {"color": color, "marker": marker, "ls": dash, "ms": 3}
        style.plot_band(
            axes, bin_centers(part), part["value"], part["low"], part["high"], **options
        )
    axes.axhline(0, color="black", lw=0.6)
    axes.set_title(describe_end(rows[rows["source"] == "trained"]))
    axes.set_ylabel("difference" if narrow else "difference in 1 − max q")
    axes.get_yaxis().set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.get_yaxis().set_major_formatter("{x:g}")


def describe_end(rows: pd.DataFrame) -> str:
    """Tell whether the teacher is less certain on the trained student's text in the last bin."""
    if rows.empty:
        return ""
    last = rows.sort_values("first").iloc[-1]
    finding = "no clear change"
    if last["low"] > 0 or last["high"] < 0:
        finding = f"{'less' if last['low'] > 0 else 'more'} certain"
    return f"{finding}\nat the end"


def set_position_axis(axes: Any, table: pd.DataFrame) -> None:
    """Make the horizontal axis logarithmic, over all bins of the table."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(bin_centers(table).min() / 1.5, bin_centers(table).max() * 1.5)
    axes.get_xaxis().set_major_locator(LogLocator(base=2, numticks=4))
    axes.get_xaxis().set_major_formatter("{x:g}")


def share_limits(axes: list[Any]) -> None:
    """Give axes the limits of their union."""
    limits = np.array([ax.get_ylim() for ax in axes])
    for ax in axes:
        ax.set_ylim(limits.min(), limits.max())


def add_legend(figure: Figure, axes: Any, narrow: bool) -> None:
    """Explain the sources and marks below the panels; `axes` are any to make handles with."""
    marks = {
        label: axes.plot([], [], color=color, marker=marker, ls=dash, ms=3, lw=0.9)[0]
        for label, color, marker, dash in SOURCES.values()
    }
    if not narrow:
        marks["middle half of the tokens"] = axes.vlines([], [], [], color="grey", alpha=0.5, lw=3)
        (marks["90th percentile"],) = axes.plot([], [], "_", color="black", ms=4, mew=1)
    figure.legend(marks.values(), marks, loc="outside lower center", ncols=1 if narrow else 3)


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
