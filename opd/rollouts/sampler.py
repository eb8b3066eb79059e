"""Sampling tokens from logits with temperature, top-p and per-row noise."""

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput
from opd.models.lm_head import apply_temperature

# The nucleus of a language model nearly always fits into so many ids; topk is cheaper than a sort.
TOP_CANDIDATES = 1024
BLOCK, DIRECT_IDS = 128, 4096
"""Ids of a block of `draw`, and of a vocabulary so small that one pass over it is as fast."""


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
        logits = apply_temperature(logits[:, : self.vocabulary].float(), self.temperature)
        p = logits.softmax(-1)
        # A row whose logits are not finite is NaN everywhere. Some id of it is sampled, and `check`
        # raises later by its log-probability: no device sync per token
        if self.top_p >= 1:
            token = draw(p, self.noise[place])[:, None]
            self.softmax_logp[place] = p.gather(1, token)[:, 0].log()
            self.sampler_logp[place] = self.softmax_logp[place]
        else:
            ids, mass = nucleus(p, self.top_p)
            index = draw(mass, self.noise[place])[:, None]
            token, sampled_mass = ids.gather(1, index), mass.gather(1, index)
            self.softmax_logp[place] = sampled_mass[:, 0].log()
            self.sampler_logp[place] = (sampled_mass / mass.sum(1, keepdim=True))[:, 0].log()
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
        finite = self.softmax_logp[:, :num_positions].isfinite().all(0)
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0, 0])
            raise InvalidInput(
                f"the student's logits are not finite from response token {first} on; its weights "
                "have diverged: resume from an earlier checkpoint with a lower learning rate"
            )


def nucleus(p: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Restrict distributions to their top-p nuclei.

    The nucleus is the smallest set of ids with mass >= top_p. The id that crosses the threshold
    belongs to it, so it is never empty. Whole rows are sorted only when the TOP_CANDIDATES most
    probable ids of some row have less mass than top_p.

    Args:
        p: (B, V) probabilities.
        top_p: Probability mass of the nucleus.

    Returns:
        (B, C) candidate ids in ascending order, which contain the nucleus, and their probabilities,
        0 outside the nucleus.
    """
    mass, order = p.topk(min(TOP_CANDIDATES, p.shape[-1]))
    if not bool((mass.sum(-1) >= top_p).all()):
        mass, order = p.sort(-1, descending=True)
    mass = mass * (mass.cumsum(-1) - mass < top_p)
    ids, ascending = order.sort(-1)
    return ids, mass.gather(-1, ascending)


def draw(mass: Tensor, noise: Tensor) -> Tensor:
    """Sample ids by inversion: the first id whose cumulative mass exceeds noise times the total.

    Of a large vocabulary a block of ids is sampled first, by the float32 sums of the blocks, and
    then one of its ids. All cumulative sums are float64, so the frequency of an id deviates only by
    the float32 rounding of its own mass and of its block's. An id of mass 0 is never sampled.

    Args:
        mass: (B, V) probabilities, or masses in proportion to them.
        noise: (B,) float64 in [0, 1).

    Returns:
        (B,) ids; any of them in a row with NaN.
    """
    vocabulary = mass.shape[1]
    if vocabulary <= DIRECT_IDS:
        return _invert(mass.cumsum(1, dtype=torch.float64), noise[:, None])[:, 0]
    whole_blocks = vocabulary - vocabulary % BLOCK
    sums = mass[:, :whole_blocks].unflatten(1, (-1, BLOCK)).sum(-1)
    if whole_blocks < vocabulary:
        sums = torch.cat([sums, mass[:, whole_blocks:].sum(-1, keepdim=True)], 1)
    sums = sums.double()
    ends = sums.cumsum(1)
    block = _invert(ends, noise[:, None])
    size = sums.gather(1, block)
    share = 1 - (ends.gather(1, block) - noise[:, None] * ends[:, -1:]) / size
    ids = block * BLOCK + torch.arange(BLOCK, device=mass.device)
    inside = mass.gather(1, ids.clamp(max=vocabulary - 1)) * (ids < vocabulary)
    position = _invert(inside.cumsum(1, dtype=torch.float64), share.clamp(0, 1 - 2**-53))
    return (block * BLOCK + position)[:, 0].clamp(max=vocabulary - 1)


def _invert(ends: Tensor, share: Tensor) -> Tensor:
    """Return (B, 1) the first index whose cumulative sum exceeds a share of the total.

    Args:
        ends: (B, n) float64 cumulative sums.
        share: (B, 1) float64, at most 1 - 2^-53, so that the product stays below the total.

    Returns:
        Indices; any index in a row with NaN.
    """
    index = torch.searchsorted(ends, share * ends[:, -1:], right=True)
    return index.clamp(max=ends.shape[1] - 1)
