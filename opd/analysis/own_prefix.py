"""The own-prefix control (B-8): is the teacher lost on the student's text, or is text merely hard?

Three models answer the same problems: the teacher, the student as it was before the run, and the
student after it. The same pair, teacher and first student, scores all three, so that the teacher's
certainty on its own prefixes stands beside that on the students' at the same positions.
"""

import dataclasses
from pathlib import Path

import torch

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput, MissingFile
from opd.config.settings import Config, from_json
from opd.data.grading.graders import refuse_own_of_record
from opd.data.prompts import Prompts, encode
from opd.models.model import CausalLM
from opd.rollouts.hf_engine import sample
from opd.runtime.seeds import CONTROL, derive
from opd.scoring.score import score
from opd.serving.addresses import is_url
from opd.teachers.factory import make_pair
from opd.teachers.pair import ModelPair
from opd.training.setup import load
from opd.training.step import scoring

SOURCES = ("teacher", "student", "trained")


def control(run: Path, count: int = 64, trust: bool = False) -> list[Path]:
    """Write RUN/control/{teacher,student,trained}.safetensors: one response a held-out problem.

    trust: run Python code that lies beside the weights of the models that the record names; what
    the record itself says of it counts for nothing, since the folder may be a stranger's.

    Prompts, their order and the noise of every row are the same for the three. Sampled at the
    run's temperature, from the whole softmax.

    Raises:
      FileNotFoundError: the run has no final/. ValueError: its teacher is no model of its own, or
        it has several.
    """
    config = dataclasses.replace(from_json(run / "config.json"), trust_remote_code=trust)
    refuse_own_of_record(config.grader, run / "config.json", trust)
    if config.tasks:
        raise InvalidInput(f"{run} has {len(config.tasks)} tasks; the control compares one teacher")
    if config.teacher in ("base", "ema") or is_url(config.teacher):
        raise InvalidInput(
            f"teacher is {config.teacher!r}, which has no text of its own to compare, or writes "
            "none here"
        )
    if not (run / "final").exists():
        raise MissingFile(f"{run / 'final'} does not exist; finish the run first")
    pair = make_pair(config)
    after = make_pair(dataclasses.replace(config, student=str(run / "final"), lora_rank=0))
    prompts = encode(pair.tokenizer, load(config, pair).test(count), 1, config.max_prompt).to(
        pair.student.device
    )
    models = dict(zip(SOURCES, (pair.teacher, pair.student, after.student), strict=True))
    found = []
    for name, model in models.items():
        path = run / "control" / f"{name}.safetensors"
        answered(config, pair, model, prompts).save(path)
        found.append(path)
    return found


def answered(config: Config, pair: ModelPair, model: CausalLM, prompts: Prompts) -> ScoredRollouts:
    """One response of `model` to every prompt, scored by the pair."""
    rollouts = sample(
        model,
        prompts,
        pair.eos,
        max_response=config.max_response,
        temperature=config.temperature,
        top_p=1.0,
        generator=torch.Generator().manual_seed(derive(config.seed, 0, CONTROL)),
        generation_batch_size=config.generation_batch_size,
    )
    return score(pair, prompts, rollouts, keep_teacher=False, **scoring(config))[0]
