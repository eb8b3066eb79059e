"""What a pair looks like before training, from a few hundred rollouts of the student.

All numbers come from the diagnostics of a training step: the panel of metrics, the gradient probe,
the mask rules' shares and the continuation probe. A bank of runs holds the same numbers of its
pairs, so that a forecast (`opd.analysis.scout.forecast`) compares like with like.

Shapes: B responses, T response positions, M problems.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from diagnostics.batch import Rollouts, ScoredRollouts
from diagnostics.catalogue import FULL, Metric
from diagnostics.core.optional_fields import MissingField, require_distribution_stats
from diagnostics.core.totals import Accumulator, Mean, compute
from diagnostics.errors import InvalidInput
from diagnostics.gradients.bias import recommend_estimator
from diagnostics.gradients.estimators import estimator_index
from diagnostics.gradients.signal_noise import pair_products, signal_noise_estimates
from diagnostics.monitor import Monitor
from diagnostics.stats import gain_interval, share_interval
from opd.analysis.continuation import continuation_gain, grade_correct, response_eos_ids
from opd.config.settings import Config, with_settings
from opd.data.prompts import Prompts, encode_prompts
from opd.data.tasks import Task, prompt_hash
from opd.models.lm_head import LogitsHead
from opd.models.model import CausalLM
from opd.rollouts.hf_engine import sample
from opd.runtime.seeds import CONTINUATION, CONTROL, ROLLOUT, derive_seed
from opd.scoring.score import METRICS_ONLY, ScoredBatch, ScoreRequest, score_batch
from opd.teachers.factory import make_pair
from opd.teachers.pair import ModelPair
from opd.teachers.teacher import teacher_type
from opd.tokens.masking import (
    THINK,
    ResolvedMaskRules,
    mask_rule_metrics,
    resolve_mask_rules,
    rule_hits,
    special_ids,
)
from opd.tokens.token_bytes import token_bytes
from opd.training.checks.same_weights import is_same_source, same_weights
from opd.training.gradient_probe import family_gradients
from opd.training.setup import load_problem_task, require_answers

MIN_PROMPTS = 8
"""Fewest different prompts: they are the sampling unit of every number."""
GROUP_SIZE = 4
"""Responses per prompt."""
SUPPORT_K = 32
"""Depth of both models' top-K lists, or the vocabulary's size if that is smaller."""
SPECIAL_RULES = ("role:special", "role:think")
"""Mask rules of the special tokens, to which `special_rules` adds the text of each in any split."""

PANEL = (
    *("sampled_divergence", "exact_divergence", "uncertainty", "overlap", "nested_outside"),
    *("signal_concentration", "one_id", "confident_impossible", "repetition", "length"),
    *("reward", "second_try", "endings", "prefix_weights", "compatibility"),
)
"""Metrics of the catalogue that are computed."""

COLUMNS = {
    "reverse_kl": "divergence/reverse_kl",
    "forward_kl": "divergence/forward_kl",
    "response_kl": "divergence/reverse_kl_per_response",
    "sampled_gap": "divergence/abs_ratio",
    "topk_overlap": "divergence/overlap_ratio",
    "teacher_overlap_mass": "divergence/overlap_teacher_mass",
    "teacher_mass": "divergence/compatibility",
    "outside_top1": "divergence/outside_top1_expected",
    "outside_top8": "divergence/outside_top8_expected",
    "outside_top16": "divergence/outside_top16_expected",
    "outside_top32": "divergence/outside_top32_expected",
    "student_entropy": "divergence/student_entropy",
    "teacher_entropy": "divergence/teacher_entropy",
    "entropy_gap": "divergence/entropy_gap",
    "signal_top1_share": "signal/signal_top1_share",
    "one_id_signal": "tokens/one_id_signal",
    "impossible_share": "tokens/confident_impossible_share",
    "impossible_signal": "tokens/confident_impossible_signal",
    "repeated_share": "repetition/repeated_share",
    "length": "response/length",
    "truncated_share": "response/truncated_share",
    "second_try": "diversity/second_try",
    "end_push": "divergence/end_push",
    "prefix_ess": "divergence/prefix_ess",
    "special_share": "tokens/special_share",
    "special_signal": "tokens/special_signal",
    "special_gap": "tokens/special_gap",
    "plain_gap": "tokens/plain_gap",
}
"""Measurement -> column of the row of metrics."""

ESTIMATORS = {
    "snr": ("plain", 0.0),
    "snr_full_vocabulary": ("rb_immediate", 0.0),
    "snr_sequence": ("plain", 1.0),
    "snr_sequence_baseline": ("position_mean", 1.0),
}
"""Signal-to-noise ratio -> estimator of the gamma family and its discount."""


@dataclass(frozen=True)
class RuleShare:
    """What a mask rule would remove from the student's rollouts."""

    rule: str
    """Text of the rule."""
    tokens: float
    """Share of the sampled tokens."""
    signal: float
    """Share of sum |log student - log teacher|."""
    gap: float
    """Mean of log student - log teacher over the tokens of the rule, in nats."""


@dataclass(frozen=True)
class PairMeasurements:
    """What was measured on a pair."""

    values: Mapping[str, float]
    """Measurements by name."""
    rules: tuple[RuleShare, ...]
    """Special tokens that the student wrote, each by the rule that would mask it."""


def pair_measurements(
    student: str | Path,
    teacher: str | Path,
    task: str | Path = "lab",
    max_prompt: int = 512,
    max_response: int = 512,
    rollouts: int = 256,
    seed: int = 0,
) -> dict[str, float]:
    """Measure a student and a teacher before training; see `measure_pair`.

    Args:
        student: Folder or hub name.
        teacher: Folder or hub name.
        task: A task of problems with answers (`opd.data.tasks.load_task`).
        max_prompt: Maximum prompt tokens.
        max_response: Maximum response tokens.
        rollouts: Responses of the student, GROUP_SIZE to each prompt.
        seed: Seed of problems and sampling.

    Returns:
        Measurements by name.
    """
    config = scout_config(
        str(student), str(teacher), str(task), max_prompt, max_response, rollouts, seed
    )
    return dict(measure_pair(config).values)


def scout_config(
    student: str,
    teacher: str,
    task: str,
    max_prompt: int,
    max_response: int,
    rollouts: int,
    seed: int,
) -> Config:
    """Return the settings of a scout: those of a run with one step of all rollouts.

    Args:
        student: Folder or hub name.
        teacher: Folder or hub name.
        task: Source of problems.
        max_prompt: Maximum prompt tokens.
        max_response: Maximum response tokens.
        rollouts: Responses of the student, GROUP_SIZE to each prompt.
        seed: Seed of problems and sampling.

    Returns:
        The settings.

    Raises:
        InvalidInput: Too few rollouts.
    """
    prompts = rollouts // GROUP_SIZE
    if prompts < MIN_PROMPTS:
        raise InvalidInput(
            f"rollouts is {rollouts}, which is {prompts} prompts with {GROUP_SIZE} responses each, "
            f"but prompts are the sampling unit and a scout needs {MIN_PROMPTS} or more; set "
            f"rollouts to at least {MIN_PROMPTS * GROUP_SIZE}"
        )
    return with_settings(
        Config(student=student, teacher=teacher, out="scout", seed=seed),
        task=task,
        max_prompt=max_prompt,
        max_response=max_response,
        prompts_per_step=prompts,
        group_size=GROUP_SIZE,
    )


def measure_pair(config: Config) -> PairMeasurements:
    """Measure a pair from one step of rollouts on training problems.

    The student writes `group_size` responses to each of `prompts_per_step` problems; the teacher
    one to each, and it continues the student's first response to each from half of the median
    length.

    Args:
        config: Settings of a run; its task, models, lengths, temperature and seed are used.

    Returns:
        Measurements by name, with standard errors over prompts under NAME_se, or the ends of 95 %
        intervals over prompts under NAME_low and NAME_high:
        student_accuracy, teacher_accuracy, accuracy_gap: Shares of correct responses, and the
            teacher's minus the student's on the same problems.
        continuation_gain: Of the teacher over the student, from the student's prefixes
            (`opd.analysis.continuation.paired_gain`).
        The names of COLUMNS: Metrics of the catalogue; special tokens are those of `special_rules`,
            their gap is the mean of log student - log teacher over them, "plain" that over others.
        The names of ESTIMATORS: Squared length of the mean gradient of the LM head divided by the
            variance of one response's gradient, NaN where it cannot be estimated.
        best_gamma: Discount of the estimator with the least error at this number of responses.
        prompts, responses: Their numbers.

    Raises:
        InvalidInput: The teacher has no weights in this process, or those of the student; the
            tokenizers differ; the task has no answers or too few prompts.
    """
    check_teacher(config)
    pair = make_pair(config)
    if same_weights(pair.student.network, pair.teacher.model.network):
        raise _equal_models(config)
    task = load_problem_task(config, pair)
    require_answers(task, config, "a scout compares accuracies", "choose another task")
    drawn_problems = task.train(0, config.data.prompts_per_step)  # repeated from the second epoch
    problems = list({prompt_hash(problem): problem for problem in drawn_problems}.values())
    if len(problems) < MIN_PROMPTS:
        raise InvalidInput(
            f"{config.data.task} has {len(problems)} different prompts, but prompts are the "
            f"sampling unit and a scout needs {MIN_PROMPTS} or more; add problems"
        )
    max_prompt = config.data.max_prompt
    prompts, first_prompts = (
        encode_prompts(pair.tokenizer, problems, count, max_prompt).to(pair.student.device)
        for count in (config.data.group_size, 1)
    )
    rollouts = _sample(config, pair.student, prompts, pair.eos, ROLLOUT)
    correct = grade_correct(pair, rollouts.tokens, rollouts.mask, prompts.answers, task)
    rollouts = rollouts.with_fields(reward=torch.tensor(correct, device=rollouts.mask.device))
    batch = score_batch(pair.student, pair.teacher, prompts, rollouts, _score_request(config, pair))
    student_correct = np.array(correct).reshape(len(problems), -1)
    rules = special_rules(pair, batch.scored)
    values = {
        **metric_values(batch.scored, rules),
        **accuracy_values(config, pair, task, first_prompts, student_correct),
        **continuation_values(config, pair, task, first_prompts, rollouts, student_correct),
        **gradient_values(config, pair, batch),
        "prompts": float(len(problems)),
        "responses": float(len(prompts)),
    }
    return PairMeasurements(values, rule_shares(batch.scored, rules))


def check_teacher(config: Config) -> None:
    """Refuse a teacher whose distributions are not available, or that is the student.

    Args:
        config: Settings of the scout.

    Raises:
        InvalidInput: See above; the message names the teacher.
    """
    if not teacher_type(config.teacher).is_separate:
        raise InvalidInput(
            f"teacher is {config.teacher!r}, but a scout reads the teacher's distributions and "
            "lets it write; name a folder or hub model whose weights are loaded in this process"
        )
    if is_same_source(config.student, config.teacher):
        raise _equal_models(config)


def _equal_models(config: Config) -> InvalidInput:
    return InvalidInput(
        f"the teacher {config.teacher} has the weights of the student {config.student}, so there "
        "is nothing to distil; name another teacher"
    )


def _score_request(config: Config, pair: ModelPair) -> ScoreRequest:
    """Return a request of both top-K lists and of statistics of the distributions."""
    depth = min(SUPPORT_K, pair.student.vocabulary)
    return ScoreRequest(
        requirements=replace(METRICS_ONLY, support="union", support_k=depth),
        temperature=config.rollout.temperature,
        eos_map=pair.eos_map,
        max_tokens_per_microbatch=config.hardware.max_tokens_per_microbatch,
        max_logits_per_chunk=config.hardware.max_logits_per_chunk,
    )


def _sample(
    config: Config,
    model: CausalLM,
    prompts: Prompts,
    eos: list[int],
    purpose: int,
    prefix_length: int = 0,
) -> Rollouts:
    return sample(
        model,
        prompts,
        eos,
        max_response=config.rollout.max_response - prefix_length,
        temperature=config.rollout.temperature,
        top_p=1.0,
        generator=torch.Generator().manual_seed(derive_seed(config.seed, 0, purpose)),
        generation_batch_size=config.rollout.generation_batch_size,
    )


def special_rules(pair: ModelPair, batch: ScoredRollouts) -> list[ResolvedMaskRules]:
    """Return the rules of special tokens: SPECIAL_RULES and the text of each that was written.

    A model may write the text of a special token in other tokens, which the other model does not
    expect; its rule finds the text in any split.

    Args:
        pair: Student and teacher.
        batch: Rollouts of the student.

    Returns:
        The rules, those of texts last.
    """
    table = token_bytes(pair.tokenizer)
    rows = zip(batch.tokens.tolist(), batch.sampled.tolist(), strict=True)
    written_texts = [
        b"".join(table[v] for v, sampled in zip(*row, strict=True) if sampled and v < len(table))
        for row in rows
    ]
    names = sorted({pair.tokenizer.decode([v]) for v in special_ids(pair.tokenizer)} | {*THINK})
    occurring_names = [
        name for name in names if any(name.encode() in text for text in written_texts)
    ]
    return resolve_mask_rules(
        [*SPECIAL_RULES, *(f"string:{name}" for name in occurring_names)], pair.tokenizer, pair.eos
    )


def rule_shares(batch: ScoredRollouts, rules: Sequence[ResolvedMaskRules]) -> tuple[RuleShare, ...]:
    """Return what the rules of texts would each remove, the largest share of the signal first."""
    text_rules = [rule for rule in rules if rule.name.startswith("string:")]
    values = compute(mask_rule_metrics(batch, text_rules)) if text_rules else {}
    shares = []
    for rule in text_rules:
        hits = rule_hits(batch.tokens, batch.sampled, rule)
        shares.append(
            RuleShare(
                rule=rule.name,
                tokens=values[f"mask/{rule.name}/tokens"],
                signal=values[f"mask/{rule.name}/signal"],
                gap=Mean.from_values(batch.log_ratio, hits).value(),
            )
        )
    return tuple(sorted(shares, key=lambda share: -share.signal))


def metric_values(batch: ScoredRollouts, rules: Sequence[ResolvedMaskRules]) -> dict[str, float]:
    """Compute the measurements of COLUMNS with their standard errors.

    Args:
        batch: Scored rollouts of the student.
        rules: Rules of the special tokens.

    Returns:
        Measurements by name; NaN where a metric is not defined.
    """

    def special_tokens(batch: ScoredRollouts) -> dict[str, Accumulator]:
        hits = [rule_hits(batch.tokens, batch.sampled, rule) for rule in rules]
        special, r = torch.stack(hits).any(0), batch.log_ratio
        plain, mask, prompt = batch.sampled & ~special, batch.sampled, batch.prompt
        return {
            "tokens/special_share": Mean.from_values(special, mask, prompt),
            "tokens/special_signal": Mean.ratio(r.abs() * special, r.abs(), mask, prompt),
            "tokens/special_gap": Mean.from_values(r, special, prompt),
            "tokens/plain_gap": Mean.from_values(r, plain, prompt),
        }

    metrics: dict[str, Metric] = {name: FULL[name] for name in PANEL}
    metrics |= {"forward KL": forward_divergence, "special tokens": special_tokens}
    row = Monitor(metrics)(0, [batch])
    values = {}
    for name, column in COLUMNS.items():
        values[name] = row.get(column, math.nan)
        if f"{column}_se" in row:
            values[f"{name}_se"] = row[f"{column}_se"]
    return values


def forward_divergence(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """Compute the mean forward KL(teacher || student) of the next token, in nats."""
    forward_kl = require_distribution_stats(batch).forward_kl
    if forward_kl is None:
        raise MissingField("the distribution stats lack forward_kl; score the batch again")
    return {"divergence/forward_kl": Mean.from_values(forward_kl, batch.mask, batch.prompt)}


def accuracy_values(
    config: Config, pair: ModelPair, task: Task, prompts: Prompts, student_correct: np.ndarray
) -> dict[str, float]:
    """Sample one response of the teacher to each problem and compare accuracies.

    Args:
        config: Settings of the scout.
        pair: Student and teacher.
        task: The task.
        prompts: M prompts.
        student_correct: (M, S) 1 or 0 for each response of the student.

    Returns:
        Accuracies and their paired difference, with 95 % intervals over problems.
    """
    rollouts = _sample(
        config, pair.teacher.model, prompts.teacher_prompts, response_eos_ids(pair), CONTROL
    )
    teacher = np.array(grade_correct(pair, rollouts.tokens, rollouts.mask, prompts.answers, task))
    student = student_correct.mean(1)
    columns = {
        "student_accuracy": (student, share_interval(student)),
        "teacher_accuracy": (teacher, share_interval(teacher)),
        "accuracy_gap": (teacher - student, gain_interval(teacher - student)),
    }
    return {
        key: value
        for name, (column, (low, high)) in columns.items()
        for key, value in (
            (name, float(column.mean())),
            (f"{name}_low", low),
            (f"{name}_high", high),
        )
    } | {"teacher_truncated_share": 1 - float(rollouts.ended.double().mean())}


def continuation_values(
    config: Config,
    pair: ModelPair,
    task: Task,
    prompts: Prompts,
    rollouts: Rollouts,
    student_correct: np.ndarray,
) -> dict[str, float]:
    """Let the teacher continue the student's first response to each problem.

    It continues from half of the median length of the student's responses.

    Args:
        config: Settings of the scout.
        pair: Student and teacher.
        task: The task.
        prompts: M prompts.
        rollouts: M S responses of the student.
        student_correct: (M, S) 1 or 0 for each of them.

    Returns:
        continuation_gain with its 95 % interval, and continuation_length in tokens; NaN where no
        response is long enough.
    """
    lengths = rollouts.mask.sum(1)
    prefix_length = int(lengths.double().median()) // 2
    group_size = student_correct.shape[1]
    first_rows = torch.arange(len(prompts), device=lengths.device) * group_size
    long_rows = (lengths[first_rows] > prefix_length).nonzero()[:, 0].tolist()
    names = {"gain": "continuation_gain", "low": "continuation_gain_low"}
    names["high"] = "continuation_gain_high"
    if not long_rows or prefix_length < 1:
        return dict.fromkeys([*names.values(), "continuation_length"], math.nan)
    gain = continuation_gain(
        pair,
        task,
        prompts.rows(long_rows),
        rollouts.rows([i * group_size for i in long_rows]),
        student_correct[long_rows, 0].tolist(),
        prefix_length,
        partial(
            _sample,
            config,
            pair.teacher.model,
            eos=response_eos_ids(pair),
            purpose=CONTINUATION,
            prefix_length=prefix_length,
        ),
    )
    return {name: gain[key] for key, name in names.items()} | {
        "continuation_length": float(prefix_length)
    }


def gradient_values(config: Config, pair: ModelPair, batch: ScoredBatch) -> dict[str, float]:
    """Compute signal-to-noise ratios of one response's gradient for several estimators.

    Args:
        config: Settings of the scout.
        pair: Student and teacher.
        batch: Scored rollouts of the student.

    Returns:
        The ratios of ESTIMATORS and best_gamma; NaN for a head that is not a single matrix.
    """
    if isinstance(pair.student.head, LogitsHead):
        return dict.fromkeys([*ESTIMATORS, "best_gamma"], math.nan)
    sketches = family_gradients(
        pair,
        batch,
        max_tokens_per_microbatch=config.hardware.max_tokens_per_microbatch,
        max_logits_per_chunk=config.hardware.max_logits_per_chunk,
    ).sketches
    products = pair_products(sketches.sketches, sketches.prompt)
    values = {}
    for name, estimator in ESTIMATORS.items():
        estimates = signal_noise_estimates(products, estimator_index(sketches, *estimator))
        signal, variance = estimates["signal"].value, estimates["variance"].value
        values[name] = signal / variance if variance > 0 else math.nan
    generator = torch.Generator().manual_seed(config.seed)
    choice = recommend_estimator(products, sketches, len(batch.scored), generator)
    return values | {"best_gamma": choice.gamma}
