"""Training steps of the toolkit and of TRL, each followed by its floor in the same process."""

import resource
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.floor.products import (
    OBJECTIVES,
    Floor,
    ModelShape,
    Work,
    clock,
    step_products,
)
from benchmarks.random_pair import training_config

WARMUP = 3
"""Steps that are not timed: the first ones are slower and rescore responses."""
PHASES = ("rollout", "score", "update")


@dataclass(frozen=True)
class Size:
    """What every trainer of a comparison has in common."""

    folder: Path
    rows: int
    response: int
    k: int
    dtype: str
    device: str
    steps: int


class Clock:
    """Collects the time of each step and, after it, of its floor.

    Args:
        size: The common sizes.
        objective: Objective whose products are the floor.
    """

    def __init__(self, size: Size, objective: str) -> None:
        self.size, self.objective = size, objective
        self.device = torch.device(size.device)
        self.floor: Floor | None = None
        self.steps: list[dict[str, float]] = []
        self.count, self.memory_before, self.memory = 0, peak_mebibytes(), 0.0
        self.begin = clock(self.device)

    def end_step(self, phases: dict[str, float]) -> None:
        """End a step, run the floor, and begin the next step."""
        seconds = clock(self.device) - self.begin
        self.count += 1
        if self.count == WARMUP:  # before the floor takes memory of its own
            self.memory = peak_mebibytes() - self.memory_before
            self.floor = make_floor(self.size, self.objective)
        elif self.floor is not None:
            floor = {f"floor/{name}": self.floor.seconds(name) for name in PHASES}
            self.steps.append({"step": seconds, **phases, **floor})
        self.begin = clock(self.device)

    def result(self) -> dict[str, Any]:
        """Return what was measured."""
        return {"steps": self.steps, "mebibytes": self.memory}


def make_floor(size: Size, objective: str) -> Floor:
    """Build the floor of the saved pair."""
    from transformers import AutoConfig

    student, teacher = (
        ModelShape.of(name, AutoConfig.from_pretrained(size.folder / name))
        for name in ("student", "teacher")
    )
    work = Work(size.rows, prompt_length(size), size.response, size.k)
    return Floor(
        step_products(student, teacher, work, objective),
        getattr(torch, size.dtype),
        torch.device(size.device),
    )


def prompt_length(size: Size) -> int:
    """Return the mean number of tokens of the prompts, rounded."""
    from transformers import AutoTokenizer

    from opd.data.chain_task import Problem
    from opd.data.prompts import encode_prompt

    tokenizer = AutoTokenizer.from_pretrained(size.folder / "student")
    lengths = [len(encode_prompt(tokenizer, Problem(text, ""))) for text in prompt_texts(size)]
    return round(sum(lengths) / len(lengths))


def prompt_texts(size: Size) -> list[str]:
    """Return the texts of the task's prompts."""
    import pandas

    return list(pandas.read_json(size.folder / "task.jsonl", lines=True)["prompt"])


def peak_mebibytes() -> float:
    """Return the peak resident memory of the process; on CUDA that allocated by torch."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_toolkit(size: Size, objective: str) -> dict[str, Any]:
    """Train with the toolkit, its default panel included, without evaluations."""
    from opd.training import shared_pass
    from opd.training import train as trainer

    config = training_config(
        size.folder,
        size.folder / f"run-{objective}",
        rows=size.rows,
        response=size.response,
        steps=WARMUP + size.steps,
        objective=objective,
        support_k=size.k,
        device=size.device,
        dtype=size.dtype,
    )
    run_step = trainer.run_step
    steps: list[Clock] = []

    def timed(state: Any, number: int, log: Any) -> Any:
        if not steps:
            steps.append(Clock(size, objective))
        row = run_step(state, number, log)
        steps[0].end_step(
            {k.removeprefix("seconds/"): v for k, v in row.items() if k.startswith("seconds/")}
        )
        return row

    device = torch.device(size.device)
    phase_clock = SimpleNamespace(perf_counter=lambda: clock(device))
    replacements = {
        "time": phase_clock,
        "run_step": timed,
        "evaluate_and_record": lambda *_: None,
    }
    with ExitStack() as stack:
        stack.enter_context(patch.object(shared_pass, "time", phase_clock))
        stack.enter_context(patch.object(trainer.checkpoint, "save", lambda *_: None))
        for name, value in replacements.items():
            stack.enter_context(patch.object(trainer, name, value))
        trainer.train(config, start_over=True)
    return steps[0].result()


def run_trl(size: Size) -> dict[str, Any]:
    """Train with TRL's DistillationTrainer at beta = 1, the reverse KL."""
    from trl import DistillationConfig, DistillationTrainer

    arguments = trl_arguments(size) | {
        "top_p": 1.0,
        "top_k": 0,
        "max_completion_length": size.response,
        # its generation also stops at the tokenizer's EOS, which is prevented here
        "generation_kwargs": {"min_new_tokens": size.response},
    }
    return train_trl(size, DistillationTrainer, DistillationConfig, arguments, "prompt")


def run_gkd(size: Size) -> dict[str, Any]:
    """Train with TRL's experimental GKDTrainer at lmbda = 1 and beta = 1, the same objective."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    arguments = trl_arguments(size) | {"lmbda": 1.0, "max_new_tokens": size.response}
    return train_trl(size, GKDTrainer, GKDConfig, arguments, "messages")


def trl_arguments(size: Size) -> dict[str, Any]:
    """Return the arguments that both trainers of TRL take."""
    return {
        "output_dir": str(size.folder / "trl"),
        "beta": 1.0,
        "temperature": 1.0,
        "per_device_train_batch_size": size.rows,
        "max_steps": WARMUP + size.steps,
        "learning_rate": 1e-6,
        "use_cpu": size.device == "cpu",
        "bf16": size.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32"},
        "teacher_model_init_kwargs": {"dtype": "float32"},
    }


def train_trl(
    size: Size, trainer_type: Any, config_type: Any, arguments: dict[str, Any], column: str
) -> dict[str, Any]:
    """Train with a trainer of TRL, its steps timed from the end of one to the end of the next."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    clocks: list[Clock] = []

    class Timer(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clocks.append(Clock(size, "full_reverse_kl"))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clocks[0].end_step({})

    chats = [[{"role": "user", "content": text}] for text in prompt_texts(size)]
    if column == "messages":
        chats = [[*chat, {"role": "assistant", "content": "0"}] for chat in chats]
    trainer = trainer_type(
        model=str(size.folder / "student"),
        teacher_model=str(size.folder / "teacher"),
        args=config_type(**arguments),
        train_dataset=Dataset.from_dict({column: chats}),
        processing_class=AutoTokenizer.from_pretrained(size.folder / "student"),
        callbacks=[Timer()],
    )
    torch.manual_seed(0)
    trainer.train()
    return clocks[0].result()


TRAINERS: dict[str, Callable[[Size], dict[str, Any]]] = {
    **{name: partial(run_toolkit, objective=name) for name in OBJECTIVES},
    "trl": run_trl,
    "gkd": run_gkd,
}
"""Trainers by name."""


def settings_of(size: Size) -> dict[str, Any]:
    """Return the sizes as JSON values."""
    return asdict(size) | {"folder": str(size.folder)}
