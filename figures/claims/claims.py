"""The paper's claims and the recorded measurements that test them: `opd figures claims`.

Each claim quotes or paraphrases arXiv 2603.25562. Its measurement and verdict are computed from
the tables in figures/data when the command runs; none of our numbers is written here.
"""

from dataclasses import dataclass
from pathlib import Path

from figures.claims.measures import (
    AGREES,
    DIFFERS,
    MARGIN,
    NOT_TESTABLE,
    UNDECIDED,
    ClaimResult,
    Measure,
    Tables,
    accuracy_change,
    below_diagonal,
    entropy_grows,
    equal_accuracy,
    gap_tail_widens,
    higher_accuracy,
    larger_mean,
    loop_not_penalized,
    more_games_won,
    not_testable,
    repeated_tokens_cost_less,
    score_vanishes,
    smaller_mean,
    special_token_logps,
    study_value,
    teacher_doubt,
    token_share,
    toy_value,
    verdict_equal,
    verdict_positive,
)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and how it is measured."""

    text: str
    """What the paper says, with its numbers in percent."""
    location: str
    """Section, figure or table of the paper."""
    figure: str
    """Name of the figure of this project; empty if there is none."""
    measure: Measure
    """Computes the measurement and its verdict from the recorded tables."""


THEORY = (
    Claim(
        "The token-level gradient is biased for the sequence-level one",
        "appendix D",
        "bias_variance",
        study_value(
            "bias_variance",
            "exact squared bias at T = 64, median world: {}; with gamma 1 it is 0 up to rounding",
            lambda value, low, high: verdict_positive(low, high),
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
        study_value(
            "horizon",
            "a valid upper bound, not tight: T^3 is attained and never exceeded (proof in the "
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
        study_value(
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
        toy_value(
            "published_ratio",
            "the published metric, gamma 1 over gamma 0, each at its own policies: {} times",
            lambda value, low, high: verdict_positive(low - 10, high - 10),
        ),
    ),
    Claim(
        "The difference is due to the estimators",
        "figure 1a",
        "toy",
        toy_value(
            "equal_ratio",
            "at equal policies, without the metric's confound: {} times",
            lambda value, low, high: verdict_positive(low - 10, high - 10),
        ),
    ),
    Claim(
        "gamma = 0 reaches the targets in the toy",
        "figure 1b",
        "toy",
        toy_value(
            "distance",
            "final distance to the target (a step is 1): {}",
            lambda value, low, high: verdict_positive(1 - high, 1 - low),
            gamma=0.0,
        ),
    ),
    Claim(
        "gamma = 1 drifts away from the targets in the toy",
        "figure 1b",
        "toy",
        toy_value(
            "distance",
            "final distance to the target (a step is 1): {}",
            lambda value, low, high: verdict_positive(low - 1, high - 1),
        ),
    ),
)
FAILURES = (
    Claim("Most sampled tokens lie below the diagonal", "figure 2", "scatter", below_diagonal),
    Claim(
        "The upward signal is concentrated on a small set of tokens",
        "2.2",
        "scatter",
        token_share(
            "top 1 %, of the upward signal",
            "the largest 1 % of the tokens have {} of it (0.01 if all were equal)",
            lambda value, low, high: verdict_positive(low - 0.1, high - 0.1),
        ),
    ),
    Claim("The teacher does not penalise a loop", "figure 3", "loop", loop_not_penalized),
    Claim(
        "Loops are not penalised throughout training",
        "figures 3, A8",
        "dynamics",
        repeated_tokens_cost_less,
    ),
    Claim(
        "The lower tail of the gap widens with the position (sampled tokens)",
        "figure 4",
        "gap",
        gap_tail_widens("sampled"),
    ),
    Claim(
        "The lower tail widens with a mask as well (our claim)",
        "figure 4",
        "gap",
        gap_tail_widens("sampled_mask"),
    ),
    Claim(
        "The teacher is less certain on the student's prefixes than on its own (there a "
        "hypothesis)",
        "2.2",
        "fan",
        teacher_doubt,
    ),
    Claim(
        "Another tokenization of a tag and another EOS have log-probabilities of -19 and -59",
        "figure 5",
        "segmentation",
        special_token_logps,
    ),
    Claim(
        "Such mismatched tokens dominate the signal",
        "2.2",
        "scatter",
        token_share(
            "impossible, of the signal",
            "{} of the sum of |log q - log p|",
            lambda value, low, high: verdict_positive(low - 0.5, high - 0.5),
        ),
    ),
)
SINGLE = (
    Claim(
        "Sampled tokens improve the student (36.4 against 28.2)",
        "table 1",
        "comparison",
        accuracy_change("sampled", improves=True),
    ),
    Claim(
        "Sampled tokens with a mask improve the student (40.7)",
        "table 1",
        "comparison",
        accuracy_change("sampled_mask", improves=True),
    ),
    Claim(
        "Local support improves the student (41.7)",
        "table 1",
        "comparison",
        accuracy_change("lsm", improves=True),
    ),
    Claim(
        "Local support with a mask improves the student (41.5)",
        "table 1",
        "comparison",
        accuracy_change("lsm_mask", improves=True),
    ),
    Claim(
        "Local support beats sampled tokens, no mask (41.7 against 36.4)",
        "table 1",
        "comparison",
        higher_accuracy("lsm", "sampled"),
    ),
    Claim(
        "Local support beats sampled tokens, both with a mask (41.5 against 40.7)",
        "table 1",
        "comparison",
        higher_accuracy("lsm_mask", "sampled_mask"),
    ),
    Claim(
        "A mask of special tokens helps sampled tokens (40.7 against 36.4)",
        "table 1",
        "comparison",
        higher_accuracy("sampled_mask", "sampled"),
    ),
    Claim(
        "A mask is nearly neutral for local support (41.5 against 41.7)",
        "table 1",
        "comparison",
        equal_accuracy("lsm_mask", "lsm"),
    ),
    Claim(
        "Local support without a mask beats sampled tokens with one (41.7 against 40.7)",
        "table 1",
        "comparison",
        higher_accuracy("lsm", "sampled_mask"),
    ),
    Claim(
        "Local support has the higher train score (each on its own rollouts)",
        "figure A4",
        "dynamics",
        larger_mean("reward", "lsm", "sampled"),
    ),
)
MULTI = (
    Claim(
        "Two tasks, first: local support beats sampled tokens (41.7 against 34.8)",
        "table 2",
        "comparison",
        higher_accuracy("lsm", "sampled", "multi", "chain"),
    ),
    Claim(
        "Two tasks, first: local support beats sampled tokens, both with a mask (38.6 against "
        "36.6)",
        "table 2",
        "comparison",
        higher_accuracy("lsm_mask", "sampled_mask", "multi", "chain"),
    ),
    Claim(
        "Two tasks, first: local support without a mask beats sampled tokens with one (41.7 "
        "against "
        "36.6)",
        "table 2",
        "comparison",
        higher_accuracy("lsm", "sampled_mask", "multi", "chain"),
    ),
    Claim(
        "Two tasks, second: local support beats sampled tokens (95.3 against 90.6)",
        "table 2",
        "comparison",
        higher_accuracy("lsm", "sampled", "multi", "sort"),
    ),
    Claim(
        "Two tasks, second: local support beats sampled tokens, both with a mask (97.7 against "
        "93.8)",
        "table 2",
        "comparison",
        higher_accuracy("lsm_mask", "sampled_mask", "multi", "sort"),
    ),
    Claim(
        "Two tasks, first: a mask helps sampled tokens (36.6 against 34.8)",
        "table 2",
        "comparison",
        higher_accuracy("sampled_mask", "sampled", "multi", "chain"),
    ),
    Claim(
        "Two tasks, second: a mask helps sampled tokens (93.8 against 90.6)",
        "table 2",
        "comparison",
        higher_accuracy("sampled_mask", "sampled", "multi", "sort"),
    ),
    Claim(
        "Two tasks, first: a mask hurts local support (38.6 against 41.7)",
        "table 2",
        "comparison",
        higher_accuracy("lsm", "lsm_mask", "multi", "chain"),
    ),
    Claim(
        "Two tasks, second: a mask helps local support (97.7 against 95.3)",
        "table 2",
        "comparison",
        higher_accuracy("lsm_mask", "lsm", "multi", "sort"),
    ),
    Claim(
        "Two tasks, first: local support has the higher train score",
        "figure A5",
        "multitask",
        larger_mean("reward", "lsm", "sampled", "multi", "chain"),
    ),
    Claim(
        "Two tasks, second: local support and sampled tokens end with equal accuracy",
        "figure A5",
        "multitask",
        equal_accuracy("lsm", "sampled", "multi", "sort"),
    ),
)
AGENTS = (
    Claim(
        "Agent and problems alternating: sampled tokens improve the agent (90.6 against 21.9)",
        "table 2",
        "agents",
        more_games_won("sampled", group="agents"),
    ),
    Claim(
        "Agent and problems alternating: local support improves the agent (95.3 against 21.9)",
        "table 2",
        "agents",
        more_games_won("lsm", group="agents"),
    ),
    Claim(
        "Agent and problems alternating: local support gives the better agent (95.3 against 90.6)",
        "table 2",
        "agents",
        more_games_won("lsm", "sampled", "agents"),
    ),
    Claim(
        "Agent and problems alternating: local support improves problems (41.7 against 28.2)",
        "table 2",
        "agents",
        more_games_won("lsm", group="agents", task="sort"),
    ),
    Claim(
        "Agent and problems alternating: local support beats sampled tokens on problems (41.7 "
        "against "
        "34.8)",
        "table 2",
        "agents",
        more_games_won("lsm", "sampled", "agents", "sort"),
    ),
)
DYNAMICS = (
    Claim(
        "Local support has the smaller gradient norm",
        "figure A6a",
        "dynamics",
        smaller_mean("grad_norm", "lsm", "sampled"),
    ),
    Claim(
        "Two tasks, first: local support has the smaller gradient norm",
        "figure A6b",
        "multitask",
        smaller_mean("grad_norm", "lsm", "sampled", "multi", "chain"),
    ),
    Claim(
        "Two tasks, second: local support has the smaller gradient norm",
        "figure A6b",
        "multitask",
        smaller_mean("grad_norm", "lsm", "sampled", "multi", "sort"),
    ),
    Claim(
        "The entropy of local support stays sufficient",
        "figure A6a",
        "dynamics",
        not_testable("the paper does not say what is sufficient; the figure has the curves"),
    ),
    Claim(
        "Local support has fewer truncated responses",
        "figure A6c",
        "dynamics",
        smaller_mean("truncated", "lsm", "sampled"),
    ),
    Claim(
        "Local support has shorter responses",
        "figure A6c",
        "dynamics",
        smaller_mean("length", "lsm", "sampled"),
    ),
    Claim(
        "The mask lowers the share of truncated responses of sampled tokens",
        "figure A6c",
        "dynamics",
        smaller_mean("truncated", "sampled_mask", "sampled"),
    ),
    Claim(
        "The mask hardly changes the share of truncated responses of local support",
        "figure A6c",
        "dynamics",
        smaller_mean("truncated", "lsm_mask", "lsm", verdict=verdict_equal),
    ),
    Claim(
        "Local support ends closer to the teacher on sampled tokens (mean gap)",
        "figure A6d",
        "dynamics",
        smaller_mean("cost", "lsm", "sampled"),
    ),
    Claim(
        "Local support ends closer to the teacher, both with a mask (our claim)",
        "figure A6d",
        "dynamics",
        smaller_mean("cost", "lsm_mask", "sampled_mask"),
    ),
    Claim(
        "Two tasks, first: local support has the smaller mean gap",
        "figure A6d",
        "multitask",
        smaller_mean("cost", "lsm", "sampled", "multi", "chain"),
    ),
    Claim(
        "Two tasks, second: local support has the smaller mean gap",
        "figure A6d",
        "multitask",
        smaller_mean("cost", "lsm", "sampled", "multi", "sort"),
    ),
)
ABLATIONS = (
    Claim(
        "Nucleus rollouts help sampled tokens (21.6 against 20.4)",
        "table 3",
        "comparison",
        higher_accuracy("sampled_top_p", "sampled"),
    ),
    Claim(
        "Nucleus rollouts help sampled tokens with a mask, which prevents a fall to 0 (our claim)",
        "table 3",
        "comparison",
        higher_accuracy("sampled_mask_top_p", "sampled_mask"),
    ),
    Claim(
        "Nucleus rollouts help local support (23.6 against 17.7)",
        "table 3",
        "comparison",
        higher_accuracy("lsm", "lsm_whole"),
    ),
    Claim(
        "With nucleus rollouts local support beats sampled tokens (23.6 against 21.6)",
        "table 3",
        "comparison",
        higher_accuracy("lsm", "sampled_top_p"),
    ),
    Claim(
        "With nucleus rollouts local support beats sampled tokens, both with a mask (our claim)",
        "table 3",
        "comparison",
        higher_accuracy("lsm_mask", "sampled_mask_top_p"),
    ),
    Claim(
        "At top-p 1 local support falls behind sampled tokens (17.7 against 20.4)",
        "table 3",
        "comparison",
        higher_accuracy("sampled", "lsm_whole"),
    ),
    Claim("Without renormalisation the entropy explodes", "figure 6a", "ablations", entropy_grows),
    Claim(
        "Without renormalisation the train score falls to 0 within 30 steps",
        "figure 6a",
        "ablations",
        score_vanishes,
    ),
    Claim(
        "Without renormalisation the student ends with a lower accuracy",
        "figure 6a",
        "ablations",
        higher_accuracy("lsm", "lsm_unnormalised"),
    ),
    Claim(
        "A small K is worse (16 against 32; here 2 against 8)",
        "figure 6b",
        "ablations",
        higher_accuracy("lsm", "lsm_k2"),
    ),
    Claim(
        "A small K leaves more entropy",
        "figure 6b",
        "ablations",
        smaller_mean("entropy", "lsm", "lsm_k2"),
    ),
    Claim(
        "A moderate K is as good as a large one (32 against 48; here 4 against 8)",
        "figure 6b",
        "ablations",
        equal_accuracy("lsm", "lsm_k4"),
    ),
    Claim(
        "Rollouts at top-p 1 leave more entropy than at 0.9",
        "figure 6c",
        "ablations",
        smaller_mean("entropy", "lsm", "lsm_whole"),
    ),
    Claim(
        "top-p 0.8 is as good as 0.9",
        "figure 6c",
        "ablations",
        equal_accuracy("lsm", "lsm_top_p_0.8"),
    ),
)
VARIANTS = (
    Claim(
        "V2 is as good as V1 on one task (41.9 against 41.7)",
        "table 4",
        "comparison",
        equal_accuracy("v2_student_and_sampled", "lsm"),
    ),
    Claim(
        "V3 is as good as V1 (42.9)",
        "table 4",
        "comparison",
        equal_accuracy("v3_teacher_and_sampled", "lsm"),
    ),
    Claim(
        "V4 is as good as V1 (41.2)",
        "table 4",
        "comparison",
        equal_accuracy("v4_student_tail", "lsm"),
    ),
    Claim(
        "V5 falls behind V1 (38.1)",
        "table 4",
        "comparison",
        higher_accuracy("lsm", "v5_teacher_tail"),
    ),
    *(
        Claim(
            f"Two tasks, first: {name} falls behind V1 ({score} against 41.7)",
            "table 4b",
            "comparison",
            higher_accuracy("lsm", method, "multi", "chain"),
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
        accuracy_change("v3_teacher_and_sampled", False, "multi", "chain"),
    ),
    *(
        Claim(
            f"Two tasks, second: {name} is as good as V1 ({score} against 95.3)",
            "table 4b",
            "comparison",
            equal_accuracy(method, "lsm", "multi", "sort"),
        )
        for name, method, score in (
            ("V2", "v2_student_and_sampled", 95.3),
            ("V3", "v3_teacher_and_sampled", 94.5),
            ("V4", "v4_student_tail", 93.8),
            ("V5", "v5_teacher_tail", 96.1),
        )
    ),
    Claim(
        "V3 fails for lack of a mask: the sampled special token re-enters the support (our claim)",
        "",
        "comparison",
        higher_accuracy("v3_teacher_and_sampled_mask", "v3_teacher_and_sampled"),
    ),
    Claim(
        "A mask of sampled tokens does not mask the student's top-K: V2 with a mask stays below "
        "V1 with a mask (our claim)",
        "",
        "comparison",
        higher_accuracy("lsm_mask", "v2_student_and_sampled_mask"),
    ),
    Claim(
        "V4 and V5 are unbiased for the full reverse KL",
        "appendix G.3",
        "",
        lambda _: ClaimResult(
            "their gradient is biased: it does not vanish where student and teacher are equal: "
            "`pytest "
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
        not_testable(
            "models, data and hardware not available; `opd train paper-math` has the settings"
        ),
    ),
    Claim(
        "On WebShop local support beats sampled tokens (57.8 against 50.0)",
        "table A2",
        "",
        not_testable("WebShop is not available"),
    ),
    Claim(
        "Teachers lost on filler words, endless checks and gibberish late in training",
        "figures A7 to A9",
        "",
        not_testable(
            "these toy models do not write natural language; `opd report RUN` shows rollouts by "
            "token"
        ),
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


def evaluate_claims(folder: Path) -> list[tuple[Claim, ClaimResult]]:
    """Measure every claim from the tables of a folder.

    Args:
        folder: Folder of the recorded tables.

    Returns:
        Every claim with its measurement and verdict.
    """
    tables = Tables(folder)
    return [(claim, claim.measure(tables)) for claim in CLAIMS]


def render_markdown(folder: Path) -> str:
    """Render docs/claims.md: a table of all claims, and how many have each verdict.

    Args:
        folder: Folder of the recorded tables.

    Returns:
        Markdown text.
    """
    from figures.registry import commands_for_table

    results = evaluate_claims(folder)
    counts = {
        v: sum(f.verdict == v for _, f in results)
        for v in (AGREES, DIFFERS, UNDECIDED, NOT_TESTABLE)
    }
    lines = [
        "# The paper's claims and our measurements",
        "",
        "Generated by `opd figures claims` from the recorded tables. Brackets: 95 % intervals. "
        "The claim of a difference agrees or differs if its interval excludes 0, the claim of "
        f"equality if its interval lies inside or outside ±{MARGIN:g}; otherwise it is undecided. "
        "Models and tasks are those of `opd lab --mismatched` and, for agents, of "
        "`opd lab --household` (trained by `opd paper`), or those of the exact study. A claim that "
        "agrees holds for these models; one that differs is not refuted for the paper's models. "
        "Numbers in parentheses are the paper's, in percent. With two tasks, the first is the one "
        "whose teacher uses other tags and EOS (chain here, mathematics in the paper), the second "
        "the other one (sort, ALFWorld). Intervals are not corrected for the number of claims: "
        "some exclude 0 by chance. `opd figures` draws what `opd paper` recorded.",
        "",
        ", ".join(f"{verdict}: {n}" for verdict, n in counts.items()) + ".",
        "",
        "| claim | in the paper | measured here | verdict | figure | command |",
        "|---|---|---|---|---|---|",
    ]
    for claim, result in results:
        name = claim.figure
        link = f"[{name}](../figures/shown/{name}.png)" if name else ""
        command = f"`{commands_for_table(name)[0]}`" if name else ""
        cells = (claim.text, claim.location, result.measurement, result.verdict, link, command)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
