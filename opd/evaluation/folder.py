"""Evaluate a saved model by its folder or hub name: load it, load the problems, and measure."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diagnostics.errors import InvalidInput
from diagnostics.records.run_cost import run_cost
from opd.config.groups import EvalConfig, GamesConfig
from opd.data.chat_template import set_chat_template
from opd.data.sources import DEFAULT_COLUMNS, Columns
from opd.data.tasks import Task, load_task, prompt_hash, reject_long_prompts, skip_long_prompts
from opd.envs.task import GameTask, is_games, load_games
from opd.evaluation.answer_confidence import answer_confidence
from opd.evaluation.calibration import calibration_metrics, excess_by_problem, vote_confidence
from opd.evaluation.comparison import compare_results, with_prefix
from opd.evaluation.evaluate import evaluation_result, problem_fingerprint
from opd.evaluation.harness_export import Harness, export_task
from opd.evaluation.measures import BY_PROBLEM, NO_MEASURES, Measures
from opd.evaluation.recovery import RecoveryRecord, measure_recovery
from opd.evaluation.responses import GradedResponses, respond
from opd.evaluation.teacher_ceiling import ceiling_metrics
from opd.models.loading import check_same_vocabulary, eos_ids, load_model, num_head_rows
from opd.models.model import CausalLM, split_head
from opd.rollouts.hf_engine import HfEngine
from opd.runtime.seeds import CALIBRATION, derive_seed


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Problems of an evaluation, how they are asked, and how responses are sampled and graded."""

    task: str = "lab"
    """Name of the task, of whose problems a tenth is held out."""
    evaluation: EvalConfig = field(default=EvalConfig())
    """Number of problems, sampling, and another task, all of whose problems are used."""
    games: GamesConfig = field(default=GamesConfig())
    """Layout and length of games; ignored for problems without turns."""
    max_prompt: int
    """Maximum prompt tokens."""
    max_response: int
    """Maximum response tokens."""
    seed: int
    """Seed of the sampling."""
    device: str
    """Device."""
    dtype: str = "float32"
    """Name of a torch dtype."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    skip_long: bool = False
    """Skip prompts that are too long instead of refusing them."""
    columns: Columns = DEFAULT_COLUMNS
    """Columns of `task`."""
    grader: str = ""
    """Grader, see `opd.data.tasks.load_task`."""
    system: str = ""
    """System message of every prompt."""
    template: Mapping[str, Any] | None = None
    """Settings of the chat template."""
    chat_template: str = ""
    """Jinja file of a chat template in the place of the model's own; "" for that."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A saved model, as it is sampled and scored."""

    tokenizer: Any
    model: CausalLM
    """With all rows of its head."""
    eos: list[int]
    """Ids that end a response."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Graded responses of a model, and what was measured."""

    graded: GradedResponses
    """The responses."""
    metrics: dict[str, Any]
    """`opd.evaluation.evaluate.evaluation_result`, and the results of further measures."""
    recovery: list[RecoveryRecord]
    """The continued prefixes."""
    loaded: LoadedModel
    """The model."""
    problems: Task | GameTask
    """The task."""


def respond_folder(name: str, task: str, **settings: Any) -> GradedResponses:
    """Run `opd.evaluation.responses.respond` for a saved model and a task by name.

    Args:
        name: Folder or hub name of the model.
        task: Name of the task.
        **settings: Further fields of EvaluationSettings.

    Returns:
        The graded responses.

    Raises:
        InvalidInput: Two tasks are given, or the models or problems cannot be used.
    """
    checked_settings = EvaluationSettings(task=task, **settings)
    refuse_two_tasks(checked_settings)
    loaded = load_evaluated(name, checked_settings)
    problems = load_problems(loaded.tokenizer, checked_settings)
    return respond_with(loaded, problems, checked_settings)


def evaluate_folder(name: str, task: str, **settings: Any) -> dict[str, Any]:
    """Return `evaluation_result` of `respond_folder`."""
    return evaluation_result(respond_folder(name, task, **settings))


def measure_folder(
    name: str,
    settings: EvaluationSettings,
    measures: Measures = NO_MEASURES,
    against: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Evaluate a saved model, such as RUN/final, with further measures.

    Whatever can be refused is refused before anything is sampled.

    Args:
        name: Folder or hub name of the model.
        settings: Problems and sampling.
        measures: What to measure beside accuracy.
        against: Results of another model on the same problems, such as the student before
            training, to compare with (`opd.evaluation.comparison.compare_results`).

    Returns:
        The responses, and the results by name.

    Raises:
        InvalidInput: A measure does not apply to the task, a model or problems cannot be used, or
            the other model was evaluated on other problems.
    """
    refuse_two_tasks(settings)
    refuse_games(settings, measures)
    loaded = load_evaluated(name, settings)
    problems = load_problems(loaded.tokenizer, settings)
    if against is not None and isinstance(problems, Task):
        refuse_other_problems(problems, settings, against)
    other_settings = other_task_settings(settings, measures)
    other_problems = None
    if measures.other_task:
        other_problems = load_problems(loaded.tokenizer, other_settings)
        refuse_shared_problems(problems, other_problems, settings, measures.other_task)
    teacher = None
    if measures.teacher:
        teacher = load_evaluated(measures.teacher, settings)
        check_same_vocabulary(loaded.tokenizer, teacher.tokenizer)

    graded = respond_with(loaded, problems, settings)
    metrics = evaluation_result(graded) | cost_of_model(Path(name))
    if measures.calibration:
        metrics |= calibrate(loaded, graded, settings)
    records: list[RecoveryRecord] = []
    if measures.recovery != "none":
        assert isinstance(problems, Task)
        recovery_metrics, records = measure_recovery(
            HfEngine(loaded.model),
            loaded.model,
            loaded.tokenizer,
            loaded.eos,
            graded,
            problems.grade,
            kind=measures.recovery,
            source=measures.recovery_prefix,
            max_prompt=settings.max_prompt,
            max_response=settings.max_response,
            temperature=settings.evaluation.eval_temperature,
            top_p=settings.evaluation.eval_top_p,
            seed=settings.seed,
        )
        metrics |= with_prefix("recovery", recovery_metrics)
    if other_problems is not None:
        other_graded = respond_with(loaded, other_problems, other_settings)
        metrics |= with_prefix("other", evaluation_result(other_graded))
    if teacher is not None:
        teacher_result = evaluation_result(respond_with(teacher, problems, settings))
        metrics |= ceiling_metrics(metrics, teacher_result, against)
    if against is not None:
        metrics |= with_prefix("against", compare_results(against, metrics))
    return Evaluation(graded, metrics, records, loaded, problems)


def export_evaluation(
    harness: Harness, folder: Path, evaluation: Evaluation, settings: EvaluationSettings
) -> None:
    """Write a folder with which lm-eval or Inspect repeats an evaluation (`export_task`)."""
    assert isinstance(evaluation.problems, Task)
    sampling = settings.evaluation
    export_task(
        harness,
        folder,
        evaluation.loaded.tokenizer,
        evaluation.loaded.eos,
        evaluation.problems,
        problems=sampling.eval_problems,
        max_response=settings.max_response,
        temperature=sampling.eval_temperature,
        top_p=sampling.eval_top_p,
        samples=sampling.eval_samples,
    )


def cost_of_model(path: Path) -> dict[str, float]:
    """Return what the run has cost that trained a model, if it is final/ of a run folder."""
    run = path.resolve().parent
    is_final = path.name == "final" and (run / "rows.jsonl").exists()
    return run_cost(run) if is_final else {}


def load_evaluated(name: str, settings: EvaluationSettings) -> LoadedModel:
    """Load a model with its tokenizer, chat template and EOS ids."""
    tokenizer, network = load_model(
        name, settings.device, settings.dtype, settings.trust_remote_code
    )
    set_chat_template(tokenizer, settings.chat_template)
    model = split_head(network, num_head_rows(network))
    return LoadedModel(tokenizer, model, eos_ids(tokenizer, network))


def load_problems(tokenizer: Any, settings: EvaluationSettings) -> Task | GameTask:
    """Load the held-out problems or games.

    Args:
        tokenizer: The model's tokenizer.
        settings: Settings of the evaluation.

    Returns:
        The task.

    Raises:
        InvalidInput: The problems cannot be used.
    """
    evaluation = settings.evaluation
    source, columns = settings.task, settings.columns
    if evaluation.eval_task:
        source = evaluation.eval_task
        columns = replace(
            columns, prompt=evaluation.eval_prompt_column, answer=evaluation.eval_answer_column
        )
    if is_games(source):
        return load_games(
            source,
            0,
            system=settings.system,
            layout=settings.games.layout,
            max_turns=settings.games.max_turns,
            history=settings.games.history_turns,
            template=tuple((settings.template or {}).items()),
        )
    handle_long_prompts = skip_long_prompts if settings.skip_long else reject_long_prompts
    return load_task(
        source,
        0,
        test=evaluation.eval_task if source != "lab" else "",
        grader=settings.grader,
        system=settings.system,
        template=settings.template,
        columns=columns,
        handle_long_prompts=partial(handle_long_prompts, tokenizer, settings.max_prompt),
    )


def respond_with(
    loaded: LoadedModel, problems: Task | GameTask, settings: EvaluationSettings
) -> GradedResponses:
    """Sample and grade the responses of a loaded model to held-out problems."""
    evaluation = settings.evaluation
    return respond(
        HfEngine(loaded.model),
        loaded.tokenizer,
        loaded.eos,
        problems,
        problems=evaluation.eval_problems,
        max_prompt=settings.max_prompt,
        max_response=settings.max_response,
        temperature=evaluation.eval_temperature,
        generator=torch.Generator().manual_seed(settings.seed),
        samples=evaluation.eval_samples,
        top_p=evaluation.eval_top_p,
    )


def calibrate(
    loaded: LoadedModel, graded: GradedResponses, settings: EvaluationSettings
) -> dict[str, Any]:
    """Return the calibration of the answers' probability and, with several samples, of the vote.

    Args:
        loaded: The model.
        graded: Its responses.
        settings: Settings of the evaluation.

    Returns:
        `calibration/NAME` and `vote/NAME` for every name of
        `opd.evaluation.calibration.calibration_metrics`, and `calibration/by_problem`.
    """
    generator = np.random.default_rng(derive_seed(settings.seed, 0, CALIBRATION))
    confidence = answer_confidence(loaded.model, loaded.tokenizer, graded, settings.max_prompt)
    metrics = with_prefix("calibration", calibration_metrics(confidence, graded.correct, generator))
    sums, counts = excess_by_problem(confidence, graded.correct)
    pairs = zip(sums.tolist(), counts.tolist(), strict=True)
    metrics[f"calibration/{BY_PROBLEM}"] = [list(pair) for pair in pairs]
    if graded.correct.shape[1] > 1:
        votes = vote_confidence(graded.answers)
        metrics |= with_prefix("vote", calibration_metrics(votes, graded.correct, generator))
    return metrics


def other_task_settings(settings: EvaluationSettings, measures: Measures) -> EvaluationSettings:
    """Return the settings of the second task: the same sampling, all of its problems."""
    is_lab = measures.other_task == "lab"
    evaluation = replace(
        settings.evaluation,
        eval_task="" if is_lab else measures.other_task,
        eval_prompt_column=measures.other_prompt_column,
        eval_answer_column=measures.other_answer_column,
    )
    return replace(settings, task="lab", evaluation=evaluation, grader=measures.other_grader)


def refuse_two_tasks(settings: EvaluationSettings) -> None:
    """Refuse a task beside one of which all problems are used."""
    if settings.evaluation.eval_task and settings.task != "lab":
        raise InvalidInput(
            f"eval_task is {settings.evaluation.eval_task!r}, of which all problems are used, and "
            f"task is {settings.task!r}; leave one of them out"
        )


def refuse_games(settings: EvaluationSettings, measures: Measures) -> None:
    """Refuse measures of stated answers on games."""
    source = settings.evaluation.eval_task or settings.task
    if is_games(source) and measures.need_responses:
        names = ["calibration"] * measures.calibration + ["recovery"] * (
            measures.recovery != "none"
        )
        raise InvalidInput(
            f"{' and '.join(names)} cannot be measured on {source}: an episode has several "
            "responses and no stated answer; leave it out, or use a task of problems"
        )


def refuse_other_problems(
    problems: Task, settings: EvaluationSettings, against: Mapping[str, Any]
) -> None:
    """Refuse to compare with an evaluation on other problems, before anything is sampled."""
    test_problems = problems.test(settings.evaluation.eval_problems)
    fingerprint = problem_fingerprint(test_problems)
    if against["problem_set"] != fingerprint:
        raise InvalidInput(
            f"the evaluations used different problems ({against['problems']}, set "
            f"{against['problem_set']}; {len(test_problems)}, set {fingerprint}); evaluate both on "
            "the same task"
        )


def refuse_shared_problems(
    problems: Task | GameTask,
    other_problems: Task | GameTask,
    settings: EvaluationSettings,
    other_task: str,
) -> None:
    """Refuse a second task with problems of the first one."""
    count = settings.evaluation.eval_problems
    if isinstance(problems, GameTask) or isinstance(other_problems, GameTask):
        is_shared = [problems == other_problems]
    else:
        hashes = {prompt_hash(problem) for problem in problems.test(count)}
        is_shared = [prompt_hash(problem) in hashes for problem in other_problems.test(count)]
    if any(is_shared):
        raise InvalidInput(
            f"{sum(is_shared)} of the {len(is_shared)} problems of other_task {other_task!r} are "
            "problems of the task itself; choose a task that was not trained"
        )
