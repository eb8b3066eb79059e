"""TRL's AsyncDistillationTrainer: packed rows, rollouts of another process, teachers on servers.

`diagnostics.adapters.trl` is the public interface. Shapes: B responses, T response positions,
N tokens of a packed row, H hidden size, K + 1 ids of the teacher's answer.
"""

import inspect
import sys
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from diagnostics.adapters.from_logits import ends_with_eos
from diagnostics.adapters.trl_batches import make_batch
from diagnostics.adapters.trl_distillation import head_logits
from diagnostics.adapters.trl_watch import TrainerObserver, replace_attribute, single_call
from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput, OperationFailed
from diagnostics.records.columns import integer_id


def async_distillation(observer: TrainerObserver, stack: ExitStack) -> None:
    """Observe AsyncDistillationTrainer through the arguments of its chunked divergence."""
    trainer, name = observer.trainer, "_chunked_jsd_loss"
    defining_class = next(k for k in type(trainer).__mro__ if "_compute_loss" in vars(k))
    module = sys.modules[defining_class.__module__]
    original = getattr(module, name, None)
    if original is None:
        raise InvalidInput(
            f"{type(trainer).__name__}: its loss calls no {name}; this TRL version is not supported"
        )
    signature, original_compute_loss = inspect.signature(original), trainer._compute_loss

    def compute_loss(student: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not observer.is_measured:
            return original_compute_loss(student, inputs, *args, **kwargs)
        calls: list[dict[str, Any]] = []

        def divergence_with_recording(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            calls.append(bound.arguments)
            return original(*args, **kwargs)

        with replace_attribute(module, name, divergence_with_recording):
            loss = original_compute_loss(student, inputs, *args, **kwargs)
        row = _unpadded_row(trainer, inputs)
        if calls or row["supervised"].any():  # else no token has a teacher
            arguments = single_call(calls, name)
            observer.add_micro_batch(lambda: _from_row(observer, row, arguments))
        else:
            observer.add_micro_batch(None)
        return loss

    stack.enter_context(replace_attribute(trainer, "_compute_loss", compute_loss))


def _unpadded_row(trainer: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tokens (N,) of this process with the teacher's answers, and which the loss has."""
    names = ("input_ids", "completion_mask", "position_ids", "teacher_topk_ids")
    not_padding = inputs["attention_mask"].bool()
    row = {name: inputs[name][not_padding] for name in (*names, "teacher_topk_logprobs")}
    ids, tokens = row["teacher_topk_ids"], row["input_ids"]
    is_token = (ids == tokens[:, None]) & (ids != -1)
    has_answer = is_token.any(1) if trainer.args.beta == 1 else (ids != -1).any(1)
    supervised = row["completion_mask"].bool() & has_answer
    supervised[:1] = False  # no position predicts the first token of the row
    teacher_logp = torch.where(is_token, row["teacher_topk_logprobs"], -torch.inf).amax(1)
    return row | {"supervised": supervised, "teacher_logp": teacher_logp}


def _from_row(
    observer: TrainerObserver, row: dict[str, Tensor], arguments: dict[str, Any]
) -> ScoredRollouts:
    trainer, supervised = observer.trainer, row["supervised"]
    hidden = arguments["hidden_valid"]
    if len(hidden) != int(supervised.sum()):
        raise OperationFailed(
            f"the loss of {type(trainer).__name__} is over {len(hidden)} tokens, and its batch has "
            f"{int(supervised.sum())} with a teacher; this TRL version is not supported"
        )
    responses, prompts = _split_responses(row)
    width = max(len(indices) for indices in responses)
    packed = torch.stack([_pad(indices, width, 0) for indices in responses])
    exists = torch.stack([_pad(torch.ones_like(x), width, 0) for x in responses]).bool()
    in_loss = supervised[packed] & exists
    # vLLM answers with K ids and with the token's own, wherever it ranks
    num_ids = min(trainer.args.teacher_top_k, row["teacher_topk_ids"].shape[1])
    hidden_index = (supervised.long().cumsum(0) - 1)[packed].flatten()
    temperature = float(arguments["temperature"])
    head = arguments | {"hidden_states": hidden[None]}
    tokens = row["input_ids"][packed] * exists
    return make_batch(
        trainer,
        {},
        tokens,
        in_loss,
        prompt=torch.tensor(prompts, device=tokens.device),
        ended=ends_with_eos(tokens, exists, trainer.eos_token_ids),
        generated_lengths=torch.tensor([len(x) for x in responses], device=tokens.device),
        temperature=float(trainer.args.temperature),
        score_temperature=temperature,
        missing_names=["age"],  # TRL drops the version of the sampler
        **observer.score_answers(
            tokens,
            in_loss,
            lambda positions: head_logits(head, "", hidden_index[positions]) / temperature,
            arguments["lm_head_weight"].shape[0],
            teacher_logp=row["teacher_logp"][packed],
            ids=row["teacher_topk_ids"][packed][..., :num_ids],
            teacher_topk_logp=row["teacher_topk_logprobs"][packed][..., :num_ids],
            subject=f"the servers of {type(trainer).__name__} answer",
        ),
    )


def _split_responses(row: dict[str, Tensor]) -> tuple[list[Tensor], list[int]]:
    """Return the indices of each response in the packed row, and the ids of its prompt.

    A sequence begins where its positions begin again; its response begins with the first token that
    the student sampled.
    """
    starts = (row["position_ids"] == 0).nonzero()[:, 0].tolist()
    responses, prompts = [], []
    for start, end in zip(starts, [*starts[1:], len(row["position_ids"])], strict=True):
        sampled = row["completion_mask"][start:end].nonzero()[:, 0] + start
        first = int(sampled[0]) if len(sampled) else end
        responses.append(sampled)
        prompts.append(integer_id(row["input_ids"][start:first].tolist()))
    return responses, prompts


def _pad(values: Tensor, width: int, value: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - len(values)), value=value)
