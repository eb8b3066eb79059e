"""Supervision balance (A-*): which tokens carry the training signal, and with which sign.

Shapes: every per-token quantity is (B, T). r = log student - log teacher of the sampled token is
the cost; the "advantage" of other systems is -r. Sampling unit: the prompt.
"""

from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.histograms import Concentration
from diagnostics.core.moments import Within
from diagnostics.core.optional_fields import prefix_of
from diagnostics.core.totals import Accumulator, Mean


def sign_shares(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-1: how many tokens are pushed down and up, and with how much total weight.

    negative_share = sum m 1[r > 0] / sum m (the student overrates the token), positive_share with
    r < 0; negative_mass = sum m max(r, 0) / sum m, positive_mass with -r;
    signed_balance = sum m max(-r, 0) / sum m |r|.
    Access: L0. Source: one-token imbalance, 2603.25562.
    Healthy: negative_share is usually above 1/2 with no fault at all, because the student samples
    what it overrates; read it against its null (`sign_null`). signed_balance is below 1/2 when the
    mean cost is positive, which it is in expectation (it is a KL), and tends to 1/2 as the
    student reaches the teacher.
    """
    r, mask, prompt = batch.log_ratio, batch.mask, batch.prompt
    return {
        "signal/negative_share": Mean.of(r > 0, mask, prompt),
        "signal/positive_share": Mean.of(r < 0, mask, prompt),
        "signal/negative_mass": Mean.of(r.clamp(min=0), mask, prompt),
        "signal/positive_mass": Mean.of((-r).clamp(min=0), mask, prompt),
        "signal/signed_balance": Mean.ratio((-r).clamp(min=0), r.abs(), mask, prompt),
    }


def sign_null(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-1: the share of overrated tokens that the two models imply, and the excess over it.

    negative_share_null = mean of sum_v p(v) 1[p(v) > q(v)];
    negative_share_excess = mean of 1[r > 0] minus that, paired by token; both over all sampled
    tokens, since a mask that reads the token leaves another share.
    Access: L2. Source: derived, E[1[r > 0] | prefix] when the token is sampled from p.
    Healthy: excess within a few of its standard errors of 0. Otherwise the tokens were not sampled
    from the scored student (sampler truncation, temperature, stale weights, shifted mask).
    """
    null = prefix_of(batch).overrated
    observed = (batch.log_ratio > 0).to(null.dtype)
    return {
        "signal/negative_share_null": Mean.of(null, batch.sampled, batch.prompt),
        "signal/negative_share_excess": Mean.of(observed - null, batch.sampled, batch.prompt),
    }


def signal_concentration(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-2: concentration of |r| over tokens: n_eff, entropy_n_eff, top1_share, gini.

    Formulas: `Concentration`. Access: L0. Source: ours; motivated by 2604.14084, where 3 to 15 % of
    tokens carry almost all that matters.
    Healthy: stable over steps. n_eff_share of a few per mille or top1_share above about 1/2 means
    that a handful of tokens, often special ones, own the signal.
    """
    return {"signal/signal": Concentration.of(batch.log_ratio.abs(), batch.mask)}


def signed_concentration(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-2: the same concentration of the signal that pushes down, and of that which pushes up.

    negative_signal_* of r over tokens with r > 0, positive_signal_* of -r over tokens with r < 0.
    Access: L0. Source: ours.
    Healthy: both stable. The negative side is the more concentrated one: -log q(y) has no bound
    while -r is at most -log p(y). A handful of huge negative tokens is the usual fault, see
    `confident_impossible`.
    """
    r = batch.log_ratio
    return {
        "signal/negative_signal": Concentration.of(r, batch.mask & (r > 0)),
        "signal/positive_signal": Concentration.of(-r, batch.mask & (r < 0)),
    }


def action_dependence(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-8: the part of the signal's variance that the sampled token decides, not its prefix.

    action_dependence = mean of Var(r | prefix) / Var(r), Var(r | prefix) = sum p l^2 - KL^2, over
    all sampled tokens.
    Access: L2. Source: derived. Only that part can move the student at gamma = 0: a weight that is
    a function of the prefix alone has expected gradient 0.
    Healthy: near 1 for sampled-token distillation. Near 0, the costs differ between prefixes more
    than between tokens, and a value baseline would remove most of the noise.
    """
    prefix = prefix_of(batch)
    variance = (prefix.ratio_square - prefix.reverse_kl.square()).clamp(min=0)
    return {"signal/action_dependence": Within.of(batch.log_ratio, variance, batch.sampled)}


def energy_concentration(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-4: concentration of the update, sqrt(e) with e = r^2 (1 - 2 p(y) + sum_v p(v)^2).

    The bracket is |one_hot(y) - p|^2, so sqrt(e) is the norm of this token's gradient with respect
    to its logits when r is its weight. Same readouts as `signal_concentration`.
    Access: L0 + the collision probability (L2 here). Source: derived; the weight of 2602.07078.
    Healthy: as for the signal; lower n_eff_share than the signal's means that the disagreement sits
    where the student is undecided, higher that it sits on confident tokens that hardly move.
    """
    size = batch.log_ratio.abs() * score_norm(batch)
    return {"signal/energy": Concentration.of(size, batch.mask)}


def score_norm(batch: ScoredRollouts) -> Tensor:
    """(B, T) norm of the logit score, |one_hot(y) - p| = sqrt(1 - 2 p(y) + sum_v p(v)^2)."""
    inside = 1 - 2 * batch.student_logp.detach().exp() + prefix_of(batch).collision
    return inside.clamp(min=0).sqrt()  # below 0 by rounding only: it equals a square
