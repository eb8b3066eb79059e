"""Faults against alarms: real runs of a tiny pair, each with one fault in it, and healthy ones.

    python -m benchmarks.faults [--seeds 8 --steps 40 --folder DIR]

Prints which rule of `diagnostics.alarms` caught which fault and when, and how often the rules spoke
on healthy runs. The pair is random; its student is a copy of the teacher with noise on it, so that
training has something to do and responses end.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from diagnostics import rows
from diagnostics.alarm_rules import RULES
from diagnostics.alarms import Alarm, replay
from diagnostics.batch import Rollouts
from diagnostics.rows import Row
from opd import scoring, train
from opd.compositions import ERRORS
from opd.config import Config
from opd.engines import Engine, InProcess
from opd.lab import make_tokenizer
from opd.model import Model, Pair, response_hidden, split, spread
from opd.objectives import Objective, make
from opd.roles import make_pair, make_pairs

Change = Callable[[Engine, Any, Any, dict[str, Any]], Rollouts]


def top_p(engine: Engine, prompts: Any, eos: Any, how: dict[str, Any]) -> Rollouts:
    """Draw from the 0.9 nucleus and declare the whole softmax."""
    drawn = engine.sample(prompts, eos, **how | {"top_p": 0.9})
    assert drawn.softmax_logp is not None
    return replace(drawn, top_p=1.0, sampler_logp=drawn.softmax_logp)


def temperature(engine: Engine, prompts: Any, eos: Any, how: dict[str, Any]) -> Rollouts:
    """Draw at 0.8 and declare 1."""
    return replace(engine.sample(prompts, eos, **how | {"temperature": 0.8}), temperature=1.0)


def shifted_mask(engine: Engine, prompts: Any, eos: Any, how: dict[str, Any]) -> Rollouts:
    """Supervise positions 1 to L in place of 0 to L - 1."""
    drawn = engine.sample(prompts, eos, **how)
    mask = torch.zeros_like(drawn.mask)
    mask[:, 1:] = drawn.mask[:, :-1]
    return remasked(drawn, mask)


def padding(engine: Engine, prompts: Any, eos: Any, how: dict[str, Any]) -> Rollouts:
    """Supervise what follows the end."""
    drawn = engine.sample(prompts, eos, **how)
    return remasked(drawn, torch.ones_like(drawn.mask))


def remasked(drawn: Rollouts, mask: Tensor) -> Rollouts:
    def cut(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0)

    assert drawn.softmax_logp is not None
    return replace(
        drawn,
        mask=mask,
        sampler_logp=cut(drawn.sampler_logp),
        softmax_logp=cut(drawn.softmax_logp),
    )


def whole(engine: Engine, prompts: Any, eos: Any, how: dict[str, Any]) -> Rollouts:
    return engine.sample(prompts, eos, **how)


class Faulty(InProcess):
    """The engine with a change to what it samples; `frozen` keeps the weights of the start."""

    def __init__(self, student: Model, change: Change, frozen: bool) -> None:
        super().__init__(student)
        self.change, self.frozen = change, frozen
        if frozen:
            self.model = split(copy.deepcopy(student.network), student.vocabulary)

    def sample(self, prompts: Any, eos: list[int], **settings: Any) -> Rollouts:
        return self.change(InProcess(self.model), prompts, eos, settings)

    def sync(self, model: Model) -> None:
        if not self.frozen:
            super().sync(model)


def sampled_by(change: Change, frozen: bool = False) -> Any:
    return patch.object(train, "sampler", lambda _, student: Faulty(student, change, frozen))


def late(model: Model, prompts: Any, batch: Rollouts) -> Tensor:
    """The states that predict the token after: they have seen the token that they score."""
    states = spread(response_hidden(model, prompts, batch), batch.mask)
    return states.roll(-1, 1)[batch.mask]


def k1(_: Config) -> Objective:
    """k1 differentiated directly: its gradient does not know the teacher, and has mean zero."""
    return ERRORS["k1"][0]()


def upside_down(_: Config) -> Objective:
    made = make("full_reverse_kl")
    return replace(made, local=lambda at: -made.local(at))


def stopped(_: Config) -> Objective:
    """A loss of the right value that no gradient comes from."""
    made = make("full_reverse_kl")
    return replace(made, local=lambda at: made.local(at).detach() + 0 * made.local(at))


def renumbered(settings: list[Config]) -> list[Pair]:
    """A teacher with another tokenizer of the same size: its ids are one higher."""
    pairs = make_pairs(settings)
    weight = pairs[0].teacher.network.lm_head.weight
    weight.data = weight.data.roll(1, 0)
    return pairs


def exchanged(ids: Tensor, others: Tensor) -> Callable[[list[Config]], list[Pair]]:
    """Pairs whose teacher says each of `others` where it would say the id beside it, and back."""

    def made(settings: list[Config]) -> list[Pair]:
        pairs = make_pairs(settings)
        weight = pairs[0].teacher.network.lm_head.weight
        weight.data[torch.cat([ids, others])] = weight.data[torch.cat([others, ids])]
        return pairs

    return made


def ends_renamed(settings: list[Config]) -> list[Pair]:
    """A teacher that ends with other ids than the student; both stop at all of them."""
    return exchanged(torch.arange(10), torch.arange(10, 20))(settings)


def tag_renamed(settings: list[Config]) -> list[Pair]:
    """A teacher that has other tokens for the three that the student is sure of most often."""
    pair = make_pair(settings[0])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, pair.student.vocabulary, (64, 16), generator=generator)
    with torch.no_grad():
        p = pair.student.network(ids).logits.softmax(-1)
    sure, said = p.max(-1)
    count = torch.bincount(said[sure > 0.9], minlength=pair.student.vocabulary)
    count[:20] = 0  # ends have a fault of their own
    rare = p.mean((0, 1))
    rare[:20] = 1.0
    return exchanged(count.topk(3).indices, rare.topk(3, largest=False).indices)(settings)


@dataclass(frozen=True)
class Fault:
    """A patch to the trainer and changes to its settings."""

    patched: Callable[[], Any] = nullcontext
    settings: Mapping[str, Any] = field(default_factory=dict)


FAULTS: dict[str, Fault] = {
    "top-p 0.9, undeclared": Fault(lambda: sampled_by(top_p)),
    "temperature 0.8, undeclared": Fault(lambda: sampled_by(temperature)),
    "mask shifted by one": Fault(lambda: sampled_by(shifted_mask)),
    "padding counted": Fault(lambda: sampled_by(padding)),
    "stale weights": Fault(lambda: sampled_by(whole, frozen=True)),
    "scored one token late": Fault(lambda: patch.object(scoring, "response_hidden", late)),
    "k1 differentiated": Fault(lambda: patch.object(train, "make_objective", k1)),
    "wrong sign": Fault(lambda: patch.object(train, "make_objective", upside_down)),
    "un-normalised top-K": Fault(
        settings={"objective": "teacher_topk_unnormalised", "collapse_accepted": True, "lr": 0.01}
    ),
    "learning rate 3": Fault(settings={"lr": 3.0}),
    "teacher's ids one higher": Fault(lambda: patch.object(train, "make_pairs", renumbered)),
    "teacher ends otherwise": Fault(lambda: patch.object(train, "make_pairs", ends_renamed)),
    "teacher's tag is another": Fault(lambda: patch.object(train, "make_pairs", tag_renamed)),
    "gradient stopped": Fault(lambda: patch.object(train, "make_objective", stopped)),
}


def make_models(folder: Path, noise: float = 0.1) -> tuple[str, str]:
    """A random teacher, and a student that is the teacher with noise on its weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    size = len(make_tokenizer())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=size,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=128,
                initializer_range=0.3,
            )
        )
        network.lm_head.weight.data *= 3  # as sure of itself as a model of text
        network.generation_config.eos_token_id = list(range(20))  # so that responses end
        for name in ("teacher", "student"):
            network.save_pretrained(folder / name)
            make_tokenizer().save_pretrained(folder / name)
            for weight in network.parameters():
                weight.data += noise * 0.3 * torch.randn_like(weight) * (weight.dim() > 1)
    return str(folder / "student"), str(folder / "teacher")


def record(pair: tuple[str, str], out: Path, seed: int, steps: int, fault: Fault) -> list[Row]:
    """The rows of a run with the fault in it; up to where it died, if it did."""
    settings: dict[str, Any] = {
        "student": pair[0],
        "teacher": pair[1],
        "out": str(out),
        "seed": seed,
        "steps": steps,
        "objective": "full_reverse_kl",
        "prompts_per_step": 6,
        "group_size": 2,
        "max_prompt": 64,
        "max_response": 16,
        "lr": 1e-3,
        "support_k": 8,
        "eval_every": 0,
        "eval_problems": 1,
        "save_every": 0,
        "batch_every": 0,
        "device": "cpu",
    }
    config = Config(**settings | dict(fault.settings))
    with fault.patched(), suppress(ValueError):  # weights that diverged end the run
        train.train(config)
    return rows.read(out / "rows.jsonl")


def caught(found: Mapping[str, list[Alarm]]) -> str:
    """Fault by rule: the step at which each rule first spoke."""
    names = [r.name for r in RULES if any(a.rule.name == r.name for x in found.values() for a in x)]
    width = max(map(len, found))
    lines = [" " * width + "".join(f" {name:>19}" for name in names)]
    for fault, alarms in found.items():
        first: dict[str, int] = {}
        for alarm in alarms:
            first.setdefault(alarm.rule.name, alarm.step)
        cells = "".join(f" {first.get(name, ''):>19}" for name in names)
        lines.append(f"{fault:{width}}{cells}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8, help="healthy runs")
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair = make_models(folder)
        found = {
            fault: replay(record(pair, folder / f"fault-{i}", 0, given.steps, FAULTS[fault]))
            for i, fault in enumerate(FAULTS)
        }
        healthy = {
            f"healthy, seed {seed}": replay(
                record(pair, folder / f"healthy-{seed}", seed, given.steps, Fault())
            )
            for seed in range(given.seeds)
        }
    print(caught(found | healthy))
    count = sum(map(len, healthy.values()))
    print(
        f"{count} alarms in {given.seeds} healthy runs of {given.steps} steps, {len(RULES)} rules"
    )


if __name__ == "__main__":
    main()
