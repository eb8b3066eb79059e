"""Objectives of on-policy distillation: pure functions, the same for the exact study and the LLM.

A method is four choices. The **signal** is the per-token quantity that says how student and
teacher disagree; the **credit** spreads it over the tokens that caused it (once per optimizer
step, over the whole batch, no gradient); the **surrogate** turns it into a loss whose gradient is
the estimate (token by token, with gradient); the **reduction** divides by an explicit denominator.
Named compositions stand in `OBJECTIVES`, reductions in `DENOMINATORS`.

Shapes: B responses, T positions, K support ids; "..." is (B, T) or flat tokens (N,).
Sign: the cost r = log student - log teacher is minimised. J = E[sum_t r_t] is the sequence KL.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.batch import Scored

# --- signal -------------------------------------------------------------------------------------


def log_ratio(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """k1 = log student - log teacher of the sampled token.

    Unbiased for KL(student || teacher) at the prefix, of either sign. Differentiated directly it
    would have expected gradient zero, so it is only ever a weight: `score_function` stops its
    gradient.
    """
    return student_logp - teacher_logp


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """KL(student || teacher) = sum_v p (log p - log q) over the last axis.

    Args:
      student_logp: (..., K) normalised over K, with gradient (both in the weight and in the log).
      teacher_logp: (..., K) normalised over K; no gradient flows through it.

    Returns:
      (...) exact local divergence; an id with p = 0 contributes 0.
    """
    p = student_logp.exp()
    term = p * (student_logp - teacher_logp.detach())
    return torch.where(p > 0, term, torch.zeros_like(term)).sum(-1)


def renormalise(logp: Tensor) -> Tensor:
    """Log-probabilities restricted to the last axis and renormalised there: (..., K) -> (..., K).

    Unchanged by a constant per position, so logits serve as well as true log-probabilities.
    """
    return logp.log_softmax(-1)


# --- credit -------------------------------------------------------------------------------------


def immediate(cost: Tensor, mask: Tensor) -> Tensor:
    """A token answers for its own cost alone. Unbiased for the KL with frozen prefixes."""
    return cost * mask


def to_go(cost: Tensor, mask: Tensor) -> Tensor:
    """A token answers for its own and all later costs: G_t = sum_{u >= t} r_u.

    Unbiased for the gradient of the sequence KL (past costs drop: E[score | prefix] = 0).
    """
    return (cost * mask).flip(1).cumsum(1).flip(1) * mask


def discounted(cost: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + gamma G_{t+1} over supervised tokens; masked positions do not advance gamma.

    gamma = 0 is `immediate`, gamma = 1 is `to_go`; between them the mean field is not the gradient
    of any function. (arXiv 2603.25562, eq. 3.)

    Raises:
      ValueError: gamma is outside [0, 1].
    """
    check_gamma(gamma)
    if gamma == 0:
        return immediate(cost, mask)
    if gamma == 1:
        return to_go(cost, mask)
    running = torch.zeros_like(cost[:, 0])
    columns = []
    for t in reversed(range(cost.shape[1])):
        running = torch.where(mask[:, t], cost[:, t] + gamma * running, running)
        columns.append(running)
    return torch.stack(columns[::-1], 1) * mask


def check_gamma(gamma: float) -> None:
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}; the discount must lie in [0, 1]")


# --- surrogate ----------------------------------------------------------------------------------


def score_function(logp: Tensor, weight: Tensor) -> Tensor:
    """Loss whose gradient is weight * grad log p(y): (...), (...) -> (...).

    No gradient flows through the weight. Unbiased only if y was sampled from p itself: under
    top-p or another temperature E[grad log p] is not zero.
    """
    return logp * weight.detach()


# --- reduction ----------------------------------------------------------------------------------


def reduce(loss: Tensor, mask: Tensor, denominator: Tensor) -> Tensor:
    """sum_{i,t} mask loss / denominator_i: (B, T), (B, T), (B,) -> scalar.

    The denominator is an argument: computed once over the whole optimizer step, so that the split
    into micro-batches changes nothing.
    """
    return (torch.where(mask, loss, torch.zeros_like(loss)) / denominator[:, None]).sum()


def token_mean(batch: Scored) -> Tensor:
    """(B,) every token weighs the same: the number of supervised tokens of the step."""
    return _positive(batch.mask.sum()).expand(len(batch)).to(batch.student_logp.dtype)


def sequence_sum(batch: Scored) -> Tensor:
    """(B,) every response weighs its length: the mean over responses of token sums, as in J."""
    _positive(batch.mask.sum())
    return batch.student_logp.new_full((len(batch),), float(len(batch)))


def sequence_mean(batch: Scored) -> Tensor:
    """(B,) every response weighs the same: B times its own length.

    Its gradient is not that of E[mean_t K_t]: the length's own derivative is left out.
    """
    _positive(batch.mask.sum())
    return batch.lengths.clamp(min=1).to(batch.student_logp.dtype) * len(batch)


def _positive(count: Tensor) -> Tensor:
    if int(count) == 0:
        raise ValueError(
            "the mask is empty: 0 supervised tokens in the whole step; look at the mask rule and "
            "at whether responses are empty"
        )
    return count


DENOMINATORS: dict[str, Callable[[Scored], Tensor]] = {
    "token_mean": token_mean,
    "sequence_sum": sequence_sum,
    "sequence_mean": sequence_mean,
}

# --- compositions -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Visited:
    """What a surrogate may see at visited tokens; everything is local to the token.

    logp (...) and support_logp (..., K) carry the gradient of the student; credit (...) and
    teacher_support_logp (..., K) are constants: the surrogates stop their gradients.
    """

    logp: Tensor
    credit: Tensor
    support_logp: Tensor | None = None
    teacher_support_logp: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A named composition.

    support: ids on which both models must be known: "none", "teacher" (its top-K) or "full".
    credit: Scored -> (B, T), over the whole step; surrogate: Visited -> (...) loss.
    """

    support: str
    credit: Callable[[Scored], Tensor]
    surrogate: Callable[[Visited], Tensor]

    def loss(self, logp: Tensor, support_logp: Tensor | None, batch: Scored) -> Tensor:
        """(B, T) unreduced loss of one whole batch; `logp` and `support_logp` carry gradient."""
        if self.support != "none":
            source = batch.support.source if batch.support is not None else "none"
            if support_logp is None or source != self.support:
                raise ValueError(f"needs a {self.support!r} support, the batch has {source!r}")
        teacher = batch.support.teacher_logp if batch.support is not None else None
        return self.surrogate(
            Visited(
                logp=logp,
                credit=self.credit(batch),
                support_logp=support_logp,
                teacher_support_logp=teacher,
            )
        )


def sampled_token(gamma: float = 0.0) -> Objective:
    """The gamma family: sum_t (sum_{u >= t} gamma^(u-t) r_u) grad log p(y_t).

    gamma = 0: expected gradient of sum_t E[KL(p || q at the prefix)] with the prefix distribution
    frozen; biased for the sequence KL by the missing derivative through the visited prefixes.
    gamma = 1: unbiased for the gradient of the sequence KL, with variance up to cubic in T.
    (arXiv 2603.25562, eq. 1-3.)
    """
    check_gamma(gamma)
    return Objective(
        support="none",
        credit=lambda batch: discounted(
            log_ratio(batch.student_logp, batch.teacher_logp), batch.mask, gamma
        ),
        surrogate=lambda at: score_function(at.logp, at.credit),
    )


def full_reverse_kl() -> Objective:
    """sum_t KL(p || q) over the whole vocabulary, prefixes frozen.

    The same expected gradient as `sampled_token()` without the noise of the sampled token.
    """
    return Objective(
        support="full",
        credit=no_credit,
        surrogate=lambda at: reverse_kl(*_pair(at)),
    )


def teacher_topk() -> Objective:
    """Local support matching: KL of both sides renormalised on the teacher's top-K ids.

    Logit gradient on the support: p'_v (log p'_v/q'_v - KL(p' || q')); exactly 0 outside. Biased
    for the full reverse KL: it cannot see how much mass either model has outside the support.
    K = V is `full_reverse_kl`, K = 1 is identically 0. (arXiv 2603.25562, eq. 6-8.)
    """
    return Objective(
        support="teacher",
        credit=no_credit,
        surrogate=lambda at: reverse_kl(*map(renormalise, _pair(at))),
    )


def no_credit(batch: Scored) -> Tensor:
    """A purely local objective has no score-function part."""
    return torch.zeros_like(batch.student_logp)


def _pair(at: Visited) -> tuple[Tensor, Tensor]:
    if at.support_logp is None or at.teacher_support_logp is None:
        raise ValueError("this objective compares both models on a support; none was given")
    return at.support_logp, at.teacher_support_logp


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "sampled_token": sampled_token,
    "full_reverse_kl": full_reverse_kl,
    "teacher_topk": teacher_topk,
}


def make(name: str, gamma: float = 0.0) -> Objective:
    """The objective called `name`; refuses a gamma that it would silently ignore.

    Raises:
      ValueError: unknown name, gamma outside [0, 1], or gamma > 0 for a purely local objective.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; known: {', '.join(OBJECTIVES)}")
    check_gamma(gamma)
    if "gamma" in inspect.signature(OBJECTIVES[name]).parameters:
        return OBJECTIVES[name](gamma=gamma)
    if gamma:
        raise ValueError(f"{name} is local, gamma = {gamma} would have no effect; use gamma = 0")
    return OBJECTIVES[name]()
