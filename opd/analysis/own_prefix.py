"""The own-prefix baseline (B-8): the teacher's certainty on its own and on the student's text.

Three models answer the same problems: the teacher, the student before the run, and the student
after it. The same pair, teacher and initial student, scores all three. Comparing the teacher's
certainty at the same positions tells whether the student's text is the cause of its uncertainty or
the text is hard in general.
"""

from dataclasses import replace
from pathlib import Path

import torch

from diagnostics.batch import ScoredRollouts
from opd.analysis.probed_run import held_out_prompts, load_trained_student, read_probed_config
from opd.config.settings import Config
from opd.data.prompts import Prompts
from opd.models.model import CausalLM
from opd.rollouts.hf_engine import sample
from opd.runtime.seeds import CONTROL, derive_seed
from opd.scoring.request import METRICS_ONLY, ScoreRequest
from opd.scoring.score import score_batch
from opd.teachers.factory import make_pair
from opd.teachers.pair import ModelPair
from opd.training.setup import load_problem_task

SOURCES = ("teacher", "student", "trained")


def probe_own_prefix(run: Path, count: int = 64, trust_remote_code: bool = False) -> list[Path]:
    """Write RUN/control/{teacher,student,trained}.safetensors: one response per held-out problem.

    Problems, their order and the random numbers of every row are the same for the three; the
    teacher reads its own view of a problem where the run has one. Responses are sampled at the
    run's temperature from the full softmax.

    Args:
        run: A finished run folder.
        count: Number of held-out problems.
        trust_remote_code: Run Python code stored with the models that the run's config names. The
            config's own setting is ignored, since the folder may come from somebody else.

    Returns:
        The three files.

    Raises:
        MissingFile: The run has no final/.
        InvalidInput: The run has several tasks, or its teacher is not a separate local model.
    """
    config = read_probed_config(run, trust_remote_code)
    trained_student = load_trained_student(run, config)
    pair = make_pair(config)
    prompts = held_out_prompts(config, pair, load_problem_task(config, pair), count)
    models = dict(zip(SOURCES, (pair.teacher.model, pair.student, trained_student), strict=True))
    paths = []
    for name, model in models.items():
        path = run / "control" / f"{name}.safetensors"
        model_prompts = prompts.teacher_prompts if name == "teacher" else prompts
        sample_and_score(config, pair, model, prompts, model_prompts).save(path)
        paths.append(path)
    return paths


def sample_and_score(
    config: Config, pair: ModelPair, model: CausalLM, prompts: Prompts, model_prompts: Prompts
) -> ScoredRollouts:
    """Sample one response of `model` to every prompt that it reads and score it with the pair."""
    rollouts = sample(
        model,
        model_prompts,
        pair.eos,
        max_response=config.rollout.max_response,
        temperature=config.rollout.temperature,
        top_p=1.0,
        generator=torch.Generator().manual_seed(derive_seed(config.seed, 0, CONTROL)),
        generation_batch_size=config.rollout.generation_batch_size,
    )
    request = ScoreRequest(
        requirements=replace(METRICS_ONLY, support_k=config.objective.support_k),
        temperature=config.rollout.temperature,
        eos_map=pair.eos_map,
        max_tokens_per_microbatch=config.hardware.max_tokens_per_microbatch,
        max_logits_per_chunk=config.hardware.max_logits_per_chunk,
    )
    return score_batch(pair.student, pair.teacher, prompts, rollouts, request).scored
