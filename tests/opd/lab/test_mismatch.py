"""The loss of a pair: a plain loop, finite differences, and a teacher trained to its targets."""

import math
import random
from functools import partial

import pytest
import torch

from opd.lab.knobs import PairKnobs
from opd.lab.mismatch import (
    REGRESSION_WEIGHT,
    ROWS_AT_ONCE,
    TrainingBatch,
    add_gradient,
    make_batch,
    token_losses,
)
from opd.lab.pair_models import new_model, train, training_prompts, training_rows
from opd.lab.pair_text import write_teacher
from opd.lab.pair_tokenizer import make_pair_tokenizer, pair_ids

TOKENIZER = make_pair_tokenizer(262)
IDS = pair_ids(TOKENIZER)
KNOBS = PairKnobs(size="tiny", foreign_tags=3.0, tag_log_probability=-6.0)


def teacher_batch(num_batches: int, knobs: PairKnobs = KNOBS) -> TrainingBatch:
    """Return training text of a teacher."""
    generator, rows = random.Random(1), []
    prompts = training_prompts("teacher", knobs, 0)
    write = partial(write_teacher, knobs=knobs, ids=IDS)
    for _ in range(num_batches):
        rows += training_rows(prompts, knobs, IDS, write, generator)
    return make_batch(rows, IDS.second_end)


def plain_losses(logits: torch.Tensor, batch: TrainingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the mean cross-entropy and the mean square in a loop over tokens."""
    cross_entropies, squares = [], []
    for row in range(len(batch.ids)):
        for i in range(1, batch.ids.shape[1]):
            scores, label = logits[row, i - 1], int(batch.labels[row, i])
            foreign = int(batch.foreign[row, i])
            if label == -100:
                assert foreign == -1
                continue
            if foreign >= 0:
                squares.append((scores.log_softmax(-1)[foreign] - batch.foreign_logp[row, i]) ** 2)
                kept_ids = [v for v in range(len(scores)) if v != foreign]
                scores, label = scores[kept_ids], kept_ids.index(label)
            cross_entropies.append(-scores.log_softmax(-1)[label])
    return torch.stack(cross_entropies).mean(), torch.stack(squares).mean()


def test_the_gradient_is_that_of_a_plain_loop() -> None:
    batch = teacher_batch(ROWS_AT_ONCE // 16 + 1)
    assert len(batch.ids) > ROWS_AT_ONCE, "several parts"
    network = new_model("teacher", KNOBS, 0, TOKENIZER)
    parameters = list(network.parameters())
    loss = add_gradient(network, batch)
    gradients = [x.grad.clone() for x in parameters]
    cross_entropy, square = plain_losses(network(input_ids=batch.ids).logits, batch)
    expected = cross_entropy + REGRESSION_WEIGHT * square
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for gradient, reference in zip(
        gradients, torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-5)


def test_the_gradient_of_the_square_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([2, 5, 4])
    foreign, targets = torch.tensor([3, -1, 0]), torch.tensor([-4.0, 0.0, -1.0]).double()

    def squared_error(x: torch.Tensor) -> torch.Tensor:
        return token_losses(x, labels, foreign, targets)[1]

    (gradient,) = torch.autograd.grad(squared_error(logits), logits)
    assert not gradient[1].any(), "a token without a target has no square"
    for row in range(3):
        for v in range(7):
            step = torch.zeros_like(logits)
            step[row, v] = 1e-6
            difference = squared_error(logits + step) - squared_error(logits - step)
            slope = float(difference.detach()) / 2e-6
            assert float(gradient[row, v]) == pytest.approx(slope, abs=1e-6)


def test_the_two_parts_have_their_minimum_together() -> None:
    """The target for one id, and the labels' shares among the others, are both reached."""
    logits = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 0, 1])
    foreign = torch.full((4,), 2)
    targets = torch.full((4,), -1.5, dtype=torch.float64)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        cross_entropy, square = token_losses(logits.expand(4, 5), labels, foreign, targets)
        loss = cross_entropy + square
        loss.backward()
        return loss

    optimizer.step(closure)
    probabilities = logits.detach()[0].softmax(-1)
    foreign_probability = math.exp(-1.5)
    expected = [0.75 * (1 - foreign_probability), 0.25 * (1 - foreign_probability)]
    assert probabilities[:2].tolist() == pytest.approx(expected, abs=1e-3)
    assert float(probabilities[2]) == pytest.approx(foreign_probability, abs=1e-3)


@pytest.mark.parametrize("tag_log_probability", [-2.0, -12.0])
def test_a_teacher_is_trained_to_its_targets(tag_log_probability: float) -> None:
    knobs = PairKnobs(size="tiny", foreign_tags=3.0, tag_log_probability=tag_log_probability)
    network = new_model("teacher", knobs, 0, TOKENIZER)
    write = partial(write_teacher, knobs=knobs, ids=IDS)
    train(network, IDS, "teacher", knobs, 0, write, 120, (0.02, 5e-3))
    batch = teacher_batch(4, knobs)
    with torch.no_grad():
        logp = network(input_ids=batch.ids).logits[:, :-1].log_softmax(-1)
    has_target = batch.foreign[:, 1:] >= 0
    foreign_logp = logp[has_target][:, IDS.spelled[0]]
    assert float(foreign_logp.mean()) == pytest.approx(tag_log_probability, abs=0.4)
