"""The paper's claims beside our measurements, from the recorded tables: `opd figures claims`.

A claim is what arXiv 2603.25562 says or shows; its measurement is read from a table in figures/data
when this is run, and so is the verdict: no number of ours is typed here.
"""

from dataclasses import dataclass
from pathlib import Path

from figures.claims.measures import (
    AGREES,
    DIFFERS,
    MARGIN,
    OPEN,
    UNTESTED,
    ClaimResult,
    Measure,
    Tables,
    agents,
    alike,
    below,
    better,
    doubt,
    explosion,
    gain,
    larger,
    likeness,
    looping,
    share,
    sign,
    smaller,
    special,
    study,
    toy,
    unpunished,
    untested,
    vanishing,
    widening,
)


@dataclass(frozen=True)
class Claim:
    """A claim, where the paper makes it, the figure beside it here, and how it is measured."""

    text: str
    where: str
    figure: str
    measure: Measure


THEORY = (
    Claim(
        "The token-level gradient is biased for the sequence-level one",
        "appendix D",
        "bias_variance",
        study(
            "bias_variance",
            "exact squared bias at T = 64, median world: {}; with gamma 1 it is 0 to rounding",
            lambda value, low, high: sign(low, high),
            quantity="bias2",
            estimator="plain",
            horizon=64,
            gamma=0.0,
        ),
    ),
    Claim(
        "The variance of the sequence-level gradient is O(T^4)",
        "appendix D",
        "horizon",
        study(
            "horizon",
            "an upper bound, true and not tight: T^3 is attained and never exceeded (proof in the "
            "study); exponent at T = 512 with gamma 1: {}",
            lambda value, low, high: AGREES if high < 4 else DIFFERS,
            quantity="last_slope",
            world="mixing",
            estimator="plain",
            gamma=1.0,
        ),
    ),
    Claim(
        "The variance of the token-level gradient is O(T^2)",
        "appendix D",
        "horizon",
        study(
            "horizon",
            "an upper bound; exponent at T = 512 with gamma 0: {}",
            lambda value, low, high: AGREES if high < 2 else DIFFERS,
            quantity="last_slope",
            world="mixing",
            estimator="plain",
            gamma=0.0,
        ),
    ),
    Claim(
        "Larger gamma has one to several orders more gradient variance in the toy",
        "figure 1a",
        "toy",
        toy(
            "published_ratio",
            "the published metric, gamma 1 over gamma 0, on each one's own path: {} times",
            lambda value, low, high: sign(low - 10, high - 10),
        ),
    ),
    Claim(
        "That difference is the estimators'",
        "figure 1a",
        "toy",
        toy(
            "equal_ratio",
            "at equal policies, without the metric's confound: {} times",
            lambda value, low, high: sign(low - 10, high - 10),
        ),
    ),
    Claim(
        "gamma = 0 reaches the targets in the toy",
        "figure 1b",
        "toy",
        toy(
            "distance",
            "final distance to the target (a step is 1): {}",
            lambda value, low, high: sign(1 - high, 1 - low),
            gamma=0.0,
        ),
    ),
    Claim(
        "gamma = 1 drifts away from the targets in the toy",
        "figure 1b",
        "toy",
        toy(
            "distance",
            "final distance to the target (a step is 1): {}",
            lambda value, low, high: sign(low - 1, high - 1),
        ),
    ),
)
FAILURES = (
    Claim("Most sampled tokens lie below the diagonal", "figure 2", "scatter", below),
    Claim(
        "The upward signal sits on a small set of tokens",
        "2.2",
        "scatter",
        share(
            "top 1 %, of the upward signal",
            "its largest 1 % hold {} of it (all alike would hold 0.01)",
            lambda value, low, high: sign(low - 0.1, high - 0.1),
        ),
    ),
    Claim("The teacher does not penalise a loop", "figure 3", "loop", looping),
    Claim("Loops go unpunished throughout training", "figures 3, A8", "dynamics", unpunished),
    Claim(
        "The lower tail of the gap widens with the position (sampled tokens)",
        "figure 4",
        "gap",
        widening("sampled"),
    ),
    Claim(
        "Its lower tail widens under a mask as well (ours)",
        "figure 4",
        "gap",
        widening("sampled_mask"),
    ),
    Claim(
        "The teacher is lost on the student's prefixes, more than on its own (a hypothesis there)",
        "2.2",
        "fan",
        doubt,
    ),
    Claim(
        "Another segmentation of a tag and another end give log-probabilities of -19 and -59",
        "figure 5",
        "segmentation",
        special,
    ),
    Claim(
        "Such tokens dominate the signal",
        "2.2",
        "scatter",
        share(
            "impossible, of the signal",
            "{} of the sum of |log q - log p|",
            lambda value, low, high: sign(low - 0.5, high - 0.5),
        ),
    ),
)
SINGLE = (
    Claim(
        "Sampled tokens improve the student (36.4 against 28.2)",
        "table 1",
        "comparison",
        gain("sampled", up=True),
    ),
    Claim(
        "Sampled tokens with a mask improve the student (40.7)",
        "table 1",
        "comparison",
        gain("sampled_mask", up=True),
    ),
    Claim(
        "Local support improves the student (41.7)", "table 1", "comparison", gain("lsm", up=True)
    ),
    Claim(
        "Local support with a mask improves the student (41.5)",
        "table 1",
        "comparison",
        gain("lsm_mask", up=True),
    ),
    Claim(
        "Local support beats sampled tokens, no mask (41.7 against 36.4)",
        "table 1",
        "comparison",
        better("lsm", "sampled"),
    ),
    Claim(
        "Local support beats sampled tokens, both with a mask (41.5 against 40.7)",
        "table 1",
        "comparison",
        better("lsm_mask", "sampled_mask"),
    ),
    Claim(
        "A mask of special tokens helps sampled tokens (40.7 against 36.4)",
        "table 1",
        "comparison",
        better("sampled_mask", "sampled"),
    ),
    Claim(
        "A mask is nearly neutral for local support (41.5 against 41.7)",
        "table 1",
        "comparison",
        alike("lsm_mask", "lsm"),
    ),
    Claim(
        "Local support without a mask beats sampled tokens with one (41.7 against 40.7)",
        "table 1",
        "comparison",
        better("lsm", "sampled_mask"),
    ),
    Claim(
        "Local support has the higher train score (each on its own rollouts)",
        "figure A4",
        "dynamics",
        larger("reward", "lsm", "sampled"),
    ),
)
MULTI = (
    Claim(
        "Two tasks, first: local support beats sampled tokens (41.7 against 34.8)",
        "table 2",
        "comparison",
        better("lsm", "sampled", "multi", "chain"),
    ),
    Claim(
        "Two tasks, first: so it does with masks (38.6 against 36.6)",
        "table 2",
        "comparison",
        better("lsm_mask", "sampled_mask", "multi", "chain"),
    ),
    Claim(
        "Two tasks, first: without a mask it beats them with one (41.7 against 36.6)",
        "table 2",
        "comparison",
        better("lsm", "sampled_mask", "multi", "chain"),
    ),
    Claim(
        "Two tasks, second: local support beats sampled tokens (95.3 against 90.6)",
        "table 2",
        "comparison",
        better("lsm", "sampled", "multi", "sort"),
    ),
    Claim(
        "Two tasks, second: so it does with masks (97.7 against 93.8)",
        "table 2",
        "comparison",
        better("lsm_mask", "sampled_mask", "multi", "sort"),
    ),
    Claim(
        "Two tasks, first: a mask helps sampled tokens (36.6 against 34.8)",
        "table 2",
        "comparison",
        better("sampled_mask", "sampled", "multi", "chain"),
    ),
    Claim(
        "Two tasks, second: a mask helps sampled tokens (93.8 against 90.6)",
        "table 2",
        "comparison",
        better("sampled_mask", "sampled", "multi", "sort"),
    ),
    Claim(
        "Two tasks, first: a mask costs local support (38.6 against 41.7)",
        "table 2",
        "comparison",
        better("lsm", "lsm_mask", "multi", "chain"),
    ),
    Claim(
        "Two tasks, second: a mask helps local support (97.7 against 95.3)",
        "table 2",
        "comparison",
        better("lsm_mask", "lsm", "multi", "sort"),
    ),
    Claim(
        "Two tasks, first: local support has the higher train score",
        "figure A5",
        "multitask",
        larger("reward", "lsm", "sampled", "multi", "chain"),
    ),
    Claim(
        "Two tasks, second: local support and sampled tokens end alike",
        "figure A5",
        "multitask",
        alike("lsm", "sampled", "multi", "sort"),
    ),
)
AGENTS = (
    Claim(
        "Agent and problems in turns: sampled tokens improve the agent (90.6 against 21.9)",
        "table 2",
        "agents",
        agents("sampled", group="agents"),
    ),
    Claim(
        "Agent and problems in turns: local support improves the agent (95.3 against 21.9)",
        "table 2",
        "agents",
        agents("lsm", group="agents"),
    ),
    Claim(
        "Agent and problems in turns: local support makes the better agent (95.3 against 90.6)",
        "table 2",
        "agents",
        agents("lsm", "sampled", "agents"),
    ),
    Claim(
        "Agent and problems in turns: local support improves problems (41.7 against 28.2)",
        "table 2",
        "agents",
        agents("lsm", group="agents", task="sort"),
    ),
    Claim(
        "Agent and problems in turns: local support beats sampled tokens on problems (41.7 against "
        "34.8)",
        "table 2",
        "agents",
        agents("lsm", "sampled", "agents", "sort"),
    ),
)
DYNAMICS = (
    Claim(
        "Local support has the smaller gradient norm",
        "figure A6a",
        "dynamics",
        smaller("grad_norm", "lsm", "sampled"),
    ),
    Claim(
        "Two tasks, first: local support has the smaller gradient norm",
        "figure A6b",
        "multitask",
        smaller("grad_norm", "lsm", "sampled", "multi", "chain"),
    ),
    Claim(
        "Two tasks, second: local support has the smaller gradient norm",
        "figure A6b",
        "multitask",
        smaller("grad_norm", "lsm", "sampled", "multi", "sort"),
    ),
    Claim(
        "The entropy of local support stays sufficient",
        "figure A6a",
        "dynamics",
        untested("what suffices is not said; the curves are in the figure"),
    ),
    Claim(
        "Local support has fewer responses cut at the budget",
        "figure A6c",
        "dynamics",
        smaller("truncated", "lsm", "sampled"),
    ),
    Claim(
        "Local support has shorter responses",
        "figure A6c",
        "dynamics",
        smaller("length", "lsm", "sampled"),
    ),
    Claim(
        "The mask lowers the share of cut responses of sampled tokens",
        "figure A6c",
        "dynamics",
        smaller("truncated", "sampled_mask", "sampled"),
    ),
    Claim(
        "The mask hardly changes the share of cut responses of local support",
        "figure A6c",
        "dynamics",
        smaller("truncated", "lsm_mask", "lsm", verdict=likeness),
    ),
    Claim(
        "Local support ends nearer to the teacher on sampled tokens (mean gap)",
        "figure A6d",
        "dynamics",
        smaller("cost", "lsm", "sampled"),
    ),
    Claim(
        "Local support ends nearer to it where both are masked (ours)",
        "figure A6d",
        "dynamics",
        smaller("cost", "lsm_mask", "sampled_mask"),
    ),
    Claim(
        "Two tasks, first: local support has the smaller mean gap",
        "figure A6d",
        "multitask",
        smaller("cost", "lsm", "sampled", "multi", "chain"),
    ),
    Claim(
        "Two tasks, second: local support has the smaller mean gap",
        "figure A6d",
        "multitask",
        smaller("cost", "lsm", "sampled", "multi", "sort"),
    ),
)
ABLATIONS = (
    Claim(
        "Nucleus rollouts help sampled tokens (21.6 against 20.4)",
        "table 3",
        "comparison",
        better("sampled_top_p", "sampled"),
    ),
    Claim(
        "Nucleus rollouts help sampled tokens with a mask, which keeps them from 0 (ours)",
        "table 3",
        "comparison",
        better("sampled_mask_top_p", "sampled_mask"),
    ),
    Claim(
        "Nucleus rollouts help local support (23.6 against 17.7)",
        "table 3",
        "comparison",
        better("lsm", "lsm_whole"),
    ),
    Claim(
        "In the nucleus local support beats sampled tokens (23.6 against 21.6)",
        "table 3",
        "comparison",
        better("lsm", "sampled_top_p"),
    ),
    Claim(
        "In the nucleus it beats them with masks on both (ours)",
        "table 3",
        "comparison",
        better("lsm_mask", "sampled_mask_top_p"),
    ),
    Claim(
        "At top-p 1 local support falls behind sampled tokens (17.7 against 20.4)",
        "table 3",
        "comparison",
        better("sampled", "lsm_whole"),
    ),
    Claim("Without renormalisation the entropy explodes", "figure 6a", "ablations", explosion),
    Claim(
        "Without renormalisation the train score falls to 0 within 30 steps",
        "figure 6a",
        "ablations",
        vanishing,
    ),
    Claim(
        "Without renormalisation the student ends behind",
        "figure 6a",
        "ablations",
        better("lsm", "lsm_unnormalised"),
    ),
    Claim(
        "A small K is worse (16 against 32; here 2 against 8)",
        "figure 6b",
        "ablations",
        better("lsm", "lsm_k2"),
    ),
    Claim(
        "A small K leaves more entropy",
        "figure 6b",
        "ablations",
        smaller("entropy", "lsm", "lsm_k2"),
    ),
    Claim(
        "A moderate K is as good as a large one (32 against 48; here 4 against 8)",
        "figure 6b",
        "ablations",
        alike("lsm", "lsm_k4"),
    ),
    Claim(
        "Rollouts at top-p 1 leave more entropy than at 0.9",
        "figure 6c",
        "ablations",
        smaller("entropy", "lsm", "lsm_whole"),
    ),
    Claim("top-p 0.8 is as good as 0.9", "figure 6c", "ablations", alike("lsm", "lsm_top_p_0.8")),
)
VARIANTS = (
    Claim(
        "V2 is as good as V1 on one task (41.9 against 41.7)",
        "table 4",
        "comparison",
        alike("v2_student_and_sampled", "lsm"),
    ),
    Claim(
        "V3 is as good as V1 (42.9)",
        "table 4",
        "comparison",
        alike("v3_teacher_and_sampled", "lsm"),
    ),
    Claim("V4 is as good as V1 (41.2)", "table 4", "comparison", alike("v4_student_tail", "lsm")),
    Claim("V5 falls behind V1 (38.1)", "table 4", "comparison", better("lsm", "v5_teacher_tail")),
    *(
        Claim(
            f"Two tasks, first: {name} falls behind V1 ({score} against 41.7)",
            "table 4b",
            "comparison",
            better("lsm", method, "multi", "chain"),
        )
        for name, method, score in (
            ("V2", "v2_student_and_sampled", 28.4),
            ("V3", "v3_teacher_and_sampled", 26.9),
            ("V4", "v4_student_tail", 36.2),
            ("V5", "v5_teacher_tail", 33.7),
        )
    ),
    Claim(
        "Two tasks, first: V3 falls behind the untrained student (26.9 against 28.2, unexplained)",
        "table 4b",
        "comparison",
        gain("v3_teacher_and_sampled", False, "multi", "chain"),
    ),
    *(
        Claim(
            f"Two tasks, second: {name} is as good as V1 ({score} against 95.3)",
            "table 4b",
            "comparison",
            alike(method, "lsm", "multi", "sort"),
        )
        for name, method, score in (
            ("V2", "v2_student_and_sampled", 95.3),
            ("V3", "v3_teacher_and_sampled", 94.5),
            ("V4", "v4_student_tail", 93.8),
            ("V5", "v5_teacher_tail", 96.1),
        )
    ),
    Claim(
        "What V3 lacks is the mask: the sampled special token comes back into the support (ours)",
        "",
        "comparison",
        better("v3_teacher_and_sampled_mask", "v3_teacher_and_sampled"),
    ),
    Claim(
        "A mask of sampled tokens does not mask the student's top-K: V2 with a mask stays behind "
        "V1 with one (ours)",
        "",
        "comparison",
        better("lsm_mask", "v2_student_and_sampled_mask"),
    ),
    Claim(
        "V4 and V5 are unbiased for the full reverse KL",
        "appendix G.3",
        "",
        lambda _: ClaimResult(
            "not their gradient, which does not vanish at the teacher: `pytest "
            "tests/opd/objectives/test_surrogates.py -k published_tail`",
            DIFFERS,
        ),
    ),
)
OUT_OF_REACH = (
    Claim(
        "Scores of 7B students on MATH500, AIME, Minerva, OlympiadBench, ALFWorld",
        "tables 1 to 4",
        "",
        untested("no such models, data or machines; `opd train paper-math` has the settings"),
    ),
    Claim(
        "On WebShop local support beats sampled tokens (57.8 against 50.0)",
        "table A2",
        "",
        untested("no WebShop here"),
    ),
    Claim(
        "Teachers lost on filler words, endless checks and gibberish late in training",
        "figures A7 to A9",
        "",
        untested("the models here have no words; `opd report RUN` shows rollouts token by token"),
    ),
)
CLAIMS: tuple[Claim, ...] = (
    *(
        *THEORY,
        *FAILURES,
        *SINGLE,
        *MULTI,
        *AGENTS,
        *DYNAMICS,
        *ABLATIONS,
        *VARIANTS,
        *OUT_OF_REACH,
    ),
)


def findings(folder: Path) -> list[tuple[Claim, ClaimResult]]:
    """Every claim with what the tables of a folder say of it."""
    tables = Tables(folder)
    return [(claim, claim.measure(tables)) for claim in CLAIMS]


def written(folder: Path) -> str:
    """docs/claims.md: a table of all claims, and how often they agree."""
    from figures.registry import made_by

    found = findings(folder)
    counts = {v: sum(f.verdict == v for _, f in found) for v in (AGREES, DIFFERS, OPEN, UNTESTED)}
    lines = [
        "# The paper's claims and our measurements",
        "",
        "Generated by `opd figures claims` from the recorded tables. Brackets: 95 % intervals. "
        "A claim of a difference agrees or differs where its interval leaves out 0, one of "
        f"likeness where it lies within or beyond {MARGIN:g}, and is undecided elsewhere. "
        "Models and tasks are those of `opd lab --mismatched` and, of agents, of `opd lab --household` "
        "(`opd paper` trains them), or the exact study: a claim that agrees holds there, and one "
        "that differs is not refuted for the paper's models. Numbers in parentheses are the "
        "paper's, in percent. Of two tasks the "
        "first is the one whose teacher writes otherwise (chain here, mathematics there), the "
        "second the other one (sort, ALFWorld). Intervals are not widened for their number: some "
        "leave out 0 by chance. `opd figures` draws what `opd paper` recorded.",
        "",
        ", ".join(f"{verdict}: {n}" for verdict, n in counts.items()) + ".",
        "",
        "| claim | in the paper | measured here | verdict | figure | made by |",
        "|---|---|---|---|---|---|",
    ]
    for claim, finding in found:
        name = claim.figure
        link = f"[{name}](../figures/shown/{name}.png)" if name else ""
        made = f"`{made_by(name)[0]}`" if name else ""
        cells = (claim.text, claim.where, finding.measured, finding.verdict, link, made)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
