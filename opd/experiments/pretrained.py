"""Cells of `opd paper` on the models of `opd lab --pretrained`: one real model, taught twice.

Student and teacher are SmolLM2-135M-Instruct after few and after many steps of the same lessons.
Both methods of the paper's main comparison train the student on its own responses, the sampled
token also for twice as many steps, since its gradient is noisier. The seed is that of prompts and
sampling; the models are the same in every cell. Runs are evaluated on the problems of test.jsonl,
before and after; the learning rate was chosen with those of validation.jsonl
(docs/pretrained-pair.md).
"""

from pathlib import Path
from typing import Any

from opd.lab.pretrained.pair import DEFAULT_TEACHING

TEACHER = "teacher"
"""An additional cell: the teacher itself, evaluated and not trained."""
PRETRAINED_METHODS: dict[str, tuple[str, ...]] = {
    "sampled_token": ("--objective", "sampled_token"),
    "sampled_token_long": ("--objective", "sampled_token", "--steps", "48", "--eval-every", "24"),
    "teacher_topk": ("--objective", "teacher_topk"),
}
"""Method of the group "pretrained" to its settings."""
NUM_TEST_PROBLEMS = 160
"""Problems of test.jsonl on which a run is evaluated, greedily."""
SHARED_SETTINGS = (
    *("pair", "--student", "{lab}/student", "--teacher", "{lab}/teacher"),
    *("--task", "{lab}/train.jsonl", "--eval-task", "{lab}/test.jsonl"),
    *("--eval-problems", str(NUM_TEST_PROBLEMS), "--eval-temperature", "0"),
    *("--max-prompt", str(DEFAULT_TEACHING.max_prompt)),
    *("--max-response", str(DEFAULT_TEACHING.max_response)),
    *("--prompts-per-step", "16", "--group-size", "1", "--support-k", "16"),
    *("--steps", "24", "--lr", "1e-4", "--warmup", "2", "--dtype", "bfloat16", "--device", "cpu"),
    *("--eval-every", "0", "--save-every", "6", "--save-batch-every", "8"),
    *("--rescore-every", "0", "--full-metrics-every", "4"),
)


def pretrained_arguments(seed: int, method: str, root: Path, lab: Path) -> list[Any]:
    """Return the arguments of `opd train` for a cell.

    Args:
        seed: Seed of prompts and sampling.
        method: Method of PRETRAINED_METHODS, or TEACHER.
        root: Folder of the run folders.
        lab: Folder of the models of `opd lab --pretrained`.

    Returns:
        The arguments.
    """
    changes = (
        ("--student", "{lab}/teacher", "--steps", "0")
        if method == TEACHER
        else PRETRAINED_METHODS[method]
    )
    settings = [word.format(lab=lab) for word in (*SHARED_SETTINGS, *changes)]
    return [*settings, "--seed", seed, "--out", root / "pretrained" / f"{method}-{seed}"]
