"""Losses of the user's own: functions that ask by parameter name for what they need.

Such a function sees all rollouts of an optimizer step at once and returns one scalar to be
minimised, so that its normaliser is its own. It reads whole logits: unlike our objectives, which
stream over the vocabulary, it holds (B, T, V) logits of the step in memory, with gradient.

Shapes: B responses, T positions, V vocabulary, K ids.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from diagnostics.io.user_functions import load_function

Values = Mapping[str, Any]
"""Value of each parameter that a loss asks for."""

PARAMETERS: dict[str, str] = {
    "student_logits": "(B, T, V), with gradient; position t predicts tokens[:, t]",
    "teacher_logits": "(B, T, V)",
    "tokens": "(B, T) sampled ids",
    "mask": "(B, T) bool, supervised tokens; other entries of everything are arbitrary",
    "sampler_logp": "(B, T) log-probability that the tokens were sampled with",
    "student_logp": "(B, T) student's log-probability of the tokens, with gradient",
    "teacher_logp": "(B, T) teacher's log-probability of the tokens",
    "reward": "(B,) grade of each response",
    "prompt": "(B,) id of the prompt; rows of one prompt share it",
    "student_topk": "(ids, logp), (B, T, K) each: the student's K most probable, with gradient",
    "teacher_topk": "(ids, logp), (B, T, K) each: the teacher's K most probable",
}
"""Names that a loss may ask for -> shape and meaning."""


@dataclass(frozen=True)
class UserLoss:
    """A function and the parameters that it asks for."""

    name: str
    """MODULE:FUNCTION or FILE.py:FUNCTION."""
    function: Callable[..., Any]
    """The function."""
    asks: tuple[str, ...]
    """Names of PARAMETERS that it is called with."""

    @property
    def support(self) -> str:
        """What the teacher is asked for, as in `Requirements.support`."""
        if "teacher_logits" in self.asks:
            return "full"
        return "teacher" if "teacher_topk" in self.asks else "none"

    def __call__(self, values: Values) -> Tensor:
        """Return the loss.

        Args:
            values: At least the parameters that the function asks for.

        Returns:
            Scalar with gradient.

        Raises:
            InvalidInput: The function returns something else.
        """
        loss = self.function(**{name: values[name] for name in self.asks})
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
            raise InvalidInput(
                f"the loss {self.name} returned {what or f'a {type(loss).__name__}'}; it must "
                "return a scalar tensor, such as (losses * mask).sum() / mask.sum()"
            )
        if not loss.requires_grad:
            raise InvalidInput(
                f"the loss {self.name} has no gradient; compute it from student_logits, "
                "student_logp or student_topk, without detach or no_grad"
            )
        return loss.reshape(())


def load_user_loss(name: str) -> UserLoss:
    """Import a loss, and find what it asks for.

    Args:
        name: MODULE:FUNCTION or FILE.py:FUNCTION.

    Returns:
        The loss.

    Raises:
        InvalidInput: It cannot be imported, asks for something unknown, or for nothing of the
            student's with gradient.
        MissingFile: FILE.py does not exist.
    """
    loss = as_user_loss(load_function(name, "objective"), name)
    if not any(x.startswith("student_") for x in loss.asks):
        raise InvalidInput(
            f"the objective {name} asks for {', '.join(loss.asks) or 'nothing'}, none of which has "
            "a gradient; ask for student_logits, student_logp or student_topk"
        )
    return loss


def as_user_loss(function: Callable[..., Any], name: str) -> UserLoss:
    """Find what a function asks for.

    Args:
        function: The function.
        name: Its name, for messages.

    Returns:
        The loss.

    Raises:
        InvalidInput: It asks for something unknown.
    """
    parameters = inspect.signature(function).parameters.values()
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    asks = [x.name for x in parameters if x.name in PARAMETERS and x.kind in keyword]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    unknown = [
        x.name
        for x in parameters
        if x.name not in asks and x.default is inspect.Parameter.empty and x.kind not in variadic
    ]
    if unknown:
        raise InvalidInput(
            f"the objective {name} asks for {', '.join(unknown)}; it may ask for "
            f"{', '.join(PARAMETERS)}, and other parameters need a default"
        )
    return UserLoss(name, function, tuple(asks))


def loss_values(
    loss: UserLoss,
    student_logits: Tensor,
    constants: Values,
    k: int,
) -> dict[str, Any]:
    """Return what a loss asks for.

    Args:
        loss: The loss.
        student_logits: (B, T, V) logits with gradient, at the temperature of the loss.
        constants: The parameters that carry no gradient; `tokens` in any case.
        k: K.

    Returns:
        Value of each parameter.
    """
    values = {**constants, "student_logits": student_logits}
    if {"student_logp", "student_topk"} & {*loss.asks}:
        logp = student_logits.log_softmax(-1)
        values["student_logp"] = logp.gather(-1, constants["tokens"][..., None])[..., 0]
        if "student_topk" in loss.asks:
            ids = logp.detach().topk(k, -1).indices
            values["student_topk"] = (ids, logp.gather(-1, ids))
    return values


def try_user_loss(loss: UserLoss, vocabulary: int, k: int) -> None:
    """Call a loss once on random logits, so that a run does not begin with one that cannot train.

    Args:
        loss: The loss.
        vocabulary: V of the run.
        k: K of the run.

    Raises:
        InvalidInput: It fails, returns no scalar, or gives the student no gradient.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 3, vocabulary, generator=generator)
    student, teacher = logits[0].clone().requires_grad_(), logits[1]
    tokens = torch.randint(vocabulary, (4, 3), generator=generator)
    teacher_logp = teacher.log_softmax(-1)
    top = teacher_logp.topk(k, -1)

    def of_tokens(logp: Tensor) -> Tensor:
        return logp.gather(-1, tokens[..., None])[..., 0]

    constants = {
        "teacher_logits": teacher,
        "tokens": tokens,
        "mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool(),
        "sampler_logp": of_tokens(student.detach().log_softmax(-1)),
        "teacher_logp": of_tokens(teacher_logp),
        "reward": torch.tensor([0.0, 1.0, 1.0, 0.0]),
        "prompt": torch.tensor([0, 0, 1, 1]),
        "teacher_topk": (top.indices, top.values),
    }
    try:
        value = loss(loss_values(loss, student, constants, k))
        value.backward()
    except InvalidInput:
        raise
    except Exception as error:  # a user's function can raise anything
        raise InvalidInput(
            f"the objective {loss.name} failed with {type(error).__name__}: {error} on random "
            f"logits of {(4, 3, vocabulary)}; correct it before the run"
        ) from error
    if student.grad is None or not bool(student.grad.any()):
        raise InvalidInput(
            f"the objective {loss.name} gives the student's logits no gradient on random logits; "
            "compute it from student_logits, student_logp or student_topk"
        )
