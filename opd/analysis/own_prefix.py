"""The own-prefix baseline (B-8): the teacher's certainty on its own and on the student's text.

Three models answer the same problems: the teacher, the student before the run, and the student
after it. The same pair, teacher and initial student, scores all three. Comparing the teacher's
certainty at the same positions tells whether the student's text is the cause of its uncertainty or
the text is hard in general.
"""

import dataclasses
from pathlib import Path

import torch

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput, MissingFile
from opd.config.settings import Config, from_json
from opd.data.grading.graders import require_trusted_grader
from opd.data.prompts import Prompts, encode_prompts
from opd.models.model import CausalLM
from opd.rollouts.hf_engine import sample
from opd.runtime.seeds import CONTROL, derive_seed
from opd.scoring.score import METRICS_ONLY, ScoreRequest, score_batch
from opd.teachers.factory import make_pair
from opd.teachers.pair import ModelPair
from opd.teachers.teacher import teacher_type
from opd.training.setup import load_problem_task

SOURCES = ("teacher", "student", "trained")


def probe_own_prefix(run: Path, count: int = 64, trust_remote_code: bool = False) -> list[Path]:
    """Write RUN/control/{teacher,student,trained}.safetensors: one response per held-out problem.

    Prompts, their order and the random numbers of every row are the same for the three. Responses
    are sampled at the run's temperature from the full softmax.

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
    config = dataclasses.replace(
        from_json(run / "config.json"), trust_remote_code=trust_remote_code
    )
    require_trusted_grader(config.grader, run / "config.json", trust_remote_code)
    if config.tasks:
        raise InvalidInput(f"{run} has {len(config.tasks)} tasks; this probe supports one teacher")
    if not teacher_type(config.teacher).is_separate:
        raise InvalidInput(
            f"teacher is {config.teacher!r}, which is derived from the student or remote; this "
            "probe needs a separate local teacher"
        )
    if not (run / "final").exists():
        raise MissingFile(f"{run / 'final'} does not exist; finish the run first")
    pair = make_pair(config)
    trained_pair = make_pair(dataclasses.replace(config, student=str(run / "final"), lora_rank=0))
    prompts = encode_prompts(
        pair.tokenizer, load_problem_task(config, pair).test(count), 1, config.max_prompt
    ).to(pair.student.device)
    teacher = pair.teacher.model
    models = dict(zip(SOURCES, (teacher, pair.student, trained_pair.student), strict=True))
    paths = []
    for name, model in models.items():
        path = run / "control" / f"{name}.safetensors"
        sample_and_score(config, pair, model, prompts).save(path)
        paths.append(path)
    return paths


def sample_and_score(
    config: Config, pair: ModelPair, model: CausalLM, prompts: Prompts
) -> ScoredRollouts:
    """Sample one response of `model` to every prompt and score it with the pair."""
    rollouts = sample(
        model,
        prompts,
        pair.eos,
        max_response=config.max_response,
        temperature=config.temperature,
        top_p=1.0,
        generator=torch.Generator().manual_seed(derive_seed(config.seed, 0, CONTROL)),
        generation_batch_size=config.generation_batch_size,
    )
    request = ScoreRequest(
        requirements=dataclasses.replace(METRICS_ONLY, support_k=config.support_k),
        temperature=config.temperature,
        eos_map=pair.eos_map,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
        max_logits_per_chunk=config.max_logits_per_chunk,
    )
    return score_batch(pair.student, pair.teacher, prompts, rollouts, request).scored
