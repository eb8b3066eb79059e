"""The paper's comparisons (`opd paper`) on toy models; every cell is an ordinary run folder.

The group "single" has one task and its teacher, the group "multi" two alternating tasks, each with
its own teacher; both use the mismatched models of `opd.lab.build`. The groups "games" and "agents"
train the student of `opd lab --household`: on the household game alone, and alternating with
sorting. The groups "views" and "controls" (`opd.experiments.matched`) train five students of
`opd lab --view`, a seed each. The group "pretrained" (`opd.experiments.pretrained`) trains the real
model of `opd lab --pretrained`; it takes longer than all others and runs only where it is named. A
cell is a method with a seed; run folders are ROOT/GROUP/METHOD-SEED, and the groups "games" and
"pretrained" have one more, in which the teacher is evaluated. Finished runs are kept, interrupted
ones resumed. The seed is that of prompts and sampling; but for views and controls, the models are
the same in every cell.
`opd figures` draws the comparisons from a table of these folders.
"""

import concurrent.futures
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.io.atomic import write_text
from diagnostics.io.command import parse_options
from diagnostics.records.renamed import LAB_KINDS, refuse_renamed_options
from opd.experiments.matched import MATCHED_METHODS, matched_arguments
from opd.experiments.pretrained import PRETRAINED_METHODS, TEACHER, pretrained_arguments
from opd.experiments.subcommand import run_opd
from opd.lab.configs import NUM_VIEW_STUDENTS

MASK = ("--mask", "string:<think>", "string:</think>", "token:<|im_end|>")
SAMPLED = ("--objective", "sampled_token_clipped")
NUCLEUS = ("--top-p", "0.9")
LOCAL = ("--objective", "teacher_topk", *NUCLEUS)

COLLAPSES = "--allow-collapse"
UNWEIGHTED = "--allow-unweighted"
"""The paper makes two updates with losses that use the sampled token without an importance weight.
"""
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
    **{name: (*options, *NUCLEUS) for name, options in VARIANTS.items()},
    **{f"{name}_mask": (*options, *NUCLEUS, *MASK) for name, options in VARIANTS.items()},
    "lsm_k2": (*LOCAL, "--support-k", "2"),
    "lsm_k4": (*LOCAL, "--support-k", "4"),
    "lsm_top_p_0.8": ("--objective", "teacher_topk", "--top-p", "0.8"),
}
"""Method -> its settings; K is 8 where none is given, of a vocabulary of 261."""

SHARED_SETTINGS = (
    *("--prompts-per-step", "24", "--group-size", "2", "--updates-per-batch", "2"),
    *("--max-prompt", "64", "--max-response", "192", "--support-k", "8"),
    *("--steps", "30", "--lr", "2e-4", "--warmup", "0", "--betas", "0.9", "0.999"),
    *("--eval-every", "15", "--eval-problems", "192"),
    *("--save-every", "15", "--save-batch-every", "10"),
)
"""Two optimizer steps per batch of rollouts, no warm-up, and a token mean, as in the paper."""


MULTI = ("sampled", "sampled_mask", "lsm", "lsm_mask", *VARIANTS)
GAMES = ("sampled", "lsm", "lsm_whole")
GROUPS = {"single": tuple(METHODS), "multi": MULTI, "games": GAMES, "agents": GAMES[:2]}
GROUPS |= {group: tuple(methods) for group, methods in MATCHED_METHODS.items()}
DEFAULT_GROUPS = tuple(GROUPS)
GROUPS["pretrained"] = tuple(PRETRAINED_METHODS)
"""Group to its methods. A run of the group pretrained takes many minutes of two cores."""
MISMATCHED_TASKS = """\
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
AGENT_TASKS = """\
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
LABS |= dict.fromkeys(MATCHED_METHODS, "view") | {"pretrained": "pretrained"}
ALL_METHODS = dict.fromkeys(method for methods in GROUPS.values() for method in methods)
TASK_FILES = {"multi": MISMATCHED_TASKS, "agents": AGENT_TASKS}
MULTI_TASK_STEPS = {"multi": 60, "agents": 80}
"""Steps of groups with two tasks, so that each task has as many as alone."""


def cell_arguments(group: str, seed: int, method: str, root: Path, lab: Path) -> list[Any]:
    """Return the arguments of `opd train` for a cell."""
    if group in MATCHED_METHODS:
        return matched_arguments(group, seed, method, root, lab)
    if group == "pretrained":
        return pretrained_arguments(seed, method, root, lab)
    student = lab / ("teacher" if method == TEACHER else "student")
    arguments: list[Any] = (
        ["lab", *SHARED_SETTINGS] if LABS[group] == "mismatched" else ["household"]
    )
    arguments += ["--student", student, "--teacher", lab / "teacher", "--seed", seed]
    arguments += ["--steps", 0] if method == TEACHER else METHODS[method]
    if group in TASK_FILES:
        steps, half_steps = MULTI_TASK_STEPS[group], MULTI_TASK_STEPS[group] // 2
        arguments += ["--tasks", root / f"{group}.toml"]
        arguments += ["--steps", steps, "--eval-every", half_steps, "--save-every", half_steps]
    return [*arguments, "--out", root / group / f"{method}-{seed}"]


def refuse_former_lab(kind: str, folder: Path) -> None:
    """Refuse to build toy models anew where a folder with the former default name holds them.

    Args:
        kind: Kind of the toy models.
        folder: Folder that the command uses for them.

    Raises:
        InvalidInput: `folder` is the missing default, and the former default exists.
    """
    former_names = [Path(f"lab-{name}") for name, present in LAB_KINDS.items() if present == kind]
    for former in former_names:
        if folder == Path(f"lab-{kind}") and not folder.exists() and former.exists():
            raise InvalidInput(
                f"the folder {former} of an older version is now called {folder}; add --{kind} "
                f"{former} to continue its runs, or --{kind} with another folder to build new "
                "models"
            )


@dataclass(frozen=True, kw_only=True)
class PaperOptions:
    """Train every method of the paper's comparisons."""

    groups: tuple[str, ...] = DEFAULT_GROUPS
    """groups of cells: single, multi, games, agents, views, controls; pretrained where named"""
    methods: tuple[str, ...] = tuple(ALL_METHODS)
    """methods; those that a group does not have are left out"""
    seeds: int = 5
    """number of seeds of each method"""
    jobs: int = 2
    """runs in parallel, with one thread each"""
    root: Path = Path("results/paper")
    """folder of the run folders"""
    mismatched: Path = Path("lab-mismatched")
    """folder of the toy models of single and multi, built if missing"""
    household: Path = Path("lab-household")
    """folder of the toy models of games and agents, built if missing"""
    view: Path = Path("lab-view")
    """folder of the toy models of views and controls, built if missing"""
    pretrained: Path = Path("lab-pretrained")
    """folder of the models of pretrained, built if missing"""

    def __post_init__(self) -> None:
        for option, names, known in (
            ("--groups", self.groups, GROUPS),
            ("--methods", self.methods, ALL_METHODS),
        ):
            for name in names:
                if name not in known:
                    raise InvalidInput(f"{option}: unknown {name!r}; known: {', '.join(known)}")

        matched_groups = [group for group in self.groups if group in MATCHED_METHODS]
        if matched_groups and self.seeds > NUM_VIEW_STUDENTS:
            raise InvalidInput(
                f"--seeds is {self.seeds}; {' and '.join(matched_groups)} have a student for each "
                f"seed, of which `opd lab --view` makes {NUM_VIEW_STUDENTS}; run the other groups "
                "alone (--groups)"
            )

    @property
    def labs(self) -> dict[str, Path]:
        """Kind of toy models to their folder."""
        return {
            "mismatched": self.mismatched,
            "household": self.household,
            "view": self.view,
            "pretrained": self.pretrained,
        }


def main(argv: list[str]) -> None:
    """Run `opd paper [--groups G ...] [--methods M ...] [--seeds N] [--jobs N] [--root DIR]`."""
    refuse_renamed_options(argv, LAB_KINDS, "opd paper")
    options = parse_options(PaperOptions, argv, "opd paper")
    for kind in dict.fromkeys(LABS[group] for group in options.groups):
        refuse_former_lab(kind, options.labs[kind])
    cells = [
        (group, seed, method)
        for group in options.groups
        for seed in range(options.seeds)
        for method in GROUPS[group]
        if method in options.methods
    ]
    cells += [(group, 0, TEACHER) for group in ("games", "pretrained") if group in options.groups]
    labs = {group: options.labs[LABS[group]] for group in options.groups}
    for kind in dict.fromkeys(LABS[group] for group in options.groups):
        run_opd("lab", f"--{kind}", "--out", options.labs[kind])
    options.root.mkdir(parents=True, exist_ok=True)
    for group in set(TASK_FILES) & set(labs):
        write_text(options.root / f"{group}.toml", TASK_FILES[group].format(lab=labs[group]))

    def run(cell: tuple[str, int, str]) -> None:
        run_opd("train", *cell_arguments(*cell, options.root, labs[cell[0]]), threads=1)

    failures: list[str] = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        cell_by_future = {pool.submit(run, cell): "{0}/{2}-{1}".format(*cell) for cell in cells}
        finished = concurrent.futures.as_completed(cell_by_future)
        for future in tqdm(finished, total=len(cells), desc="paper", unit="run", disable=None):
            if future.exception() is not None:
                failures.append(f"{cell_by_future[future]}: {future.exception()}")
                print(failures[-1], file=sys.stderr)
    if failures:
        raise OperationFailed(
            f"{len(failures)} of {len(cells)} runs failed; run the same command again to resume"
        )
