"""TRL trainers, unmodified, for two steps: the rows, against dense numbers made independently.

"Independently" means: from the weights before each step and the tokens that the trainer made, with
plain full log-softmaxes.
"""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.adapters.trl import observe
from diagnostics.adapters.trl_seams import prompt_numbers
from diagnostics.monitor import Monitor

trl = pytest.importorskip("trl")

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


@pytest.fixture(scope="module")
def pair(tiny_pair) -> tuple[Any, Any, Any]:
    """(student, teacher, tokenizer); tests train a copy of the student."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in tiny_pair]
    for model in models:
        model.generation_config.repetition_penalty = 1.0
        model.generation_config.top_k = 0
        model.generation_config.eos_token_id = ENDS
    return *models, AutoTokenizer.from_pretrained(tiny_pair[0])


def questions(column: str) -> Any:
    from datasets import Dataset

    # few prompts, so that some come twice in a step, in different micro-batches
    users = [[{"role": "user", "content": f"{7**i}+{i}="}] for i in (0, 1, 2, 0, 1, 2, 0, 1)]
    if column == "messages":
        users = [[*user, {"role": "assistant", "content": "12"}] for user in users]
    return Dataset.from_list([{column: user} for user in users])


def distillation(pair: Any, folder: Path, **changes: Any) -> Any:
    student, teacher, tokenizer = pair
    config = trl.DistillationConfig(
        str(folder), max_completion_length=12, temperature=0.8, **SETTINGS | changes
    )
    return trl.DistillationTrainer(
        model=copy.deepcopy(student),
        teacher_model=teacher,
        args=config,
        train_dataset=questions("prompt"),
        processing_class=tokenizer,
    )


def gkd(pair: Any, folder: Path, **changes: Any) -> Any:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher, tokenizer = pair
    some = SETTINGS | {"max_new_tokens": 12, "temperature": 0.9, "lmbda": 1.0} | changes
    return GKDTrainer(
        model=copy.deepcopy(student),
        teacher_model=teacher,
        args=GKDConfig(str(folder), **some),
        train_dataset=questions("messages"),
        processing_class=tokenizer,
    )


def grpo(pair: Any, folder: Path, **changes: Any) -> Any:
    student, teacher, tokenizer = pair
    some = SETTINGS | {"num_generations": 2, "beta": 0.1, "max_completion_length": 12} | changes
    trainer = trl.GRPOTrainer(
        model=copy.deepcopy(student),
        reward_funcs=lambda completions, **_: [float(len(str(c)) % 3) for c in completions],
        args=trl.GRPOConfig(str(folder), **some),
        train_dataset=questions("prompt"),
        processing_class=tokenizer,
    )
    if trainer.ref_model is not None:
        trainer.ref_model.load_state_dict(teacher.state_dict())
    return trainer


MAKERS = {"distillation": distillation, "gkd": gkd, "grpo": grpo}


class Spy:
    """What went into each loss of a trainer, with the student's weights at that time."""

    def __init__(self, trainer: Any, student: Any) -> None:
        self.losses: list[tuple[int, dict[str, Any], Any]] = []
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
        for at, inputs, student in self.losses:
            if at != step:
                continue
            for ids, mask, prompt, start in sequences(inputs):
                with torch.no_grad():
                    p, q = (
                        (
                            m(input_ids=ids[None]).logits[0, start - 1 : -1].double() / temperature
                        ).log_softmax(-1)
                        for m in (student, teacher)
                    )
                yield {"p": p, "q": q, "tokens": ids[start:], "mask": mask, "prompt": prompt}


def sequences(inputs: dict[str, Any]) -> Iterator[tuple[Any, Any, tuple, int]]:
    """Unpadded (ids, mask of the response, prompt, length of the prompt) of each row."""
    if "completion_ids" in inputs:
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        for prompt, real, answer, mask in zip(*(inputs[n] for n in names), strict=True):
            head, tail = prompt[real.bool()], answer[mask.bool()]
            yield torch.cat([head, tail]), mask[mask.bool()].bool(), tuple(head.tolist()), len(head)
        return
    for ids, real, labels in zip(
        inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True
    ):
        own = ids[real.bool()]
        count = int((labels != -100).sum())
        start = len(own) - count
        yield own, torch.ones(count, dtype=torch.bool), tuple(own[:start].tolist()), start


def trained(trainer: Any, monitor: Monitor | None = None) -> tuple[list[dict], list[dict], Any]:
    """Rows, the trainer's log, and the trained weights."""
    torch.manual_seed(11)
    if monitor is None:
        trainer.train()
        return [], trainer.state.log_history, trainer.model.state_dict()
    with observe(trainer, monitor, k=5, elements=300) as rows:
        trainer.train()
    return rows, trainer.state.log_history, trainer.model.state_dict()


@pytest.mark.parametrize("name", MAKERS)
def test_rows_equal_dense_numbers_and_training_its_bits(
    pair: Any, tmp_path: Path, name: str
) -> None:
    student, teacher, _ = pair
    alone = trained(MAKERS[name](pair, tmp_path / "alone"))
    trainer = MAKERS[name](pair, tmp_path / "watched")
    spy, monitor = Spy(trainer, student), Monitor()
    before = {k for k in vars(trainer) if callable(vars(trainer)[k])}
    rows, log, weights = trained(trainer, monitor)
    assert {k for k in vars(trainer) if callable(vars(trainer)[k])} == before
    for key, value in alone[2].items():
        assert torch.equal(value, weights[key]), key
    assert [row["step"] for row in rows] == [1, 2]
    temperature = {"distillation": 0.8, "gkd": 1.0, "grpo": 1.0}[name]
    truncated: list[float] = []
    for row, theirs, without in zip(rows, log, alone[1], strict=False):
        expected = by_hand(list(spy.dense(row["step"], teacher, temperature)))
        assert row["drift/tokens"] > 10
        truncated.append(expected["collapse/truncated_share"])
        for key, value in expected.items():
            exact = key in ("drift/reverse_kl", "drift/outside_topk", "drift/outside_topk_expected")
            if name == "grpo" and exact:
                assert key not in row
            else:
                assert row[key] == pytest.approx(value, rel=2e-4, abs=1e-6), key
                assert theirs[key] == row[key]
        assert all(math.isfinite(x) for x in theirs.values() if isinstance(x, float))
        assert {k: v for k, v in theirs.items() if k in without and "time" not in k} == {
            k: v for k, v in without.items() if "time" not in k
        }
    assert 0 < sum(truncated) < 2
    if name == "distillation":  # beta 1: its loss is the reverse KL at its temperature
        for row, theirs in zip(rows, log, strict=False):
            assert theirs["loss"] == pytest.approx(row["drift/reverse_kl"], rel=1e-3)
            assert theirs["entropy"] == pytest.approx(row["drift/student_entropy"], rel=0.1)
    assert monitor.missing["sampler_ratio"].endswith("has no sampler_logp")


def by_hand(sequences: list[dict]) -> dict[str, float]:
    """Means over all supervised tokens; the error of k1 with prompts as the sampling units."""
    r, kl, outside, expected, ended, lengths = [], [], [], [], [], []
    sums: dict[tuple, list[float]] = {}
    for s in sequences:
        y = s["tokens"][:, None]
        ratio = (s["p"].gather(-1, y) - s["q"].gather(-1, y))[:, 0]
        best = s["q"].topk(5, -1).indices
        r.append(ratio)
        kl.append((s["p"].exp() * (s["p"] - s["q"])).sum(-1))
        outside.append(~(best == y).any(-1))
        expected.append(1 - s["p"].gather(-1, best).exp().sum(-1))
        ended.append(int(s["tokens"][-1]) in ENDS)
        lengths.append(len(y))
        unit = sums.setdefault(s["prompt"], [0.0, 0.0])
        unit[0] += float(ratio.sum())
        unit[1] += len(y)
    k1 = float(torch.cat(r).mean())
    c, n = len(sums), sum(lengths)
    spread = sum((a - k1 * b) ** 2 for a, b in sums.values())
    return {
        "drift/tokens": n,
        "drift/k1": k1,
        "drift/k1_se": math.sqrt(c / (c - 1) * spread) / n,
        "supervision/negative_share": float((torch.cat(r) > 0).double().mean()),
        "drift/reverse_kl": float(torch.cat(kl).mean()),
        "drift/outside_topk": float(torch.cat(outside).double().mean()),
        "drift/outside_topk_expected": float(torch.cat(expected).mean()),
        "collapse/length": n / len(sequences),
        "collapse/truncated_share": 1 - sum(ended) / len(sequences),
    }


def test_only_what_the_student_sampled_is_measured(pair: Any, tmp_path: Path) -> None:
    for changes in ({"lmbda": -1.0}, {"lmbda": -1.0, "seq_kd": True}):
        trainer = gkd(pair, tmp_path / "off", **{**changes, "lmbda": 0.0})
        trainer.lmbda = -1.0  # never on policy: random() <= 0 could still happen
        rows, log, _ = trained(trainer, Monitor())
        assert rows == [{"step": i, "trl/on_policy_share": 0.0} for i in (1, 2)]
        assert log[0]["trl/on_policy_share"] == 0.0


def test_cadence_evaluation_and_what_is_put_back(pair: Any, tmp_path: Path) -> None:
    trainer = distillation(pair, tmp_path / "run")
    trainer.eval_dataset = questions("prompt").select(range(2))
    with observe(trainer, Monitor(every=2)) as rows:
        trainer.train()
        trainer.evaluate()
    assert [row["step"] for row in rows] == [2]
    assert "drift/k1" not in trainer.state.log_history[0]
    assert trainer.state.log_history[1]["drift/k1"] == rows[0]["drift/k1"]
    with pytest.raises(RuntimeError, match="stop"), observe(trainer, Monitor()):
        raise RuntimeError("stop")
    assert not {"log", "_compute_loss"} & vars(trainer).keys()


def test_evaluation_between_steps_is_not_measured(pair: Any, tmp_path: Path) -> None:
    trainer = distillation(pair, tmp_path / "run")
    trainer.eval_dataset = questions("prompt").select(range(3))
    step = trainer.training_step

    def evaluated_first(*args: Any) -> torch.Tensor:
        trainer.evaluate()
        trainer.model.train()
        return step(*args)

    trainer.training_step = evaluated_first
    with observe(trainer, Monitor()) as rows:
        trainer.train()
    responses = [row["drift/tokens"] / row["collapse/length"] for row in rows]
    assert responses == pytest.approx([4, 4])


def test_a_prompt_is_the_same_whatever_its_padding() -> None:
    tokens = torch.tensor([[0, 5, 6], [5, 6, 0], [9, 5, 6], [0, 5, 6]])
    real = torch.tensor([[0, 1, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1]])
    numbers = prompt_numbers(tokens, real).tolist()
    assert numbers[0] == numbers[1] == numbers[2] != numbers[3]


def test_a_path_that_hides_the_logits_is_refused(pair: Any, tmp_path: Path) -> None:
    trainer = gkd(pair, tmp_path / "fused")
    compute = trainer.generalized_jsd_loss
    trainer.use_liger_gkd_loss = True
    with pytest.raises(ValueError, match="use_liger_gkd_loss is set: the fused loss"):  # noqa: SIM117
        with observe(trainer):
            pass
    del trainer.use_liger_gkd_loss

    def fused(model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        logits = model(inputs["input_ids"]).logits
        return compute(logits, logits.detach(), inputs["labels"])

    trainer.compute_loss = fused
    with pytest.raises(RuntimeError, match="generalized_jsd_loss 0 times, expected once"):
        trained(trainer, Monitor())
    with pytest.raises(ValueError, match="beta 0 has no reference model"):
        trained(grpo(pair, tmp_path / "grpo", beta=0.0), Monitor())
    with pytest.raises(ValueError, match="Monitor is not known here; known: DistillationTrainer"):  # noqa: SIM117
        with observe(Monitor()):
            pass
