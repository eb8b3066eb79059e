"""Sampling tokens from logits with temperature, top-p and per-row noise."""

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput

# The nucleus of a language model nearly always fits into so many ids; topk is cheaper than a sort.
TOP_CANDIDATES = 1024


class Sampler:
    """A logits processor that samples each token itself and stores its log-probabilities.

    It restricts the logits to the shared vocabulary, applies temperature and top-p, samples, and
    returns scores with one finite value per row, so that the argmax of `generate` selects the
    sampled token.

    Two log-probabilities of each token are stored, as (B, T) tables: `sampler_logp` under the
    distribution that was sampled from, and `softmax_logp` under the full softmax(logits /
    temperature). They differ by the logarithm of the nucleus mass.

    Args:
        vocabulary: Number of ids that may be sampled.
        temperature: Softmax temperature.
        top_p: Probability mass of the nucleus.
        noise: (B, T) uniform float64 in [0, 1), one number per token.
    """

    def __init__(self, vocabulary: int, temperature: float, top_p: float, noise: Tensor) -> None:
        self.vocabulary, self.temperature, self.top_p = vocabulary, temperature, top_p
        self.noise, self.position = noise, 0
        self.rows = torch.arange(len(noise), device=noise.device)
        self.sampler_logp = torch.zeros_like(noise, dtype=torch.float32)
        self.softmax_logp = torch.zeros_like(self.sampler_logp)
        self.finite = torch.ones(noise.shape[1], dtype=torch.bool, device=noise.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Sample the next token of every row, as a logits processor of `generate`.

        Args:
            input_ids: (B, L) ids so far; unused.
            scores: (B, V) logits; rows beyond those of the noise only pad the batch.

        Returns:
            (B, V) scores: 0 at the sampled token, -inf elsewhere.
        """
        num_rows = len(self.rows)
        one_hot_scores = torch.full_like(scores, -torch.inf)
        one_hot_scores[num_rows:, 0] = 0.0
        token = self.sample(scores[:num_rows])
        one_hot_scores[:num_rows].scatter_(1, token[:, None], 0.0)
        return one_hot_scores

    def sample(self, logits: Tensor) -> Tensor:
        """Sample the next token of every selected row.

        Args:
            logits: (n, V).

        Returns:
            (n,) ids.
        """
        place = (self.rows, self.position)
        logits = logits[:, : self.vocabulary].float()
        # Rows with NaN sample from zero logits and `check` raises later: no device sync per token
        finite = logits.amax(1).isfinite()
        self.finite[self.position] = finite.all()
        logits = torch.where(finite[:, None], logits, torch.zeros_like(logits))
        softmax_logp = (logits / self.temperature).log_softmax(-1)
        sampler_logp = softmax_logp if self.top_p >= 1 else nucleus(softmax_logp, self.top_p)
        token = draw(sampler_logp, self.noise[place])[:, None]
        self.sampler_logp[place] = sampler_logp.gather(1, token)[:, 0]
        self.softmax_logp[place] = softmax_logp.gather(1, token)[:, 0]
        self.position += 1
        return token[:, 0]

    def select(self, index: Tensor) -> None:
        """Go on with some of the selected rows.

        Args:
            index: (m,) which of them.
        """
        self.rows = self.rows[index]

    def check(self, num_positions: int) -> None:
        """Raise an error if the logits were not finite at some token.

        Args:
            num_positions: Number of response positions that are used.

        Raises:
            InvalidInput: Logits were NaN, or all of them infinite.
        """
        finite = self.finite[:num_positions]
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0, 0])
            raise InvalidInput(
                f"the student's logits are not finite from response token {first} on; its weights "
                "have diverged: resume from an earlier checkpoint with a lower learning rate"
            )


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Restrict a distribution to its top-p nucleus and renormalise.

    The nucleus is the smallest set of ids with mass >= top_p. The id that crosses the threshold
    belongs to it, so it is never empty. Whole rows are sorted only when the TOP_CANDIDATES most
    probable ids of some row have less mass than top_p.

    Args:
        logits: (B, V).
        top_p: Probability mass of the nucleus.

    Returns:
        (B, V) log-probabilities, -inf outside the nucleus.
    """
    logp = logits.log_softmax(-1)
    if top_p >= 1:
        return logp
    sorted_logp, order = logp.topk(min(TOP_CANDIDATES, logp.shape[-1]))
    if not bool((sorted_logp.exp().sum(-1) >= top_p).all()):
        sorted_logp, order = logp.sort(-1, descending=True)
    keep = sorted_logp.exp().cumsum(-1) - sorted_logp.exp() < top_p
    inside = torch.zeros_like(logp, dtype=torch.bool).scatter(-1, order, keep)
    return logp.masked_fill(~inside, -torch.inf).log_softmax(-1)


def draw(logp: Tensor, noise: Tensor) -> Tensor:
    """Sample ids by inversion: the first id whose cumulative probability exceeds the noise.

    The cumulative sums are float64, so the frequency of an id deviates only by the float32 rounding
    of its own probability. An id of probability 0 is never sampled.

    Args:
        logp: (B, V) normalised log-probabilities, -inf where the probability is 0.
        noise: (B,) float64 in [0, 1).

    Returns:
        (B,) ids.
    """
    mass = logp.exp().cumsum(-1, dtype=torch.float64)
    # noise is at most 1 - 2^-53, so the product stays below the total, which is about 1
    return torch.searchsorted(mass, noise[:, None] * mass[:, -1:], right=True)[:, 0]
