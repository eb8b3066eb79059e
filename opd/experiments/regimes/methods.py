"""Methods of the map, and the settings of their runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.config.problems import check_settings
from opd.config.recipes import pair as pair_recipe
from opd.config.settings import Config, with_settings
from opd.lab.pair_tokenizer import TAG

SECOND_END = "<|endoftext|>"
"""The end token that only the student writes."""
SAMPLED = {"objective": "sampled_token_clipped"}
NUCLEUS = {"top_p": 0.9}
LOCAL = {"objective": "teacher_topk", **NUCLEUS}
VARIANT = {**NUCLEUS, "allow_unweighted": True}
"""The paper takes two updates without weights with losses that read the sampled token."""
TAIL = {**VARIANT, "allow_collapse": True}
GIVEN = {"prefixes": "dataset", "prompts_per_step": 32, "group_size": 1}
MASKED = frozenset({"sampled_mask", "lsm_mask"})
"""Methods whose loss leaves out the foreign tokens of a pair (`mask_rules`)."""

METHODS: dict[str, dict[str, Any]] = {
    "sampled": SAMPLED,
    "sampled_mask": SAMPLED,
    "lsm": LOCAL,
    "lsm_mask": LOCAL,
    "full_kl": {"objective": "full_reverse_kl"},
    "sft": {**GIVEN, "teacher": "none", "objective": "negative_log_likelihood"},
    "offline_kl": {**GIVEN, "objective": "full_forward_kl"},
    "lsm_whole": {"objective": "teacher_topk"},
    "sampled_top_p": {**SAMPLED, **NUCLEUS},
    "sampled_gamma_0.5": {**SAMPLED, "gamma": 0.5},
    "sampled_gamma_0.5_baseline": {**SAMPLED, "gamma": 0.5, "baseline": "leave_one_out"},
    "sampled_gamma_1": {**SAMPLED, "gamma": 1.0},
    "sampled_gamma_1_baseline": {**SAMPLED, "gamma": 1.0, "baseline": "leave_one_out"},
    "sampled_reward": {**SAMPLED, "reward_weight": 1.0},
    "v2_student_and_sampled": {**VARIANT, "objective": "student_topk_and_sampled"},
    "v3_teacher_and_sampled": {**VARIANT, "objective": "teacher_topk_and_sampled"},
    "v4_student_tail": {**TAIL, "objective": "student_topk_published_tail"},
    "v5_teacher_tail": {**TAIL, "objective": "teacher_topk_published_tail"},
}
"""Method to the settings that distinguish it."""
CORE_METHODS = ("sampled", "sampled_mask", "lsm", "lsm_mask", "full_kl", "sft")
"""Methods that are run in most regimes."""

SHARED_SETTINGS: dict[str, Any] = {
    **{"prompts_per_step": 16, "group_size": 2, "updates_per_batch": 2, "support_k": 8},
    **{"betas": (0.9, 0.95), "eval_problems": 200, "save_every": 0, "save_batch_every": 0},
}
"""Settings of all runs: 32 responses a step in two updates, as in the paper a batch is for two."""
LEARNING_RATE = 3e-4
"""Learning rate of methods that LEARNING_RATES lacks."""
LEARNING_RATES = {"sft": 1e-3, "offline_kl": 1e-3}
"""Learning rates that differ, chosen on the validation problems of other pairs (`--split`)."""
EVALUATIONS = 3
"""Evaluations of a run after the first."""


@dataclass(frozen=True)
class RunSettings:
    """Settings that all runs of a map share."""

    split: str = "test"
    """Problems of the evaluations, "test" or "validation"."""
    steps: int = 30
    """Training steps."""
    lr: float | None = None
    """Learning rate of all methods; None for that of each."""


def learning_rate(method: str) -> float:
    """Return the learning rate of a method."""
    return LEARNING_RATES.get(method, LEARNING_RATE)


def train_config(
    method: str,
    pair: Path,
    record: Mapping[str, Any],
    seed: int,
    settings: RunSettings,
    out: Path,
) -> Config:
    """Return the configuration of a run of the map.

    Args:
        method: One of METHODS.
        pair: Folder of a pair of `opd lab --family`.
        record: Its pair.json.
        seed: Seed of prompts and sampling.
        settings: Settings of the map.
        out: Run folder.

    Returns:
        The configuration.

    Raises:
        InvalidInput: A setting is out of range.
    """
    common = {
        **SHARED_SETTINGS,
        "student": str(pair / "student"),
        "teacher": str(pair / "teacher"),
        "task": str(pair / "train.jsonl"),
        "eval_task": str(pair / f"{settings.split}.jsonl"),
        "max_prompt": record["limits"]["max_prompt"],
        "max_response": record["limits"]["max_response"],
        "mask": mask_rules(record) if method in MASKED else (),
        "steps": settings.steps,
        "eval_every": max(1, settings.steps // EVALUATIONS),
        "lr": settings.lr or learning_rate(method),
        "seed": seed,
        "out": str(out),
    }
    return check_settings(with_settings(pair_recipe(), **(common | METHODS[method])))


def mask_rules(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the rules that mask what is foreign to the teacher: tags, and a second end token.

    Args:
        record: pair.json of a pair.

    Returns:
        The rules (`opd.tokens.mask_rules`).
    """
    ends = (f"token:{SECOND_END}",) if record["knobs"]["second_end"] else ()
    return (f"string:{TAG}", *ends)
