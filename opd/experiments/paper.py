"""`opd paper`: the paper's comparisons on models made for them, every cell an ordinary run folder.

The group "single" has one task and its teacher, the group "multi" two tasks that alternate, each
with its own, of the `strangers` of `opd.lab.build`. The groups "games" and "agents" train the agent of
`opd lab --household`: on a household in text, and on it in turns with sorting. A cell is a method with
a seed; run folders lie in ROOT/GROUP/METHOD-SEED, a finished one is kept, a killed one goes on
where it was. The seed is that of prompts and noise; the models are the same in every cell.
`opd figures` draws the comparisons from a table of these folders.
"""

import argparse
import concurrent.futures
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diagnostics.errors import OperationFailed
from diagnostics.io.atomic import write_text
from opd.experiments.subcommand import command

MASK = ("--mask", "string:<think>", "string:</think>", "token:<|im_end|>")
SAMPLED = ("--objective", "sampled_token_clipped")
NUCLEUS = ("--top-p", "0.9")
LOCAL = ("--objective", "teacher_topk", *NUCLEUS)

COLLAPSES = "--allow-collapse"
UNWEIGHTED = "--allow-unweighted"
"""The paper made two updates with losses that read the sampled token without a weight."""
VARIANTS = {
    "v2_student_and_sampled": ("--objective", "student_topk_and_sampled", UNWEIGHTED),
    "v3_teacher_and_sampled": ("--objective", "teacher_topk_and_sampled", UNWEIGHTED),
    "v4_student_tail": ("--objective", "student_topk_published_tail", COLLAPSES, UNWEIGHTED),
    "v5_teacher_tail": ("--objective", "teacher_topk_published_tail", COLLAPSES, UNWEIGHTED),
}

METHODS: dict[str, tuple[str, ...]] = {
    "sampled": SAMPLED,
    "sampled_mask": (*SAMPLED, *MASK),
    "lsm": LOCAL,
    "lsm_mask": (*LOCAL, *MASK),
    "sampled_top_p": (*SAMPLED, *NUCLEUS),
    "sampled_mask_top_p": (*SAMPLED, *MASK, *NUCLEUS),
    "lsm_whole": ("--objective", "teacher_topk"),
    "lsm_unnormalised": ("--objective", "teacher_topk_unnormalised", COLLAPSES, *NUCLEUS),
    **{name: (*how, *NUCLEUS) for name, how in VARIANTS.items()},
    **{f"{name}_mask": (*how, *NUCLEUS, *MASK) for name, how in VARIANTS.items()},
    "lsm_k2": (*LOCAL, "--support-k", "2"),
    "lsm_k4": (*LOCAL, "--support-k", "4"),
    "lsm_top_p_0.8": ("--objective", "teacher_topk", "--top-p", "0.8"),
}
"""Method to its settings; K is 8 where none is given, of a vocabulary of 261."""

SHARED = (
    *("--prompts-per-step", "24", "--group-size", "2", "--updates-per-batch", "2"),
    *("--max-prompt", "64", "--max-response", "192", "--support-k", "8"),
    *("--steps", "30", "--lr", "2e-4", "--warmup", "0", "--betas", "0.9", "0.999"),
    *("--eval-every", "15", "--eval-problems", "192"),
    *("--save-every", "15", "--save-batch-every", "10"),
)
"""Two optimizer steps on the rollouts of a step, no warm-up, and a token mean, as in the paper."""


MULTI = ("sampled", "sampled_mask", "lsm", "lsm_mask", *VARIANTS)
GAMES = ("sampled", "lsm", "lsm_whole")
GROUPS = {"single": tuple(METHODS), "multi": MULTI, "games": GAMES, "agents": GAMES[:2]}
TEACHER = "teacher"
"""Of the group games one more cell: the teacher itself, evaluated and not trained."""

STRANGERS = """\
[[tasks]]
name = "chain"
task = "lab"
teacher = "{lab}/teacher"

[[tasks]]
name = "sort"
task = "{lab}/sort.jsonl"
teacher = "{lab}/sort-teacher"
max_response = 96
"""
AGENTS = """\
[[tasks]]
name = "rooms"
task = "env:household"
teacher = "{lab}/teacher"

[[tasks]]
name = "sort"
task = "{lab}/sort.jsonl"
teacher = "{lab}/sort-teacher"
"""
LABS = {"single": "mismatched", "multi": "mismatched", "games": "household", "agents": "household"}
TASKS = {"multi": STRANGERS, "agents": AGENTS}
TWICE = {"multi": 60, "agents": 80}
"""Steps of groups of two tasks: as many of each as of one alone."""


def settings(group: str, seed: int, method: str, root: Path, lab: Path) -> list[Any]:
    """A recipe and what a cell changes of it."""
    student = lab / ("teacher" if method == TEACHER else "student")
    how: list[Any] = ["lab", *SHARED] if LABS[group] == "mismatched" else ["household"]
    how += ["--student", student, "--teacher", lab / "teacher", "--seed", seed]
    how += ["--steps", 0] if method == TEACHER else METHODS[method]
    if group in TASKS:
        steps, half = TWICE[group], TWICE[group] // 2
        how += ["--tasks", root / f"{group}.toml"]
        how += ["--steps", steps, "--eval-every", half, "--save-every", half]
    return [*how, "--out", root / group / f"{method}-{seed}"]


def main(argv: list[str]) -> None:
    """`opd paper [--groups G ...] [--methods M ...] [--seeds N] [--jobs N] [--root DIR]`."""
    parser = argparse.ArgumentParser(
        prog="opd paper", description="train every method of the paper's comparisons"
    )
    add = parser.add_argument
    add("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS), metavar="GROUP")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    add("--seeds", type=int, default=5)
    add("--jobs", type=int, default=2, help="runs side by side, one thread each")
    add("--root", type=Path, default=Path("results/paper"))
    for kind in dict.fromkeys(LABS.values()):
        default = Path(f"lab-{kind}")
        add(f"--{kind}", type=Path, default=default, help="its lab, made if it is not there")
    given = parser.parse_args(argv)
    cells = [
        (group, seed, method)
        for group in given.groups
        for seed in range(given.seeds)
        for method in GROUPS[group]
        if method in given.methods
    ]
    if "games" in given.groups:
        cells.append(("games", 0, TEACHER))
    labs = {group: getattr(given, LABS[group]) for group in given.groups}
    for kind in dict.fromkeys(LABS[group] for group in given.groups):
        command("lab", f"--{kind}", "--out", getattr(given, kind))
    given.root.mkdir(parents=True, exist_ok=True)
    for group in set(TASKS) & set(labs):
        write_text(given.root / f"{group}.toml", TASKS[group].format(lab=labs[group]))

    def run(cell: tuple[str, int, str]) -> None:
        command("train", *settings(*cell, given.root, labs[cell[0]]), threads=1)

    failed: list[str] = []
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        waiting = {pool.submit(run, cell): "{0}/{2}-{1}".format(*cell) for cell in cells}
        done = concurrent.futures.as_completed(waiting)
        for one in tqdm(done, total=len(cells), desc="paper", unit="run", disable=None):
            if one.exception() is not None:
                failed.append(f"{waiting[one]}: {one.exception()}")
                print(failed[-1], file=sys.stderr)
    if failed:
        raise OperationFailed(
            f"{len(failed)} of {len(cells)} runs failed; the same command resumes"
        )
