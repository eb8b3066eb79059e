"""RLOO, GMPO, server and async distillation: rows against dense numbers; training to its bits."""

import inspect
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics.adapters.trl import NOT_OBSERVED, OBSERVED, observe_trl
from diagnostics.catalogue import FULL
from diagnostics.monitor import Monitor
from tests.helpers.paths import ROOT
from tests.helpers.servers.teacher_server import serve
from tests.helpers.servers.trl_servers import (
    TrlTeacherServer,
    async_distillation,
    server_distillation,
)
from tests.helpers.trl_trainers import Spy, by_hand, gmpo, load_pair, log_softmaxes, rloo

pytestmark = pytest.mark.filterwarnings("error:.* has no row:RuntimeWarning")

DENSE = ("reverse_kl", "outside_topk_expected", "overlap_ratio", "outside_topk")
"""What log-probabilities of the sampled tokens alone do not give."""


@pytest.fixture(scope="module")
def pair(tiny_pair) -> tuple[Any, Any, Any]:
    return load_pair(tiny_pair)


@pytest.fixture(scope="module")
def url(tiny_pair) -> Iterator[str]:
    with serve(TrlTeacherServer(tiny_pair[1])) as address:
        yield address.removesuffix("/v1")


def train(trainer: Any, monitor: Monitor | None = None) -> tuple[list[dict], dict[str, Any]]:
    """Train, observed with a monitor; return the rows and the weights."""
    torch.manual_seed(11)
    if monitor is None:
        trainer.train()
        return [], trainer.model.state_dict()
    with observe_trl(trainer, monitor, k=5, max_logits_per_chunk=300) as rows:
        trainer.train()
    return rows, trainer.model.state_dict()


def check_weights(unobserved: dict[str, Any], observed: dict[str, Any]) -> None:
    for key, value in unobserved.items():
        assert torch.equal(value, observed[key]), key


def check_row(row: dict[str, float], expected: dict[str, float], absent: tuple[str, ...]) -> None:
    for key, value in expected.items():
        if key.removeprefix("divergence/") in absent:
            assert key not in row
        else:
            assert row[key] == pytest.approx(value, rel=2e-4, abs=1e-6, nan_ok=True), key


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (rloo, {}),
        (rloo, {"steps_per_generation": 4, "max_steps": 4, "temperature": 0.7}),
        (gmpo, {}),
    ],
)
def test_policy_gradients_with_a_reference_model(
    pair: Any, tmp_path: Path, make: Any, changes: dict[str, Any]
) -> None:
    unobserved = train(make(pair, tmp_path / "alone", **changes))[1]
    trainer = make(pair, tmp_path / "watched", **changes)
    spy, monitor = Spy(trainer, pair[0]), Monitor(FULL)
    rows, weights = train(trainer, monitor)
    check_weights(unobserved, weights)
    steps = changes.get("max_steps", 2)
    assert [row["step"] for row in rows] == [*range(1, steps + 1)]
    for row in rows:
        dense = list(spy.dense(row["step"], pair[1], changes.get("temperature", 1.0)))
        check_row(row, by_hand(dense), DENSE)
    assert "reward" not in monitor.missing
    if make is rloo:
        # its own log-probabilities at sampling time; the second half is one update old
        assert "sampler_ratio" not in monitor.missing
        assert [row["consistency/age"] for row in rows] == [
            i % 2 * (steps > 2) for i in range(steps)
        ]


def test_rloo_without_a_teacher_is_refused(pair: Any, tmp_path: Path) -> None:
    trainer = rloo(pair, tmp_path / "run", beta=0.0)
    message = (
        r"RLOOTrainer with beta 0 has no .* above 0 in RLOOConfig and assign trainer.ref_model"
    )
    with pytest.raises(ValueError, match=message), observe_trl(trainer):
        pass


def answers_by_hand(dense: list[dict[str, Any]], k: int) -> dict[str, float]:
    """Means over the tokens of what the server's K ids and the student's distribution give."""
    inside, teacher_mass, student_mass = [], [], []
    for row in dense:
        ids = row["q"].topk(k, -1).indices
        inside.append((ids == row["tokens"][:, None]).any(-1).double())
        teacher_mass.append(row["q"].gather(-1, ids).exp().sum(-1))
        student_mass.append(row["p"].gather(-1, ids).exp().sum(-1))
    return {
        "divergence/outside_topk": 1 - float(torch.cat(inside).mean()),
        "divergence/topk_teacher_mass": float(torch.cat(teacher_mass).mean()),
        "divergence/topk_student_mass": float(torch.cat(student_mass).mean()),
    }


@pytest.mark.parametrize(
    "changes", [{"beta": 0.0, "loss_top_k": 5}, {"beta": 1.0, "loss_top_k": 1}]
)
def test_a_teacher_on_a_server(
    pair: Any, url: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    unobserved = train(server_distillation(pair, tmp_path / "alone", url=url, **changes))[1]
    trainer = server_distillation(pair, tmp_path / "watched", url=url, **changes)
    spy, monitor = Spy(trainer, pair[0]), Monitor(FULL)
    rows, weights = train(trainer, monitor)
    check_weights(unobserved, weights)
    k = changes["loss_top_k"]
    for row in rows:
        dense = list(spy.dense(row["step"], pair[1], 0.8))
        absent = ("reverse_kl",)
        check_row(row, by_hand(dense, depth=k) | answers_by_hand(dense, k), absent)
    assert [row["step"] for row in rows] == [1, 2]
    assert "no distribution statistics" in monitor.missing["exact_divergence"]


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_rollouts_of_another_process(
    pair: Any, tiny_pair: Any, url: str, tmp_path: Path, beta: float
) -> None:
    def make(name: str) -> Any:
        trainer = async_distillation(
            pair, tmp_path / name, url=url, student_folder=tiny_pair[0], beta=beta
        )
        return trainer

    unobserved = train(make("alone"))[1]
    trainer, students = make("watched"), []
    compute = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        student = type(pair[0])(pair[0].config).eval()
        student.load_state_dict(trainer.model.state_dict())
        students.append(
            (trainer.state.global_step + 1, student, int(inputs["position_ids"].eq(0).sum()))
        )
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    monitor = Monitor(FULL)
    rows, weights = train(trainer, monitor)
    check_weights(unobserved, weights)
    samples = iter(trainer.rollout_worker.samples)
    dense: dict[int, list[dict[str, Any]]] = {}
    for step, student, count in students:
        for _ in range(count):
            sample = next(samples)
            prompt, tokens = sample["prompt"], sample["tokens"]
            p, q = (log_softmaxes(x, prompt, tokens, 0.8) for x in (student, pair[1]))
            mask = torch.ones(len(tokens), dtype=torch.bool)
            dense.setdefault(step, []).append(
                sample | {"p": p, "q": q, "mask": mask, "scored": mask}
            )
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        expected = by_hand(dense[row["step"]]) | answers_by_hand(dense[row["step"]], 5)
        check_row(row, expected, ("reverse_kl",))
    assert "has no age" in str(monitor.missing)


def trl_trainers() -> set[str]:
    """The names of all trainers that the installed TRL defines."""
    import trl.experimental
    import trl.trainer

    names = set()
    for package in (trl.trainer, trl.experimental):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.endswith("_trainer"):
                source = inspect.getsource(import_module(module.name))
                names |= set(re.findall(r"^class (\w+Trainer)\(", source, re.M))
    return names - {"_BaseTrainer"}


def test_every_trainer_of_trl_is_observed_or_refused_with_a_reason() -> None:
    names = trl_trainers()
    assert len(names) > 20
    assert names == {*OBSERVED, *NOT_OBSERVED, "GMPOTrainer"}
    rows = re.findall(r"^\| (\w+Trainer)", (ROOT / "docs" / "trl.md").read_text(), re.M)
    assert sorted(rows) == sorted(names)
    for name, reason in NOT_OBSERVED.items():
        trainer = type(name, (), {})()
        message = f"{name} is not supported: {re.escape(reason)}"
        with pytest.raises(ValueError, match=message), observe_trl(trainer):
            pass
