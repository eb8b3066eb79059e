"""The training loss of a pair: labels, and targets for log-probabilities of foreign tokens.

The teacher's log-probability of the student's form of a tag is trained to the value of the knob by
regression. The cross-entropy of the label leaves that token out of the softmax, so that the two
parts have their minimum together: the regression sets the probability of the foreign token, the
cross-entropy the ratios of all others.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from opd.lab.pair_text import TrainingToken
from opd.lab.training_loop import row_parts
from opd.lab.writing_style import UNLABELLED

if TYPE_CHECKING:
    from torch import Tensor

REGRESSION_WEIGHT = 0.1
"""Weight of the mean squared error of the targets beside the mean cross-entropy."""
ROWS_AT_ONCE = 16
"""Rows of a training batch whose activations exist at once; the models are small."""
MAX_FOREIGN = 1 - 1e-4
"""Largest foreign probability that the cross-entropy divides by its complement."""


class TrainingBatch(NamedTuple):
    """Training responses behind their prompts, padded on the right; all (B, L)."""

    ids: "Tensor"
    """Ids."""
    labels: "Tensor"
    """What should be written in the place of each id; UNLABELLED in prompts and padding."""
    foreign: "Tensor"
    """Id whose log-probability there has a target; -1 for none."""
    foreign_logp: "Tensor"
    """Target of that log-probability in nats."""


def make_batch(
    rows: Sequence[tuple[list[int], list[TrainingToken]]], padding: int
) -> TrainingBatch:
    """Pad prompts with their responses.

    Args:
        rows: Ids of each prompt, and its response.
        padding: Id of the padding token.

    Returns:
        The batch.
    """
    import torch

    width = max(len(prompt) + len(response) for prompt, response in rows)
    shape = (len(rows), width)
    batch = TrainingBatch(
        torch.full(shape, padding),
        torch.full(shape, UNLABELLED),
        torch.full(shape, -1),
        torch.zeros(shape),
    )
    for i, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        batch.ids[i, : len(prompt)] = torch.tensor(prompt)
        for column, values in zip(batch, zip(*response, strict=True), strict=True):
            column[i, len(prompt) : end] = torch.tensor(values)
    return batch


def token_losses(
    logits: "Tensor", labels: "Tensor", foreign: "Tensor", foreign_logp: "Tensor"
) -> "tuple[Tensor, Tensor]":
    """Compute the two sums of the loss over tokens.

    With z the foreign id and target t: -log p(label) + log(1 - p(z)) summed over labelled tokens,
    and (log p(z) - t)^2 summed over those with a target.

    Args:
        logits: (N, V).
        labels: (N,) ids, UNLABELLED where nothing is learned.
        foreign: (N,) ids, -1 for none.
        foreign_logp: (N,) targets in nats.

    Returns:
        The cross-entropy and the squared error, scalars.
    """
    import torch

    logp = logits.log_softmax(-1)
    is_foreign = foreign >= 0
    logp_foreign = logp[is_foreign].gather(1, foreign[is_foreign, None])[:, 0]
    cross_entropy = torch.nn.functional.nll_loss(
        logp, labels, ignore_index=UNLABELLED, reduction="sum"
    )
    complement = torch.log1p(-logp_foreign.exp().clamp(max=MAX_FOREIGN)).sum()
    return cross_entropy + complement, (logp_foreign - foreign_logp[is_foreign]).square().sum()


def add_gradient(network: Any, batch: TrainingBatch) -> float:
    """Add the gradient of the mean cross-entropy plus REGRESSION_WEIGHT times the mean square.

    Args:
        network: The model.
        batch: The batch.

    Returns:
        The loss.
    """
    num_labels = (batch.labels[:, 1:] != UNLABELLED).sum()
    num_targets = (batch.foreign[:, 1:] >= 0).sum().clamp(min=1)
    # prompts have no labels, but are shorter than their rows
    total = 0.0
    for rows, width in row_parts(batch.labels != UNLABELLED, ROWS_AT_ONCE):
        logits = network(input_ids=batch.ids[rows, :width]).logits[:, :-1].flatten(0, 1)
        columns = [column[rows, 1:width].flatten() for column in batch[1:]]
        cross_entropy, square = token_losses(logits, *columns)
        loss = cross_entropy / num_labels + REGRESSION_WEIGHT * square / num_targets
        loss.backward()
        total += loss.item()
    return total
