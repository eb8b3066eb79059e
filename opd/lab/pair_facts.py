"""What a pair is like, measured: accuracy, divergence, foreign tokens, the doctor's warnings."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.lab.knobs import PairKnobs
from opd.lab.pair_tokenizer import PairIds, pair_ids
from opd.lab.problem_files import write_rows
from opd.runtime.seeds import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

    from diagnostics.batch import ScoredRollouts
    from diagnostics.core.totals import Accumulator

TRAINING_RESPONSES, ACCURACY, ROLLOUTS, DOCTOR = range(4)
"""Purposes of seeds."""
NUM_ROLLOUTS = 192
"""Responses of the student on which the pair is compared, one of each validation problem."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def write_teacher_responses(folder: Path, max_prompt: int, max_response: int, seed: int) -> None:
    """Add a response of the teacher to every row of train.jsonl, for methods that are offline.

    Args:
        folder: Folder of the pair.
        max_prompt: Largest number of tokens of a prompt.
        max_response: Response budget in tokens.
        seed: Seed of the pair.
    """
    from opd.config.groups import EvalConfig
    from opd.evaluation.folder import respond_folder

    path = folder / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if "response" in rows[0]:
        return
    graded = respond_folder(
        str(folder / "teacher"),
        "lab",
        device="cpu",
        evaluation=EvalConfig(eval_task=str(path), eval_problems=len(rows)),
        max_prompt=max_prompt,
        max_response=max_response,
        seed=derive_seed(seed, TRAINING_RESPONSES),
    )
    texts = {p.prompt: text[0] for p, text in zip(graded.problems, graded.texts, strict=True)}
    write_rows(path, ({**row, "response": texts[row["prompt"]]} for row in rows))


def measure_pair(
    folder: Path, knobs: PairKnobs, max_prompt: int, max_response: int, seed: int
) -> dict[str, Any]:
    """Measure a pair.

    Args:
        folder: Folder of the pair, with models and problems.
        knobs: Knobs of the pair.
        max_prompt: Largest number of tokens of a prompt.
        max_response: Response budget in tokens.
        seed: Seed of the pair.

    Returns:
        `accuracy` and `other_task` by model, as `opd eval` reports them; `rollouts`, metrics of the
        student's responses by name with standard errors (`_se`); `foreign`, what `foreign_facts`
        returns; `doctor`, the checks of `opd doctor` that are not ok.
    """
    from opd.analysis.doctor import check_pair
    from opd.config.groups import EvalConfig
    from opd.evaluation.folder import evaluate_folder

    accuracy = {
        file: {
            role: {
                name: value
                for name, value in evaluate_folder(
                    str(folder / role),
                    "lab",
                    device="cpu",
                    evaluation=EvalConfig(
                        eval_task=str(folder / f"{file}.jsonl"), eval_problems=1000
                    ),
                    max_prompt=max_prompt,
                    max_response=max_response,
                    seed=derive_seed(seed, ACCURACY),
                ).items()
                if name != "outcomes"
            }
            for role in ("student", "teacher")
        }
        for file in ("validation", "other_task")
    }
    batch, overlap_batch, ids = score_rollouts(folder, max_prompt, max_response, seed)
    results = check_pair(
        str(folder / "student"),
        str(folder / "teacher"),
        task=str(folder / "train.jsonl"),
        max_response=max_response,
        seed=derive_seed(seed, DOCTOR),
        device="cpu",
    )
    return {
        "accuracy": accuracy["validation"],
        "other_task": accuracy["other_task"],
        "rollouts": rollout_facts(batch, overlap_batch),
        "foreign": foreign_facts(batch, knobs, ids),
        "doctor": [asdict(x) for x in results if x.verdict != "ok"],
    }


def score_rollouts(
    folder: Path, max_prompt: int, max_response: int, seed: int
) -> "tuple[ScoredRollouts, ScoredRollouts, PairIds]":
    """Sample responses of the student to validation problems, and score them with both models.

    Args:
        folder: Folder of the pair.
        max_prompt: Largest number of tokens of a prompt.
        max_response: Response budget in tokens.
        seed: Seed of the pair.

    Returns:
        The scored responses with the teacher's top-K as support, the same with that of both models,
        and the ids of the tokenizer.
    """
    import torch

    from opd.data.prompts import encode_prompts
    from opd.data.sources import read_problems
    from opd.rollouts.hf_engine import sample
    from opd.scoring.request import METRICS_ONLY, ScoreRequest
    from opd.scoring.score import score_batch
    from opd.teachers.pair import load_pair

    pair = load_pair(str(folder / "student"), str(folder / "teacher"), "cpu")
    problems = read_problems(str(folder / "validation.jsonl"))[:NUM_ROLLOUTS]
    prompts = encode_prompts(pair.tokenizer, problems, 1, max_prompt)
    rollouts = sample(
        pair.student,
        prompts,
        pair.eos,
        max_response=max_response,
        temperature=1.0,
        top_p=1.0,
        generator=torch.Generator().manual_seed(derive_seed(seed, ROLLOUTS)),
    )
    batches = [
        score_batch(
            pair.student,
            pair.teacher,
            prompts,
            rollouts,
            ScoreRequest(requirements=replace(METRICS_ONLY, support=support), eos_map=pair.eos_map),
        ).scored
        for support in ("teacher", "union")
    ]
    return batches[0], batches[1], pair_ids(pair.tokenizer)


def rollout_facts(batch: "ScoredRollouts", overlap_batch: "ScoredRollouts") -> dict[str, float]:
    """Return the metrics of the student's responses that describe the pair.

    Args:
        batch: Scored responses, with the teacher's top-K as support.
        overlap_batch: The same with the top-K of both models.

    Returns:
        Metrics by name, with standard errors over prompts.
    """
    from diagnostics.core.optional_fields import require_distribution_stats
    from diagnostics.core.totals import Mean, compute
    from diagnostics.metrics.divergence import exact_divergence, support_mass
    from diagnostics.metrics.response import length
    from diagnostics.metrics.topk import overlap

    forward_kl = require_distribution_stats(batch).forward_kl
    assert forward_kl is not None
    accumulators: dict[str, Accumulator] = {
        "divergence/forward_kl": Mean.from_values(forward_kl, batch.mask, batch.prompt)
    }
    for metric in (exact_divergence, support_mass, length):
        accumulators |= metric(batch)
    accumulators |= overlap(overlap_batch)
    return {k: v for k, v in compute(accumulators).items() if "/pos" not in k}


def foreign_facts(batch: "ScoredRollouts", knobs: PairKnobs, ids: PairIds) -> dict[str, Any]:
    """Measure the foreign tokens of the student's responses: how many, and how costly.

    A foreign token is the first token of a tag in the student's form, or the second end token.

    Args:
        batch: Scored responses of the student.
        knobs: Knobs of the pair.
        ids: Ids of the tokenizer.

    Returns:
        `tags_per_response` and `ends_per_response`, foreign ones; `token_share`, of all tokens;
        `tags` and `ends`: quantiles of the teacher's log-probability and of the cost, None if there
        are none.
    """
    from diagnostics.core.totals import Mean, compute

    tag = ids.tag_forms(knobs.spelled_by)["student"][0]
    masks = {
        "tags": batch.mask & (batch.tokens == tag),
        "ends": batch.mask & (batch.tokens == ids.second_end),
    }
    every_response = batch.mask.new_ones(len(batch))
    accumulators: dict[str, Accumulator] = {
        f"{name}_per_response": Mean.from_values(x.sum(1).double(), every_response, batch.prompt)
        for name, x in masks.items()
    }
    is_foreign = masks["tags"] | masks["ends"]
    accumulators["token_share"] = Mean.from_values(is_foreign.double(), batch.mask, batch.prompt)
    return {
        **compute(accumulators),
        **{
            name: {
                "teacher_logp": quantiles(batch.teacher_logp[x]),
                "cost": quantiles(batch.log_ratio[x]),
            }
            if x.any()
            else None
            for name, x in masks.items()
        },
    }


def quantiles(x: "Tensor") -> Mapping[str, float]:
    """Return the mean, the quantiles and the number of values."""
    import torch

    values = x.double()
    levels = values.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    value_by_name = {
        f"q{round(100 * q):02d}": level for q, level in zip(QUANTILES, levels, strict=True)
    }
    return {"mean": float(values.mean()), **value_by_name, "count": len(values)}
