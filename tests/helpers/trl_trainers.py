"""TRL's trainers on a tiny pair, a record of what went into their losses, and numbers by hand."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 3,
}

ENDS = [1, *range(200, 209)]
"""Many ends, so that the random student's responses differ in length."""


def load_pair(folders: tuple[Path, Path]) -> tuple[Any, Any, Any]:
    """(student, teacher, tokenizer) of folders; trainers get a copy of the student."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    for model in models:
        model.generation_config.repetition_penalty = 1.0
        model.generation_config.top_k = 0
        model.generation_config.eos_token_id = ENDS
    return *models, AutoTokenizer.from_pretrained(folders[0])


def questions(column: str) -> Any:
    from datasets import Dataset

    # few prompts, so that some come twice in a step, in different micro-batches
    users = [[{"role": "user", "content": f"{7**i}+{i}="}] for i in (0, 1, 2, 0, 1, 2, 0, 1)]
    if column == "messages":
        users = [[*user, {"role": "assistant", "content": "12"}] for user in users]
    if column == "privileged_context":
        return Dataset.from_list(
            [{"prompt": user, column: f"12{i}"} for i, user in enumerate(users)]
        )
    return Dataset.from_list([{column: user} for user in users])


def distillation(pair: Any, folder: Path, **changes: Any) -> Any:
    from trl import DistillationConfig, DistillationTrainer

    student, teacher, tokenizer = pair
    arguments = SETTINGS | {"max_completion_length": 12, "temperature": 0.8} | changes
    return DistillationTrainer(
        model=copy.deepcopy(student),
        teacher_model=teacher,
        args=DistillationConfig(str(folder), **arguments),
        train_dataset=questions("prompt"),
        processing_class=tokenizer,
    )


def gkd(pair: Any, folder: Path, **changes: Any) -> Any:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher, tokenizer = pair
    arguments = SETTINGS | {"max_new_tokens": 12, "temperature": 0.9, "lmbda": 1.0} | changes
    return GKDTrainer(
        model=copy.deepcopy(student),
        teacher_model=teacher,
        args=GKDConfig(str(folder), **arguments),
        train_dataset=questions("messages"),
        processing_class=tokenizer,
    )


def gold(pair: Any, folder: Path, **changes: Any) -> Any:
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    student, teacher, tokenizer = pair
    arguments = {"max_completion_length": 12, "max_length": 64, "temperature": 0.9, "lmbda": 1.0}
    arguments |= {"top_p": 1.0, "use_uld_loss": False}
    return GOLDTrainer(
        model=copy.deepcopy(student),
        teacher_model=copy.deepcopy(teacher),
        args=GOLDConfig(str(folder), **SETTINGS | arguments | changes),
        train_dataset=questions("messages"),
        processing_class=tokenizer,
    )


def iw_opd(pair: Any, folder: Path, **changes: Any) -> Any:
    from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

    student, teacher, tokenizer = pair
    arguments = {"max_completion_length": 12, "temperature": 0.7, "top_p": 1.0, "lmbda": 1.0}
    return IWOPDTrainer(
        model=copy.deepcopy(student),
        teacher_model=copy.deepcopy(teacher),
        args=IWOPDConfig(str(folder), **SETTINGS | arguments | changes),
        train_dataset=questions("messages"),
        processing_class=tokenizer,
    )


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that about half of the responses get."""
    return [float(len(ids) % 2 == 0) for ids in completion_ids]


def first(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """A reward that not every response gets."""
    return [None if ids[0] % 3 == 0 else float(ids[0] % 5) for ids in completion_ids]


def grpo(pair: Any, folder: Path, **changes: Any) -> Any:
    """Its reference model is a copy of the student; the weights of the teacher are loaded there."""
    from trl import GRPOConfig, GRPOTrainer

    student, teacher, tokenizer = pair
    arguments = {"num_generations": 2, "beta": 0.1, "max_completion_length": 12}
    trainer = GRPOTrainer(
        model=copy.deepcopy(student),
        reward_funcs=[even, first],
        args=GRPOConfig(
            str(folder), **SETTINGS | arguments | {"reward_weights": [1.0, 0.5]} | changes
        ),
        train_dataset=questions("prompt"),
        processing_class=tokenizer,
    )
    if trainer.ref_model is not None:
        trainer.ref_model.load_state_dict(teacher.state_dict())
    return trainer


def sdpo(pair: Any, folder: Path, **changes: Any) -> Any:
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    student, _, tokenizer = pair
    arguments = {"num_generations": 4, "max_completion_length": 12, "temperature": 0.8}
    arguments |= {"teacher_model_kind": "base", "mask_truncated_completions": True}
    return SDPOTrainer(
        model=copy.deepcopy(student),
        reward_funcs=even,
        args=SDPOConfig(str(folder), **SETTINGS | arguments | changes),
        train_dataset=questions("privileged_context"),
        processing_class=tokenizer,
    )


def sdft(pair: Any, folder: Path, **changes: Any) -> Any:
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    student, _, tokenizer = pair
    arguments = {"max_completion_length": 12, "temperature": 0.8, "teacher_model_kind": "base"}
    arguments |= {"num_loss_tokens_to_skip": 2, "num_generations": 2}
    return SDFTTrainer(
        model=copy.deepcopy(student),
        args=SDFTConfig(str(folder), **SETTINGS | arguments | changes),
        train_dataset=questions("privileged_context"),
        processing_class=tokenizer,
    )


class Spy:
    """What went into each loss of a trainer, with the student's weights at that time."""

    def __init__(self, trainer: Any, student: Any) -> None:
        self.losses: list[tuple[int, dict[str, Any], Any]] = []
        self.skip = getattr(trainer, "num_loss_tokens_to_skip", 0)
        compute = trainer.compute_loss

        def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            step = trainer.state.global_step + 1
            then = copy.deepcopy(student)  # not of trainer.model, whose forward is patched
            then.load_state_dict(trainer.model.state_dict())
            self.losses.append((step, dict(inputs), then.eval()))
            return compute(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss

    def dense(self, step: int, teacher: Any, temperature: float) -> Iterator[dict[str, Any]]:
        """Row by row of a step: the response's log-softmaxes, tokens, mask and prompt."""
        for loss_step, inputs, student in self.losses:
            if loss_step != step:
                continue
            for row in sequences(inputs):
                prompt, tokens = row["prompt"], row["tokens"]
                p = log_softmaxes(student, prompt, tokens, temperature)
                q = log_softmaxes(teacher, row["teacher_prompt"], tokens, temperature)
                row["mask"][: self.skip] = False
                yield row | {"p": p, "q": q}


def log_softmaxes(model: Any, prompt: Any, tokens: Any, temperature: float) -> torch.Tensor:
    """(T, V) of the tokens that follow the prompt, from one plain forward pass without padding."""
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
    return (logits.double() / temperature).log_softmax(-1)


def sequences(inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Unpadded prompts, generated tokens, their loss mask and what was scored, row by row.

    Of a response that was cut and taken out of the loss, the tokens are all that is not padding.
    """
    if "completion_ids" in inputs:
        for i, (prompt, real, answer, mask) in enumerate(
            zip(
                *(
                    inputs[f"{part}_{kind}"]
                    for part in ("prompt", "completion")
                    for kind in ("ids", "mask")
                ),
                strict=True,
            )
        ):
            length = int(mask.sum()) or int((answer != PAD).nonzero()[-1]) + 1
            supervised = mask[:length].bool()
            if "self_distillation_mask" in inputs:
                supervised = supervised & bool(inputs["self_distillation_mask"][i])
            head = prompt[real.bool()]
            teacher_prompt = head
            if "teacher_input_ids" in inputs:
                width = inputs["teacher_input_ids"].shape[1] - len(answer)
                teacher_prompt = inputs["teacher_input_ids"][i, :width]
                teacher_prompt = teacher_prompt[inputs["teacher_attention_mask"][i, :width].bool()]
            yield {
                "prompt": head,
                "teacher_prompt": teacher_prompt,
                "tokens": answer[:length],
                "mask": supervised.clone(),
                "scored": torch.full_like(supervised, bool(mask.any())),
            }
        return
    for ids, real, labels in zip(
        inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True
    ):
        unpadded_ids = ids[real.bool()]
        count = int((labels != -100).sum())
        prompt = unpadded_ids[: len(unpadded_ids) - count]
        mask = torch.ones(count, dtype=torch.bool)
        tokens = unpadded_ids[len(unpadded_ids) - count :]
        row = {"prompt": prompt, "teacher_prompt": prompt, "tokens": tokens, "mask": mask}
        yield row | {"scored": mask}


PAD = 2
"""The tokenizer's padding."""


def by_hand(rows: list[dict[str, Any]], depth: int = 5) -> dict[str, float]:
    """Means over supervised tokens, of lists over all scored ones; prompts are sampling units."""
    r, kl, outside, expected, overlaps, ended, lengths = [], [], [], [], [], [], []
    sums: dict[tuple, list[float]] = {}
    for row in rows:
        y, keep, scored = row["tokens"][:, None], row["mask"], row["scored"]
        ratio = (row["p"].gather(-1, y) - row["q"].gather(-1, y))[:, 0]
        teacher_ids, student_ids = (row[name].topk(depth, -1).indices for name in ("q", "p"))
        overlap = (teacher_ids[:, :, None] == student_ids[:, None, :]).any(-1).double().mean(-1)
        r.append(ratio[keep])
        kl.append((row["p"].exp() * (row["p"] - row["q"])).sum(-1)[keep])
        outside.append(~(teacher_ids == y).any(-1)[scored])
        expected.append((1 - row["p"].gather(-1, teacher_ids).exp().sum(-1))[scored])
        overlaps.append(overlap[scored])
        ended.append(int(row["tokens"][-1]) in ENDS)
        lengths.append(len(y))
        unit = sums.setdefault(tuple(row["prompt"].tolist()), [0.0, 0.0])
        unit[0] += float(ratio[keep].sum())
        unit[1] += int(keep.sum())
    k1 = float(torch.cat(r).mean())
    c, n = sum(b > 0 for _, b in sums.values()), sum(map(len, r))
    spread = sum((a - k1 * b) ** 2 for a, b in sums.values())
    return {
        "divergence/tokens": n,
        "divergence/k1": k1,
        "divergence/k1_se": math.sqrt(c / (c - 1) * spread) / n if c > 1 else math.nan,
        "divergence/k1_per_response": sum(float(x.sum()) for x in r) / sum(len(x) > 0 for x in r),
        "signal/negative_share": float((torch.cat(r) > 0).double().mean()),
        "divergence/reverse_kl": float(torch.cat(kl).mean()),
        "divergence/outside_topk": float(torch.cat(outside).double().mean()),
        "divergence/outside_topk_expected": float(torch.cat(expected).mean()),
        "divergence/overlap_ratio": float(torch.cat(overlaps).mean()),
        "response/length": sum(lengths) / len(rows),
        "response/truncated_share": 1 - sum(ended) / len(rows),
    }


def rloo(pair: Any, folder: Path, **changes: Any) -> Any:
    """Its reference model is a copy of the student; the weights of the teacher are loaded there."""
    from trl import RLOOConfig, RLOOTrainer

    student, teacher, tokenizer = pair
    arguments = {"num_generations": 2, "beta": 0.1, "max_completion_length": 12}
    arguments |= {"reward_weights": [1.0, 0.5]}
    trainer = RLOOTrainer(
        model=copy.deepcopy(student),
        reward_funcs=[even, first],
        args=RLOOConfig(str(folder), **SETTINGS | arguments | changes),
        train_dataset=questions("prompt"),
        processing_class=tokenizer,
    )
    if trainer.ref_model is not None:
        trainer.ref_model.load_state_dict(teacher.state_dict())
    return trainer


def gmpo(pair: Any, folder: Path, **changes: Any) -> Any:
    """A subclass of GRPOTrainer with a loss of its own."""
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    student, teacher, tokenizer = pair
    arguments = {"num_generations": 2, "beta": 0.1, "max_completion_length": 12}
    trainer = GMPOTrainer(
        copy.deepcopy(student),
        [even, first],
        args=GMPOConfig(str(folder), **SETTINGS | arguments | changes),
        train_dataset=questions("prompt"),
        processing_class=tokenizer,
    )
    trainer.ref_model.load_state_dict(teacher.state_dict())
    return trainer
