"""Roles: who is student and who is teacher, and what each is spared.

The student may train adapters only; the teacher may be another model, the student without its
adapters ("base"), a moving average of the student ("ema"), or a model on a server. The teacher may
live in host memory while it does not score, and the student may recompute its activations in the
backward pass.
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
    end_ids,
    head_rows,
    load,
    own_first,
    resolve_device,
)
from opd.models.lora import adapted, without_adapters
from opd.models.model import CausalLM, split
from opd.serving.addresses import is_url
from opd.teachers.client import connect
from opd.teachers.pair import ModelPair, load_pair
from opd.tokens.eos import EosMap


def make_pairs(settings: Sequence[Config]) -> list[ModelPair]:
    """A pair for the settings of each task, with one student; a teacher that several name is one.

    Raises:
      ValueError: several tasks and a teacher that is made of the student; nothing to quantise; or
        what `make_pair` raises.
    """
    first, *others = settings
    if first.teacher_weights != "saved" and all(is_url(config.teacher) for config in settings):
        raise InvalidInput(
            f"teacher_weights is {first.teacher_weights}, and no teacher is in this process; set "
            "it to saved: a server has settings of its own"
        )
    pairs = {first.teacher: make_pair(first)}
    kept = [pairs[first.teacher]]
    for config in others:
        names = (first.teacher, config.teacher)
        if moving := sorted({"base", "ema"}.intersection(names)):
            raise InvalidInput(
                f"teacher {moving[0]!r} is of the student; tasks need named teachers"
            )
        if config.teacher not in pairs:
            pairs[config.teacher] = with_teacher(kept[0], config)
        kept.append(pairs[config.teacher])
    for config, pair in zip(settings, kept, strict=True):
        if pair.remote is not None:
            pair.remote.check_length(config.max_prompt + config.max_response)
    return kept


def make_pair(config: Config) -> ModelPair:
    """The configured student and teacher.

    Raises:
      ValueError: "base" without adapters, or a pair that `load_pair` refuses.
    """
    device = resolve_device(config.device)
    if config.teacher not in ("base", "ema") and not is_url(config.teacher):
        how = (device, config.dtype, config.trust_remote_code, config.teacher_weights)
        pair = load_pair(config.student, config.teacher, *how)
        if not config.lora_rank:
            return pair
        network = adapted(pair.student.network, config)
        return replace(pair, student=split(network, pair.student.vocabulary))
    tokenizer, network = load(config.student, device, config.dtype, config.trust_remote_code)
    if config.teacher == "base" and not config.lora_rank:
        raise InvalidInput(
            'teacher "base" is the student with its adapters off, and there are none; set '
            "lora_rank, or name a teacher"
        )
    eos, vocabulary = end_ids(tokenizer, network), head_rows(network)
    if config.lora_rank:
        network = adapted(network, config)
    student = split(network, vocabulary)
    if is_url(config.teacher):
        return with_server(ModelPair(student, student, tokenizer, eos), config)
    teacher = without_adapters(student) if config.teacher == "base" else average(student)
    return ModelPair(student, teacher, tokenizer, eos)


def with_teacher(pair: ModelPair, config: Config) -> ModelPair:
    """The pair's student with the configured teacher, which stays in host memory if offloaded.

    Raises:
      ValueError: the tokenizers differ, or the teacher has fewer ids than the first one.
    """
    if is_url(config.teacher):
        return with_server(pair, config)
    device = "cpu" if config.offload_teacher else resolve_device(config.device)
    how = (device, config.dtype, config.trust_remote_code, config.teacher_weights)
    tokenizer, network = load(config.teacher, *how)
    check_same_vocabulary(pair.tokenizer, tokenizer)
    vocabulary = pair.student.vocabulary
    if head_rows(network) < vocabulary:
        raise InvalidInput(
            f"{config.teacher} has {head_rows(network)} ids and the student's are read to "
            f"{vocabulary}; name the task with the fewest ids first"
        )
    network.requires_grad_(False)
    theirs = own_first(tokenizer, end_ids(tokenizer, network))
    ours = own_first(pair.tokenizer, pair.eos)
    teacher = split(network, vocabulary)
    return replace(pair, teacher=teacher, endings=EosMap(ours, theirs), remote=None)


def with_server(pair: ModelPair, config: Config) -> ModelPair:
    """The pair's student with a teacher on a server, which has no weights here.

    Raises:
      ValueError, RuntimeError: what `opd.teachers.client.connect` raises.
    """
    vocabulary = pair.student.vocabulary
    remote = connect(
        config.teacher,
        pair.tokenizer,
        vocabulary,
        k=config.support_k,
        patience=config.teacher_timeout,
        in_flight=config.teacher_concurrency,
    )

    def hidden(ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        raise InvalidInput(
            f"the teacher {config.teacher} is on a server, which tells no hidden states and no "
            "whole distributions; this needs a teacher in this process"
        )

    teacher = CausalLM(torch.nn.Module(), hidden, lambda: LmHead(None, vocabulary), vocabulary)
    return replace(pair, teacher=teacher, endings=None, remote=remote)


def with_sharded_student(pairs: Sequence[ModelPair]) -> list[ModelPair]:
    """The pairs with their one student shared out among all processes (opd.models.fsdp)."""
    from opd.models.fsdp import sharded

    old = pairs[0].student
    student = sharded(old)
    made = []
    for pair in pairs:
        own = pair.teacher.network is old.network
        teacher = without_adapters(student) if own else pair.teacher
        made.append(replace(pair, student=student, teacher=teacher))
    return made


def average(student: CausalLM) -> CausalLM:
    """A float32 copy of the student, to be moved by `follow`."""
    network = copy.deepcopy(student.network).float().requires_grad_(False)
    return split(network, student.vocabulary)


@torch.no_grad()
def follow(teacher: CausalLM, student: CausalLM, decay: float) -> None:
    """teacher <- decay teacher + (1 - decay) student, every weight."""
    pairs = zip(teacher.network.parameters(), student.network.parameters(), strict=True)
    for slow, fast in pairs:
        slow.lerp_(fast.to(slow), 1 - decay)
