"""Make a cache of a teacher's scores for the steps of a run, and check one against a run.

The steps are those of `opd train` with the same settings: the same prompts and responses, scored in
the same batches, so that a run with the cache has the bits of the run with the teacher.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from diagnostics.batch import Rollouts
from diagnostics.errors import InvalidInput
from opd.config.problems import raise_problems
from opd.config.settings import Config, with_settings
from opd.data.prompts import Prompts
from opd.rollouts.hf_engine import HfEngine
from opd.runtime.seeds import ROLLOUT
from opd.scoring.teacher_scores import score_teacher
from opd.teachers.factory import make_pair
from opd.teachers.pair import ModelPair
from opd.teachers.score_cache.cache import ScoreCache
from opd.teachers.score_cache.files import (
    CACHE_FILE,
    SHARD_BYTES,
    CacheHeader,
    CacheIndex,
    Shard,
    check_shards,
    read_index,
    stored_keys,
    write_index,
)
from opd.teachers.score_cache.identity import tokenizer_fingerprint, weights_fingerprint
from opd.teachers.score_cache.keys import batch_key, row_keys
from opd.teachers.teacher import CACHE_PREFIX, CachedTeacher, Capability, teacher_type
from opd.training.setup import make_task_states
from opd.training.state import TaskState
from opd.training.step import draw_problem_responses
from opd.training.validation import validate


def refuse_uncachable(config: Config) -> None:
    """Refuse settings of a run whose scores cannot be known before it.

    Args:
        config: Settings of the run, with the teacher that is to be scored.

    Raises:
        InvalidInput: Names the setting.
    """
    problems = validate(config)
    if config.tasks:
        problems.append(
            f"the settings have {len(config.tasks)} tasks; make a cache for each task's settings "
            "alone"
        )
    kind = teacher_type(config.teacher)
    if not kind.possible_capabilities or kind.follows_student or kind is CachedTeacher:
        problems.append(
            f"teacher is {config.teacher}, whose scores cannot be computed in advance; give a "
            "model, or the address of a server"
        )
    if config.rollout.prefixes != "dataset":
        problems.append(
            f"prefixes is {config.rollout.prefixes}, but only responses that are known before the "
            "run can be scored in advance; set prefixes to dataset"
        )
    raise_problems(problems)


def make_cache(config: Config, folder: Path) -> CacheIndex:
    """Score the responses of every step of a run with its teacher, and write them to a folder.

    A cache that was interrupted is continued after its last shard.

    Args:
        config: Settings of the run, with prefixes dataset and the teacher.
        folder: Folder of the cache.

    Returns:
        The content of its cache.json.

    Raises:
        InvalidInput: The settings do not go with a cache, or the folder holds that of other
            responses or of another teacher, tokenizer, temperature, K or mapping of EOS ids, or is
            damaged.
    """
    refuse_uncachable(config)
    pair = make_pair(config)
    task = make_task(config, pair)
    header = make_header(config, pair)
    index = CacheIndex(header=header, num_steps=config.steps)
    if (folder / CACHE_FILE).exists():
        index = continued_index(folder, index)
        refuse_other_responses(task, folder, index)
    folder.mkdir(parents=True, exist_ok=True)
    shard, first_step = Shard(), index.num_done
    with pair.teacher.on_device(pair.student.device):
        for step in tqdm(
            range(first_step, config.steps),
            initial=first_step,
            total=config.steps,
            desc=f"{folder.name} steps",
        ):
            prompts, rollouts = step_responses(task, step)
            scores = score_teacher(pair.teacher, prompts, rollouts, task.request)
            keys = row_keys(prompts.teacher_prompts, rollouts)
            shard.add(keys, batch_key(keys), rollouts.sampled.sum(1).tolist(), scores)
            if shard.num_bytes >= SHARD_BYTES or step + 1 == config.steps:
                index = write_shard(folder, index, shard, step + 1)
                shard = Shard()
    write_index(folder, index)
    return index


def write_shard(folder: Path, index: CacheIndex, shard: Shard, num_done: int) -> CacheIndex:
    """Write a shard and the cache.json that lists it; return its content."""
    name = f"scores_{len(index.shards):05d}.safetensors"
    entry = shard.save(folder / name)
    index = replace(
        index,
        num_done=num_done,
        num_tokens=index.num_tokens + sum(shard.lengths),
        shards={**index.shards, name: entry},
    )
    write_index(folder, index)
    return index


def continued_index(folder: Path, wanted: CacheIndex) -> CacheIndex:
    """Return the content of a cache that is to be continued.

    Args:
        folder: Folder of the cache.
        wanted: What is to be made.

    Returns:
        The present content, for the wanted number of steps.

    Raises:
        InvalidInput: It holds other scores, or is damaged.
    """
    present = read_index(folder)
    differing = [
        f"{name} is {getattr(present.header, name)!r} instead of {getattr(wanted.header, name)!r}"
        for name in (field.name for field in dataclasses.fields(CacheHeader))
        if name != "teacher" and getattr(present.header, name) != getattr(wanted.header, name)
    ]
    if differing:
        raise InvalidInput(
            f"{folder} holds other scores: {'; '.join(differing)}; choose another folder"
        )
    check_shards(folder, present)
    return replace(present, num_steps=max(present.num_done, wanted.num_steps))


def refuse_other_responses(task: TaskState, folder: Path, index: CacheIndex) -> None:
    """Refuse to continue a cache whose steps are not those of the run.

    Args:
        task: The task.
        folder: Folder of the cache.
        index: Its cache.json.

    Raises:
        InvalidInput: A response of a step that is done is not in the cache.
    """
    stored = stored_keys(folder, index)
    for step in range(min(index.num_done, task.config.steps)):
        prompts, rollouts = step_responses(task, step)
        if not stored.issuperset(row_keys(prompts.teacher_prompts, rollouts)):
            raise InvalidInput(
                f"{folder} holds the scores of other responses than those of step {step}: it was "
                "made with other data, or with another seed, prompts_per_step, max_response or "
                "view of the teacher; choose another folder, or remove this one"
            )


def make_header(config: Config, pair: ModelPair) -> CacheHeader:
    """Return what identifies the scores of a run's teacher."""
    teacher, eos_map = pair.teacher, pair.eos_map
    is_local = Capability.HIDDEN_STATES in teacher.capabilities
    return CacheHeader(
        teacher=teacher.name,
        teacher_fingerprint=weights_fingerprint(teacher.model.network)
        if is_local
        else teacher.name,
        tokenizer_fingerprint=tokenizer_fingerprint(pair.tokenizer),
        vocabulary=pair.student.vocabulary,
        temperature=config.rollout.temperature,
        support_k=config.objective.support_k,
        teacher_eos=teacher.eos,
        mapped_eos=eos_map.student if config.objective.map_eos and eos_map is not None else None,
    )


def make_task(config: Config, pair: ModelPair) -> TaskState:
    """Return the state of a run's task, without a run folder."""
    (task,) = make_task_states(config, Path(config.out), [pair])
    return task


def step_responses(task: TaskState, step: int) -> tuple[Prompts, Rollouts]:
    """Return the prompts and the given responses of a step, on the student's device."""
    engine, device = HfEngine(task.pair.student), task.pair.student.device
    prompts, rollouts, _ = draw_problem_responses(
        task, engine, step, step, task.config.rollout.top_p, ROLLOUT
    )
    return prompts.to(device), rollouts.to(device)


def absent_steps(task: TaskState, cache: ScoreCache) -> Iterator[tuple[int, int]]:
    """Yield each step of a run with responses that a cache lacks, and their number."""
    for step in range(task.config.steps):
        prompts, rollouts = step_responses(task, step)
        if absent := cache.num_absent(prompts.teacher_prompts, rollouts):
            yield step, absent


def check_caches(tasks: Sequence[TaskState]) -> None:
    """Check the cache of a run's only task; several tasks find out as their steps come."""
    teacher = tasks[0].pair.teacher
    if len(tasks) == 1 and isinstance(teacher, CachedTeacher):
        check_coverage(tasks[0], teacher.cache)


def check_coverage(task: TaskState, cache: ScoreCache) -> None:
    """Refuse a cache that lacks responses of a run, before its first step.

    Args:
        task: The task.
        cache: The cache.

    Raises:
        InvalidInput: Names the first step that lacks some.
    """
    for step, absent in absent_steps(task, cache):
        raise InvalidInput(
            f"{absent} responses of step {step} are not in the cache {cache.folder}; make it with "
            "the data, seed, steps, prompts and lengths of the run (opd cache make)"
        )


def check_cache(config: Config, folder: Path) -> CacheIndex:
    """Check that a cache suits a run: its files, tokenizer, temperature, K, teacher and responses.

    Args:
        config: Settings of the run. If `teacher` is a model, its weights are compared too.
        folder: Folder of the cache.

    Returns:
        The content of its cache.json.

    Raises:
        InvalidInput: It does not suit the run; the message says why.
    """
    index = read_index(folder)
    if teacher_type(config.teacher) is not CachedTeacher:
        refuse_uncachable(config)
        continued_index(folder, replace(index, header=make_header(config, make_pair(config))))
    cached = with_settings(config, teacher=f"{CACHE_PREFIX}{folder}")
    raise_problems(validate(cached))
    pair = make_pair(cached)
    assert isinstance(pair.teacher, CachedTeacher)
    check_coverage(make_task(cached, pair), pair.teacher.cache)
    return index
