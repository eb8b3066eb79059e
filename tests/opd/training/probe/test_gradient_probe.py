"""The gradient probe against float64 autograd of each response's loss, from the definitions.

One probed training step of a tiny pair, with the sketch replaced by the gradients themselves. The
reference computes each response's loss from the models' logits and does not use the LM head's code.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.gradients.sketch import identity_projection
from diagnostics.records.batch_files import load_batch
from opd.config.settings import Config, with_settings
from opd.data.chain_task import problems
from opd.data.prompts import encode_prompts
from opd.lab.build import make_tokenizer
from opd.models.loading import load_model
from opd.training.probe import gradient_probe
from opd.training.train import train

PROMPTS, GROUP = 5, 3


@pytest.fixture(scope="module")
def capped_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(student, teacher) with soft-capped logits, where the cap has an effect."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    folder = tmp_path_factory.mktemp("capped")
    for seed, name in enumerate(("student", "teacher")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Gemma2ForCausalLM(
                Gemma2Config(
                    vocab_size=len(make_tokenizer()),
                    hidden_size=12,
                    intermediate_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=6,
                    max_position_embeddings=128,
                    initializer_range=0.35,
                    tie_word_embeddings=False,
                    final_logit_softcapping=2.0,
                    query_pre_attn_scalar=6,
                )
            )
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder / "student", folder / "teacher"


def train_with_probe(
    pair: tuple[Path, Path], out: Path, **changes: object
) -> tuple[Config, dict, ScoredRollouts]:
    fields: dict[str, object] = {
        "steps": 1,
        "prompts_per_step": PROMPTS,
        "group_size": GROUP,
        "max_prompt": 64,
        "max_response": 6,
        "lr": 1e-6,
        "support_k": 4,
        "eval_every": 0,
        "eval_problems": 1,
        "save_every": 10,
        "save_batch_every": 1,
        "device": "cpu",
        "probe_every": 1,
        "max_tokens_per_microbatch": 120,
        "max_logits_per_chunk": 2000,
    }
    config = with_settings(
        Config(student=str(pair[0]), teacher=str(pair[1]), out=str(out)), **(fields | changes)
    )
    folder = train(config).folder
    row = json.loads((folder / "rows.jsonl").read_text().splitlines()[0])
    return config, row, load_batch(folder / "batches" / "step_000000.safetensors")


Loss = Callable[[Tensor, Tensor, ScoredRollouts, int], Tensor]
"""Student (t, V) logp with gradient, teacher (t, V) logp, batch, row -> (t,) losses."""


def head_gradients(config: Config, batch: ScoredRollouts, loss: Loss) -> Tensor:
    """(B, V D) float64 gradients of each response's supervised losses by the head's weight."""
    (tokenizer, student), (_, teacher) = (
        load_model(name, "cpu", "float32") for name in (config.student, config.teacher)
    )
    student, teacher = student.double(), teacher.double()
    train_problems = problems("train", PROMPTS, config.seed * 1_000_003)
    prompts = encode_prompts(tokenizer, train_problems, GROUP, config.data.max_prompt)
    weight = student.get_output_embeddings().weight.requires_grad_()
    rows = []
    for i in range(len(batch)):
        prompt, count = prompts.tokens[i][prompts.mask[i]], int(batch.sampled[i].sum())
        ids = torch.cat([prompt, batch.tokens[i, :count]])[None]
        p, q = (
            (net(ids).logits[0, len(prompt) - 1 : -1] / config.rollout.temperature).log_softmax(-1)
            for net in (student, teacher)
        )
        losses = loss(p, q.detach(), batch, i) * batch.mask[i, :count]
        rows.append(torch.autograd.grad(losses.sum(), weight)[0].flatten())
    return torch.stack(rows)


def pooled_measures(x: Tensor, prompt: Tensor) -> dict[str, float]:
    """Signal, variance and noise from their definitions, by pairs of responses."""
    n, products = len(x), x @ x.T
    same_prompt = prompt[:, None] == prompt[None]
    other_responses = same_prompt & ~torch.eye(n, dtype=torch.bool)
    signal, square = float(products[~same_prompt].mean()), float(products.diagonal().mean())
    noise = n * (float(x.mean(0).square().sum()) - signal)
    return {
        "signal": signal,
        "variance": square - signal,
        "within": square - float(products[other_responses].mean()),
        "between": float(products[other_responses].mean()) - signal,
        "snr": n * signal / noise,
        "noise_scale": noise / signal,
    }


def sampled_logp(logp: Tensor, batch: ScoredRollouts, i: int) -> Tensor:
    return logp.gather(1, batch.tokens[i, : len(logp), None])[:, 0]


def costs_to_go(batch: ScoredRollouts, gamma: float) -> list[Tensor]:
    """(t,) discounted supervised costs from each token on; every sampled token discounts."""
    costs = []
    for i, count in enumerate(batch.sampled.sum(1).tolist()):
        cost = ((batch.student_logp - batch.teacher_logp) * batch.mask)[i, :count].double()
        costs.append(
            torch.stack([(cost[t:] * gamma ** torch.arange(count - t)).sum() for t in range(count)])
        )
    return costs


def leave_one_out_loss(p: Tensor, q: Tensor, batch: ScoredRollouts, i: int) -> Tensor:
    """gamma 0.9, minus the other responses' mean, over the response's supervised length."""
    credit = costs_to_go(batch, 0.9)
    other_rows = [j for j in range(len(batch)) if batch.prompt[j] == batch.prompt[i] and j != i]
    baseline = [
        sum(float(credit[j][t]) if t < len(credit[j]) else 0.0 for j in other_rows)
        / len(other_rows)
        for t in range(len(p))
    ]
    counts = batch.mask.sum(1)  # some responses have no supervised token
    weight = int(counts.sum()) / (int((counts > 0).sum()) * max(1, int(counts[i])))
    return weight * (credit[i] - torch.tensor(baseline)) * sampled_logp(p, batch, i)


def support_loss(p: Tensor, q: Tensor, batch: ScoredRollouts, i: int) -> Tensor:
    teacher_logp, ids = q.topk(4, -1)
    student_logp, teacher_logp = p.gather(1, ids).log_softmax(-1), teacher_logp.log_softmax(-1)
    return (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)


def future_loss(p: Tensor, q: Tensor, batch: ScoredRollouts, i: int) -> Tensor:
    """KL(p || q), and the later prefixes' KL, discounted by 0.5, with the token's score."""
    kl = (p.exp() * (p - q)).sum(-1)
    fixed, steps = kl.detach(), range(len(kl))
    later = [sum(0.5 ** (u - t) * float(fixed[u]) for u in steps[t + 1 :]) for t in steps]
    return kl + torch.tensor(later) * sampled_logp(p, batch, i)


def clipped_cost_loss(p: Tensor, q: Tensor, batch: ScoredRollouts, i: int) -> Tensor:
    picked = sampled_logp(p, batch, i)
    return (picked - sampled_logp(q, batch, i)).detach().clamp(-0.5, 0.5) * picked


CASES: dict[str, tuple[dict[str, object], Loss]] = {
    "leave_one_out under a mask": (
        {
            "objective": "sampled_token",
            "gamma": 0.9,
            "baseline": "leave_one_out",
            "denominator": "sequence_mean",
            "mask": tuple(f"id:{token}" for token in range(20, 140)),
        },
        leave_one_out_loss,
    ),
    "support of a nucleus": ({"objective": "teacher_topk", "top_p": 0.8}, support_loss),
    "mean costs": ({"objective": "full_reverse_kl", "gamma": 0.5}, future_loss),
    "clipped costs in several updates": (
        {
            "objective": "sampled_token_weighted",
            "ratio_clip": 0.5,
            "updates_per_batch": 5,
            "temperature": 0.8,
        },
        clipped_cost_loss,
    ),
}


@pytest.mark.parametrize(
    ("case", "capped"),
    [*((case, False) for case in CASES), ("mean costs", True), ("support of a nucleus", True)],
)
def test_the_headline_is_that_of_the_loss_that_trains(
    tiny_pair, capped_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, capped: bool
) -> None:
    monkeypatch.setattr(
        gradient_probe, "random_projection", lambda v, d, seed: identity_projection(v, d)
    )
    changes, loss = CASES[case]
    pair = capped_pair if capped else tiny_pair
    config, row, batch = train_with_probe(pair, tmp_path / "run", **changes)
    gradients = head_gradients(config, batch, loss)
    for name, expected in pooled_measures(gradients, batch.prompt).items():
        value = row[f"gradient/{name}"]
        if value is None and name in ("snr", "noise_scale"):
            continue  # its denominator is not distinguishable from 0
        scale = 1e-3 * max(float(gradients.square().sum(1).mean()), 1e-9)
        tolerance = 0.0 if name in ("snr", "noise_scale") else scale
        assert value == pytest.approx(expected, rel=2e-3, abs=tolerance), name


def test_the_family_of_a_capped_head_is_that_of_its_own_gradients(
    capped_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gradient_probe, "random_projection", lambda v, d, seed: identity_projection(v, d)
    )
    config, row, batch = train_with_probe(
        capped_pair, tmp_path / "run", objective="sampled_token", temperature=0.8
    )
    members: dict[str, Loss] = {
        "plain@0": lambda p, q, batch, i: costs_to_go(batch, 0.0)[i] * sampled_logp(p, batch, i),
        "plain@0.5": lambda p, q, batch, i: costs_to_go(batch, 0.5)[i] * sampled_logp(p, batch, i),
        "rb_all@0.5": future_loss,
    }
    for name, loss in members.items():
        x = head_gradients(config, batch, loss)
        measures = pooled_measures(x, batch.prompt)
        noise = measures["noise_scale"] * measures["signal"]
        assert row[f"gradient/noise/{name}"] == pytest.approx(noise, rel=1e-3), name
