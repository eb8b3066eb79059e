"""Construction of the student/teacher pairs of a run.

The student may train LoRA adapters only. The teacher may be another model, the student without its
adapters ("base"), an exponential moving average of the student ("ema"), or a model on a
server; this module makes the `opd.teachers.teacher.Teacher` that the settings name. A teacher in
this process can be kept in host memory while it does not score.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput
from opd.config.settings import Config
from opd.config.view import has_view
from opd.data.chat_template import set_chat_template
from opd.models.loading import (
    check_has_eos,
    check_same_vocabulary,
    eos_ids,
    load_or_use,
    num_head_rows,
    object_name,
    resolve_device,
)
from opd.models.lora import add_lora, without_adapters
from opd.models.model import CausalLM, split_head
from opd.teachers.connection import connect
from opd.teachers.pair import ModelPair, freeze_teacher, load_pair
from opd.teachers.score_cache.cache import open_cache
from opd.teachers.score_cache.files import read_index
from opd.teachers.teacher import (
    CACHE_PREFIX,
    AdapterFreeTeacher,
    CachedTeacher,
    NoTeacher,
    ServerTeacher,
    Teacher,
    make_ema_teacher,
    teacher_type,
)


@dataclass(frozen=True, eq=False)
class ModelObjects:
    """Models in memory, in the place of those that the settings name."""

    student: Any = None
    """Model of the student; None to load it."""
    teacher: Any = None
    """Model of the teacher; None to load or derive it."""
    tokenizer: Any = None
    """Their tokenizer."""

    def names(self) -> dict[str, str]:
        """Return the settings under which a run records the models."""
        models = {"student": self.student, "teacher": self.teacher}
        return {role: object_name(model) for role, model in models.items() if model is not None}

    def student_of(self, config: Config) -> Any:
        """Return the student, or the name of the one to load."""
        return config.student if self.student is None else self.student

    def teacher_of(self, config: Config) -> Any:
        """Return the teacher if the settings of a task are about it, or the name of another."""
        is_object = self.teacher is not None and config.teacher == object_name(self.teacher)
        return self.teacher if is_object else config.teacher


NO_OBJECTS = ModelObjects()


def make_pairs(
    settings: Sequence[Config], objects: ModelObjects = NO_OBJECTS, num_chosen: int = 0
) -> list[ModelPair]:
    """Build a pair for each task, all with the same student; equal teachers are loaded once.

    Args:
        settings: The configuration of each task.
        objects: Models in memory.
        num_chosen: Number of ids per position at which a teacher on a server will be read although
            they are not among its own most probable (`opd.scoring.chosen_ids.num_chosen_ids`).

    Returns:
        A pair for each configuration, in order.

    Raises:
        InvalidInput: See `make_pair` and `load_teacher`.
    """
    first, *remaining = settings
    pair = make_pair(first, objects, num_chosen)
    teachers = {first.teacher: pair.teacher}
    for config in remaining:
        if config.teacher not in teachers:
            teachers[config.teacher] = load_teacher(pair, config, objects, num_chosen)
    pairs = [replace(pair, teacher=teachers[config.teacher]) for config in settings]
    for config, task_pair in zip(settings, pairs, strict=True):
        max_prompt = config.data.max_prompt
        if has_view(config):  # without a limit of its own, `opd.training.teacher_view` checks it
            max_prompt = config.view.max_teacher_prompt
        task_pair.teacher.check_length(max_prompt + config.rollout.max_response)
    return pairs


def make_pair(config: Config, objects: ModelObjects = NO_OBJECTS, num_chosen: int = 0) -> ModelPair:
    """Build the configured student and teacher.

    Args:
        config: Settings of the run or task.
        objects: Models in memory.
        num_chosen: As in `make_pairs`.

    Returns:
        The pair.

    Raises:
        InvalidInput: Teacher "base" without LoRA adapters, or a pair that `load_pair` rejects.
    """
    device = resolve_device(config.hardware.device)
    if teacher_type(config.teacher).is_separate:
        options = (
            device,
            config.hardware.dtype,
            config.hardware.trust_remote_code,
            config.hardware.teacher_weights,
        )
        pair = load_pair(
            objects.student_of(config),
            objects.teacher_of(config),
            *options,
            config.hardware.offload_teacher,
            objects.tokenizer,
        )
        set_chat_template(pair.tokenizer, config.data.chat_template)
        if not config.optimizer.lora_rank:
            return pair
        network = add_lora(pair.student.network, config)
        return replace(pair, student=split_head(network, pair.student.vocabulary))
    tokenizer, network = load_or_use(
        objects.student_of(config),
        objects.tokenizer,
        device,
        config.hardware.dtype,
        config.hardware.trust_remote_code,
    )
    set_chat_template(tokenizer, config.data.chat_template)
    if config.teacher == "base" and not config.optimizer.lora_rank:
        raise InvalidInput(
            'teacher "base" is the student without its LoRA adapters, but lora_rank is 0; set '
            "lora_rank, or choose another teacher"
        )
    eos, vocabulary = eos_ids(tokenizer, network), num_head_rows(network)
    if teacher_type(config.teacher) is CachedTeacher:
        # the ids that both models know, as where the teacher is loaded
        vocabulary = min(vocabulary, read_index(cache_folder(config)).header.vocabulary)
    if config.optimizer.lora_rank:
        network = add_lora(network, config)
    student = split_head(network, vocabulary)
    teacher: Teacher
    if config.teacher == "base":
        teacher = AdapterFreeTeacher(without_adapters(student))
    elif teacher_type(config.teacher) is NoTeacher:
        teacher = NoTeacher()
    elif teacher_type(config.teacher) is CachedTeacher:
        teacher = open_cached_teacher(config, student, tokenizer, eos)
    elif config.teacher == "ema":
        teacher = make_ema_teacher(
            student, config.optimizer.ema_decay, config.hardware.offload_teacher
        )
    else:
        teacher = connect_teacher(student, tokenizer, config, num_chosen)
    return ModelPair(student, teacher, tokenizer, eos)


def load_teacher(
    pair: ModelPair, config: Config, objects: ModelObjects = NO_OBJECTS, num_chosen: int = 0
) -> Teacher:
    """Load or connect the teacher of a further task.

    Args:
        pair: The first task's pair.
        config: Settings of the task; with offload_teacher the teacher stays in host memory.
        objects: Models in memory.
        num_chosen: As in `make_pairs`.

    Returns:
        The teacher, for the pair's student.

    Raises:
        InvalidInput: The tokenizers differ, or the teacher has fewer ids than the first teacher.
    """
    if teacher_type(config.teacher) is NoTeacher:
        return NoTeacher()
    if teacher_type(config.teacher) is CachedTeacher:
        return open_cached_teacher(config, pair.student, pair.tokenizer, pair.eos)
    if teacher_type(config.teacher) is ServerTeacher:
        return connect_teacher(pair.student, pair.tokenizer, config, num_chosen)
    device = "cpu" if config.hardware.offload_teacher else resolve_device(config.hardware.device)
    options = (
        device,
        config.hardware.dtype,
        config.hardware.trust_remote_code,
        config.hardware.teacher_weights,
    )
    loaded_teacher = load_or_use(objects.teacher_of(config), objects.tokenizer, *options)
    tokenizer, network = loaded_teacher
    check_same_vocabulary(pair.tokenizer, tokenizer)
    vocabulary = pair.student.vocabulary
    if num_head_rows(network) < vocabulary:
        raise InvalidInput(
            f"{config.teacher} has {num_head_rows(network)} ids, but the first task's pair uses "
            f"{vocabulary}; put the task whose teacher has the fewest ids first"
        )
    check_has_eos(tokenizer, network)
    return freeze_teacher(
        config.teacher,
        loaded_teacher,
        vocabulary,
        is_quantised=config.hardware.teacher_weights != "saved",
        offload=config.hardware.offload_teacher,
    )


def cache_folder(config: Config) -> Path:
    """Return the folder of the cache that `teacher` names."""
    return Path(config.teacher.removeprefix(CACHE_PREFIX))


def open_cached_teacher(
    config: Config, student: CausalLM, tokenizer: object, eos: Sequence[int]
) -> CachedTeacher:
    """Open the cache that `teacher` names, and check that it suits the loss.

    Args:
        config: Settings of the task.
        student: The student.
        tokenizer: Its tokenizer.
        eos: Ids that end a response of the student.

    Returns:
        The teacher.

    Raises:
        InvalidInput: The cache is damaged, or was made for another tokenizer, temperature, K or
            mapping of EOS ids.
        MissingFile: There is none.
    """
    cache = open_cache(cache_folder(config), tokenizer, student.vocabulary)
    cache.check_temperature(config.rollout.temperature)
    cache.check_k(config.objective.support_k)
    cache.check_eos(tuple(eos) if config.objective.map_eos else None)
    return CachedTeacher(config.teacher, cache)


def connect_teacher(
    student: CausalLM, tokenizer: object, config: Config, num_chosen: int = 0
) -> ServerTeacher:
    """Connect to a teacher on a server.

    Args:
        student: The student.
        tokenizer: The student's tokenizer.
        config: Settings of the task; `teacher` is an address.
        num_chosen: As in `make_pairs`.

    Returns:
        The teacher.

    Raises:
        InvalidInput: An EOS id is not in the vocabulary, or see `opd.teachers.connection.connect`.
        OperationFailed: See `opd.teachers.connection.connect`.
    """
    eos = config.remote_teacher.teacher_eos
    if eos and max(eos) >= student.vocabulary:
        raise InvalidInput(
            f"teacher_eos has the id {max(eos)}, but the vocabulary has {student.vocabulary} ids"
        )
    client = connect(
        config.teacher,
        tokenizer,
        student.vocabulary,
        k=config.objective.support_k,
        timeout=config.remote_teacher.teacher_timeout,
        concurrency=config.remote_teacher.teacher_concurrency,
        num_chosen=num_chosen,
    )
    return ServerTeacher(config.teacher, client, eos or None)


def with_sharded_student(pairs: Sequence[ModelPair]) -> list[ModelPair]:
    """Shard the student, which all pairs share, over all processes with FSDP.

    Args:
        pairs: Pairs with the same student.

    Returns:
        The pairs with the sharded student (`opd.models.fsdp`); teachers are not sharded.
    """
    from opd.models.fsdp import shard_model

    student = shard_model(pairs[0].student)
    return [
        replace(pair, student=student, teacher=pair.teacher.with_student(student)) for pair in pairs
    ]
