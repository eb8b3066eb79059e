"""Training signal metrics (A-*): which tokens carry the training signal, and with which sign.

Shapes: every per-token quantity is (B, T). The cost of the sampled token is r = log student - log
teacher; the "advantage" of other systems is -r. The sampling unit is the prompt.
"""

from torch import Tensor

from diagnostics.batch import ScoredRollouts
from diagnostics.core.histograms import Concentration
from diagnostics.core.moments import WithinPrefixVariance
from diagnostics.core.optional_fields import require_distribution_stats
from diagnostics.core.totals import Accumulator, Mean


def sign_shares(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-1: Compute the share and the total weight of tokens that are pushed down and up.

    Access: L0.
    Source: one-token imbalance, 2603.25562.
    Healthy: negative_share is usually above 1/2 even without a fault, because the student samples
    the tokens that it overrates; compare it with its null (`sign_null`). signed_balance is below
    1/2 while the mean cost is positive, which it is in expectation (it is a KL divergence), and
    tends to 1/2 as the student reaches the teacher.

    Args:
        batch: Scored rollouts.

    Returns:
        signal/negative_share: sum m 1[r > 0] / sum m, tokens that the student overrates.
        signal/positive_share: The same with r < 0.
        signal/negative_mass: sum m max(r, 0) / sum m.
        signal/positive_mass: The same with -r.
        signal/signed_balance: sum m max(-r, 0) / sum m |r|.
    """
    r, mask, prompt = batch.log_ratio, batch.mask, batch.prompt
    return {
        "signal/negative_share": Mean.from_values(r > 0, mask, prompt),
        "signal/positive_share": Mean.from_values(r < 0, mask, prompt),
        "signal/negative_mass": Mean.from_values(r.clamp(min=0), mask, prompt),
        "signal/positive_mass": Mean.from_values((-r).clamp(min=0), mask, prompt),
        "signal/signed_balance": Mean.ratio((-r).clamp(min=0), r.abs(), mask, prompt),
    }


def sign_null(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-1: Compute the expected share of overrated tokens and the observed excess over it.

    Both are averaged over all sampled tokens, because a mask that depends on the sampled token
    changes the share.

    Access: L2.
    Source: derived, E[1[r > 0] | prefix] when the token is sampled from p.
    Healthy: excess within a few of its standard errors of 0. Otherwise the tokens were not sampled
    from the scored student (sampler truncation, temperature, stale weights, shifted mask).

    Args:
        batch: Scored rollouts.

    Returns:
        signal/negative_share_null: Mean of sum_v p(v) 1[p(v) > q(v)].
        signal/negative_share_excess: Mean of 1[r > 0] minus the null, paired by token.
    """
    null = require_distribution_stats(batch).overrated
    observed = (batch.log_ratio > 0).to(null.dtype)
    return {
        "signal/negative_share_null": Mean.from_values(null, batch.sampled, batch.prompt),
        "signal/negative_share_excess": Mean.from_values(
            observed - null, batch.sampled, batch.prompt
        ),
    }


def signal_concentration(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-2: Compute the concentration of |r| over tokens.

    Access: L0.
    Source: this toolkit; motivated by 2604.14084, where 3 to 15 % of tokens carry almost all of the
    effect.
    Healthy: stable over steps. An n_eff_share of a few per mille or a top1_share above about 1/2
    means that a few tokens, often special tokens, dominate the signal.

    Args:
        batch: Scored rollouts.

    Returns:
        signal/signal: Readouts n_eff, entropy_n_eff, top1_share and gini; formulas:
            `Concentration`.
    """
    return {"signal/signal": Concentration.from_values(batch.log_ratio.abs(), batch.mask)}


def signed_concentration(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-2: Compute the concentration of the positive and the negative training signal separately.

    Access: L0.
    Source: this toolkit.
    Healthy: both stable. The negative side is the more concentrated one: -log q(y) is unbounded,
    while -r is at most -log p(y). The usual fault is a few tokens with very large negative signal,
    see `confident_impossible`.

    Args:
        batch: Scored rollouts.

    Returns:
        signal/negative_signal: Readouts negative_signal_* of r over tokens with r > 0.
        signal/positive_signal: Readouts positive_signal_* of -r over tokens with r < 0.
    """
    r = batch.log_ratio
    return {
        "signal/negative_signal": Concentration.from_values(r, batch.mask & (r > 0)),
        "signal/positive_signal": Concentration.from_values(-r, batch.mask & (r < 0)),
    }


def action_dependence(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-8: Compute the share of the signal variance due to the sampled token, not the prefix.

    Only this part can move the student at gamma = 0: a weight that is a function of the prefix
    alone has expected gradient 0.

    Access: L2.
    Source: derived.
    Healthy: near 1 for sampled-token distillation. Near 0, the costs differ more between prefixes
    than between tokens, and a value baseline would remove most of the noise.

    Args:
        batch: Scored rollouts.

    Returns:
        signal/action_dependence: Mean of Var(r | prefix) / Var(r) over all sampled tokens, with
            Var(r | prefix) = sum p l^2 - KL^2.
    """
    prefix = require_distribution_stats(batch)
    variance = (prefix.ratio_square - prefix.reverse_kl.square()).clamp(min=0)
    return {
        "signal/action_dependence": WithinPrefixVariance.from_values(
            batch.log_ratio, variance, batch.sampled
        )
    }


def energy_concentration(batch: ScoredRollouts) -> dict[str, Accumulator]:
    """A-4: Compute the concentration of the update size sqrt(e) over tokens.

    e = r^2 (1 - 2 p(y) + sum_v p(v)^2). The bracket is |one_hot(y) - p|^2, so sqrt(e) is the norm
    of the token's gradient with respect to its logits when r is its weight.

    Access: L0 and the collision probability (L2 here).
    Source: derived; the weight of 2602.07078.
    Healthy: as for the signal. An n_eff_share lower than the signal's means that the disagreement
    is where the student is undecided; a higher one, that it is on confident tokens that hardly
    move.

    Args:
        batch: Scored rollouts.

    Returns:
        signal/energy: The readouts of `signal_concentration`.
    """
    size = batch.log_ratio.abs() * score_norm(batch)
    return {"signal/energy": Concentration.from_values(size, batch.mask)}


def score_norm(batch: ScoredRollouts) -> Tensor:
    """Return (B, T) |one_hot(y) - p| = sqrt(1 - 2 p(y) + sum_v p(v)^2), the logit score norm."""
    inside = 1 - 2 * batch.student_logp.detach().exp() + require_distribution_stats(batch).collision
    return inside.clamp(min=0).sqrt()  # negative only by rounding: it is a square
