"""Measurements of claims about failures: special tokens, prefixes, loops, missing normalisation."""

from figures.claims.measures import (
    AGREES,
    DIFFERS,
    MARGIN,
    UNDECIDED,
    ClaimResult,
    Measure,
    Tables,
    compare_means,
    format_interval,
    format_share,
    verdict_positive,
)
from figures.collect.steps import seed_means


def special_token_logps(tables: Tables) -> ClaimResult:
    """Check for tokens that the student is sure of and the teacher nearly excludes."""
    table = tables["segmentation"]
    table = table[table["teacher"] < -3]
    parts = [f"{r.text} {r.student:.2f} and {r.teacher:.1f}" for r in table.itertuples()]
    student_is_confident = bool((table["student"] > -0.1).any())
    text = (
        f"log-probabilities of student and teacher: {'; '.join(parts)} (the models are built to "
        "differ so)"
    )
    return ClaimResult(text, AGREES if student_is_confident else DIFFERS)


def gap_tail_widens(method: str) -> Measure:
    """Measure whether the gap's 1 % quantile is lower in the last position bin than in the second.

    The second is used because the first contains the tokens next to the tag.

    Args:
        method: Method whose last recorded step is used.

    Returns:
        The measurement as a function of the tables.
    """

    def measure(tables: Tables) -> ClaimResult:
        """Compare the intervals of the two bins."""
        table = tables["gap"]
        table = table[(table["method"] == method) & (table["quantile"] == 0.01)]
        table = table[table["step"] == table["step"].max()].sort_values("first")
        second_bin, last_bin = table.iloc[1], table.iloc[-1]
        text = (
            f"1 % quantile at positions {second_bin['first']:.0f} to {second_bin['last']:.0f}: "
            f"{format_interval(second_bin['value'], second_bin['low'], second_bin['high'])}, at "
            f"{last_bin['first']:.0f} to "
            f"{last_bin['last']:.0f}: "
            f"{format_interval(last_bin['value'], last_bin['low'], last_bin['high'])} nats (step "
            f"{last_bin['step']:.0f})"
        )
        widens, narrows = last_bin["high"] < second_bin["low"], last_bin["low"] > second_bin["high"]
        return ClaimResult(text, AGREES if widens else DIFFERS if narrows else UNDECIDED)

    return measure


def loop_not_penalized(tables: Tables) -> ClaimResult:
    """Measure the teacher's probabilities in the repeated part of one rollout."""
    inside = tables["loop"].query("repeated")
    text = (
        f"in the repeated part of one rollout the teacher's median probability is "
        f"{inside['teacher'].median():.3f}; {(inside['teacher'] < 0.5).mean():.0%} of its tokens "
        "are below 0.5"
    )
    return ClaimResult(text, AGREES if inside["teacher"].median() > 0.9 else DIFFERS)


def repeated_tokens_cost_less(tables: Tables) -> ClaimResult:
    """Measure whether repeated tokens cost less than others in the last ten steps, by seed."""
    table = tables["paper_steps"]
    sampled_rows = table[(table["group"] == "single") & (table["method"] == "sampled")]
    sampled_rows = sampled_rows.dropna(subset=["repeated_cost", "regular_cost"])
    last_rows = sampled_rows[sampled_rows["step"] > sampled_rows["step"].max() - 10].groupby("seed")
    comparison = compare_means(
        last_rows["repeated_cost"].mean(), last_rows["regular_cost"].mean(), verdict_positive
    )
    return ClaimResult(
        f"log p - log q of repeated and other tokens: {comparison.measurement}", comparison.verdict
    )


def below_diagonal(tables: Tables) -> ClaimResult:
    """Measure the share of sampled tokens that the student overrates, against one half."""
    interval = tables["scatter"].set_index("kind").loc["below the line", ["share", "low", "high"]]
    table = tables["paper_steps"]
    first = table[(table["method"] == "sampled") & (table["step"] == 0)]
    expected_share = first["negative_null"].mean()
    text = (
        f"{format_share(*map(float, interval))} of the sampled tokens; expected from the models: "
        f"{expected_share:.3f}"
    )
    return ClaimResult(
        text, verdict_positive(float(interval["low"]) - 0.5, float(interval["high"]) - 0.5)
    )


def entropy_grows(tables: Tables) -> ClaimResult:
    """Measure the entropy of the un-normalised objective: its last step over its first, by seed."""
    table = tables["paper_steps"].dropna(subset=["entropy"])
    method_rows = table[(table["group"] == "single") & (table["method"] == "lsm_unnormalised")]
    entropy_by_seed = method_rows.pivot_table(index="step", columns="seed", values="entropy")
    ratio = (
        (entropy_by_seed.iloc[-1] / entropy_by_seed.iloc[0])
        .rename("entropy")
        .reset_index()
        .assign(step=0)
    )
    interval = seed_means(ratio, "entropy", log=True).iloc[0]
    text = (
        f"entropy grows {format_interval(interval['value'], interval['low'], interval['high'])} "
        "times"
    )
    return ClaimResult(text, verdict_positive(interval["low"] - 1, interval["high"] - 1))


def score_vanishes(tables: Tables) -> ClaimResult:
    """Measure the score of the un-normalised objective on its own rollouts at the last step."""
    table = tables["paper_steps"].dropna(subset=["reward"])
    method_rows = table[(table["group"] == "single") & (table["method"] == "lsm_unnormalised")]
    scores = seed_means(method_rows, "reward")
    end = scores.iloc[-1]
    text = (
        f"{scores['value'].max():.3g} at its maximum, {end['value']:.3g} at step {end['step']:.0f}"
    )
    return ClaimResult(text, AGREES if end["value"] < MARGIN < scores["value"].max() else DIFFERS)


def teacher_doubt(tables: Tables) -> ClaimResult:
    """Compare 1 - max q at the last positions of the untrained student's and the teacher's text."""
    table = tables["fan"].query("method == 'sampled' and quantity == 'doubt'")
    table = table[table["first"] == table["first"].max()].set_index("source")
    teacher_text, student_text = (
        table.loc[name, ["value", "low", "high"]] for name in ("teacher", "student")
    )
    positions = table["first"].iloc[0], table["last"].iloc[0]
    description = (
        f"teacher's uncertainty 1 - max q at positions {positions[0]} to {positions[1]}: "
        f"{format_interval(*map(float, teacher_text))} on its own "
        f"text, {format_interval(*map(float, student_text))} on the student's"
    )
    higher_on_student, lower_on_student = (
        student_text["low"] > teacher_text["high"],
        student_text["high"] < teacher_text["low"],
    )
    return ClaimResult(
        description, AGREES if higher_on_student else DIFFERS if lower_on_student else UNDECIDED
    )
