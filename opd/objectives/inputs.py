"""What a token's loss reads: constants of the scored batch, and the student's log-probabilities.

Shapes: B responses, T positions, K support ids, N supervised tokens of a batch, n tokens of a part;
"..." is any shape of tokens, in practice (N,) or (n,).
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.errors import InvalidInput
from diagnostics.missing import missing_fields


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenInputs:
    """Inputs of a loss at the supervised tokens; everything is local to the token.

    A field that the objective does not read may be None: `logp` where `requirements.sampled_logp`
    is False, the support where it has none.
    """

    credit: Tensor
    """(...) credit, constant."""
    weight: Tensor
    """(...) factor of the token's loss, `opd.objectives.objective.token_weights`, constant."""
    teacher_logp: Tensor | None = None
    """(...) teacher log-probability of the sampled token, constant; None without a teacher."""
    old_logp: Tensor | None = None
    """(...) student log-probability when the rollouts were scored, constant."""
    tokens: Tensor | None = None
    """(...) long, the sampled token."""
    ids: Tensor | None = None
    """(..., K) long, ids of the support; None without a support or on the whole vocabulary."""
    teacher_support_logp: Tensor | None = None
    """(..., K) teacher log-probabilities on the support, constant."""
    present: Tensor | None = None
    """(..., K) bool, the support ids that count; all of them if None."""
    inside: Tensor | None = None
    """(...) bool, whether the sampled token is one of the support ids that count."""
    logp: Tensor | None = None
    """(...) student log-probability of the sampled token, with gradient."""
    support_logp: Tensor | None = None
    """(..., K) student log-probabilities on the support, with gradient."""

    @classmethod
    def of(
        cls, batch: ScoredRollouts, support: str, credit: Tensor, weight: Tensor
    ) -> "TokenInputs":
        """Collect the constants of a batch's N supervised tokens, row-major over the mask.

        Args:
            batch: Scored rollouts.
            support: Support of the objective.
            credit: (B, T) credit of the same rows.
            weight: (B, T) weight of the same rows.

        Returns:
            Inputs without the student's log-probabilities. A support of the whole vocabulary is
            left out where the batch has none, for callers that have both distributions.

        Raises:
            InvalidInput: The batch lacks the objective's support.
        """
        token_index = batch.mask.flatten().nonzero()[:, 0]

        def select(x: Tensor) -> Tensor:
            return x.flatten(0, 1)[token_index]

        has_teacher = "teacher_logp" not in missing_fields(batch)
        inputs = cls(
            credit=select(credit),
            weight=select(weight),
            teacher_logp=select(batch.teacher_logp) if has_teacher else None,
            old_logp=select(batch.student_logp),
            tokens=select(batch.tokens),
        )
        source = "none" if batch.support is None else batch.support.source
        if support == "none" or (support == "full" and source != "full"):
            return inputs
        if batch.support is None or source != support:
            raise InvalidInput(
                f"the objective needs a {support!r} support, but the batch has {source!r}; score "
                "the batch with that support"
            )
        present = batch.support.present
        return replace(
            inputs,
            ids=select(batch.support.ids),
            teacher_support_logp=select(batch.support.teacher_logp),
            present=None if present is None else select(present),
            inside=select(batch.support.contains(batch.tokens)),
        )

    def part(self, c: slice) -> "TokenInputs":
        """Return the tokens of a slice."""
        parts: dict[str, Any] = {
            name: None if x is None else x[c] for name, x in vars(self).items()
        }
        return TokenInputs(**parts)


def teacher_sampled_logp(inputs: TokenInputs) -> Tensor:
    """Return (...) log q(y), constant.

    Args:
        inputs: Tokens with `teacher_logp`.

    Returns:
        (...) log-probabilities of the sampled tokens under the teacher.

    Raises:
        InvalidInput: `teacher_logp` is missing.
    """
    if inputs.teacher_logp is None:
        raise InvalidInput(
            "this objective reads the teacher's log-probability of the sampled token, but the "
            "batch was scored without a teacher; set a teacher"
        )
    return inputs.teacher_logp.detach()
