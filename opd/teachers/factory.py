"""Construction of the student/teacher pairs of a run.

The student may train LoRA adapters only. The teacher may be another model, the student without its
adapters ("base"), an exponential moving average of the student ("ema"), or a model on a vLLM
server. A teacher in this process can be kept in host memory while it does not score.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.config.settings import Config
from opd.models.lm_head import LmHead
from opd.models.loading import (
    check_same_vocabulary,
    eos_ids,
    load_model,
    num_head_rows,
    resolve_device,
    tokenizer_eos_first,
)
from opd.models.lora import add_lora, without_adapters
from opd.models.model import CausalLM, split_head
from opd.serving.addresses import is_url
from opd.teachers.client import connect
from opd.teachers.pair import ModelPair, load_pair
from opd.tokens.eos import EosMap


def make_pairs(settings: Sequence[Config]) -> list[ModelPair]:
    """Build a pair for each task, all with the same student; equal teachers are loaded once.

    Args:
        settings: The configuration of each task.

    Returns:
        A pair for each configuration, in order.

    Raises:
        InvalidInput: Several tasks with a teacher derived from the student, quantisation without a
            teacher in this process, or what `make_pair` raises.
    """
    first, *remaining = settings
    if first.teacher_weights != "saved" and all(is_url(config.teacher) for config in settings):
        raise InvalidInput(
            f"teacher_weights is {first.teacher_weights}, but no teacher runs in this process; set "
            "it to saved: quantisation of a server's model is configured in the server"
        )
    pairs_by_teacher = {first.teacher: make_pair(first)}
    pairs = [pairs_by_teacher[first.teacher]]
    for config in remaining:
        names = (first.teacher, config.teacher)
        if derived_teachers := sorted({"base", "ema"}.intersection(names)):
            raise InvalidInput(
                f"teacher {derived_teachers[0]!r} is derived from the student and cannot be used "
                "with several tasks; give each task a model"
            )
        if config.teacher not in pairs_by_teacher:
            pairs_by_teacher[config.teacher] = with_teacher(pairs[0], config)
        pairs.append(pairs_by_teacher[config.teacher])
    for config, pair in zip(settings, pairs, strict=True):
        if pair.remote_teacher is not None:
            pair.remote_teacher.check_length(config.max_prompt + config.max_response)
    return pairs


def make_pair(config: Config) -> ModelPair:
    """Build the configured student and teacher.

    Args:
        config: Settings of the run or task.

    Returns:
        The pair.

    Raises:
        InvalidInput: Teacher "base" without LoRA adapters, or a pair that `load_pair` rejects.
    """
    device = resolve_device(config.device)
    if config.teacher not in ("base", "ema") and not is_url(config.teacher):
        options = (device, config.dtype, config.trust_remote_code, config.teacher_weights)
        pair = load_pair(config.student, config.teacher, *options)
        if not config.lora_rank:
            return pair
        network = add_lora(pair.student.network, config)
        return replace(pair, student=split_head(network, pair.student.vocabulary))
    tokenizer, network = load_model(config.student, device, config.dtype, config.trust_remote_code)
    if config.teacher == "base" and not config.lora_rank:
        raise InvalidInput(
            'teacher "base" is the student without its LoRA adapters, but lora_rank is 0; set '
            "lora_rank, or choose another teacher"
        )
    eos, vocabulary = eos_ids(tokenizer, network), num_head_rows(network)
    if config.lora_rank:
        network = add_lora(network, config)
    student = split_head(network, vocabulary)
    if is_url(config.teacher):
        return with_remote_teacher(ModelPair(student, student, tokenizer, eos), config)
    teacher = without_adapters(student) if config.teacher == "base" else make_ema_teacher(student)
    return ModelPair(student, teacher, tokenizer, eos)


def with_teacher(pair: ModelPair, config: Config) -> ModelPair:
    """Combine a pair's student with another teacher.

    Args:
        pair: The pair with the student.
        config: Settings of the task; with offload_teacher the teacher stays in host memory.

    Returns:
        A pair with the configured teacher.

    Raises:
        InvalidInput: The tokenizers differ, or the teacher has fewer ids than the first teacher.
    """
    if is_url(config.teacher):
        return with_remote_teacher(pair, config)
    device = "cpu" if config.offload_teacher else resolve_device(config.device)
    options = (device, config.dtype, config.trust_remote_code, config.teacher_weights)
    tokenizer, network = load_model(config.teacher, *options)
    check_same_vocabulary(pair.tokenizer, tokenizer)
    vocabulary = pair.student.vocabulary
    if num_head_rows(network) < vocabulary:
        raise InvalidInput(
            f"{config.teacher} has {num_head_rows(network)} ids, but the first task's pair uses "
            f"{vocabulary}; put the task whose teacher has the fewest ids first"
        )
    network.requires_grad_(False)
    teacher_eos = tokenizer_eos_first(tokenizer, eos_ids(tokenizer, network))
    student_eos = tokenizer_eos_first(pair.tokenizer, pair.eos)
    teacher = split_head(network, vocabulary)
    return replace(
        pair, teacher=teacher, eos_map=EosMap(student_eos, teacher_eos), remote_teacher=None
    )


def with_remote_teacher(pair: ModelPair, config: Config) -> ModelPair:
    """Combine a pair's student with a teacher on a server, which has no weights in this process.

    Args:
        pair: The pair with the student.
        config: Settings of the task; `teacher` is an address.

    Returns:
        A pair whose `remote_teacher` is set.

    Raises:
        InvalidInput: See `opd.teachers.client.connect`.
        OperationFailed: See `opd.teachers.client.connect`.
    """
    vocabulary = pair.student.vocabulary
    client = connect(
        config.teacher,
        pair.tokenizer,
        vocabulary,
        k=config.support_k,
        timeout=config.teacher_timeout,
        concurrency=config.teacher_concurrency,
    )

    def hidden(ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        raise InvalidInput(
            f"the teacher {config.teacher} is a server, which provides neither hidden states nor "
            "full distributions; use a teacher in this process"
        )

    teacher = CausalLM(torch.nn.Module(), hidden, lambda: LmHead(None, vocabulary), vocabulary)
    return replace(pair, teacher=teacher, eos_map=None, remote_teacher=client)


def with_sharded_student(pairs: Sequence[ModelPair]) -> list[ModelPair]:
    """Shard the student, which all pairs share, over all processes with FSDP.

    Args:
        pairs: Pairs with the same student.

    Returns:
        The pairs with the sharded student (`opd.models.fsdp`); teachers are not sharded.
    """
    from opd.models.fsdp import shard_model

    unsharded_student = pairs[0].student
    student = shard_model(unsharded_student)
    sharded_pairs = []
    for pair in pairs:
        same_network = pair.teacher.network is unsharded_student.network
        teacher = without_adapters(student) if same_network else pair.teacher
        sharded_pairs.append(replace(pair, student=student, teacher=teacher))
    return sharded_pairs


def make_ema_teacher(student: CausalLM) -> CausalLM:
    """Return a float32 copy of the student, to be updated by `update_ema_teacher`."""
    network = copy.deepcopy(student.network).float().requires_grad_(False)
    return split_head(network, student.vocabulary)


@torch.no_grad()
def update_ema_teacher(teacher: CausalLM, student: CausalLM, decay: float) -> None:
    """Set teacher <- decay * teacher + (1 - decay) * student, for every weight."""
    weight_pairs = zip(teacher.network.parameters(), student.network.parameters(), strict=True)
    for teacher_weight, student_weight in weight_pairs:
        teacher_weight.lerp_(student_weight.to(teacher_weight), 1 - decay)
