"""Draw tokens from logits: temperature, top-p, and noise that belongs to a row."""

import torch
from torch import Tensor

from diagnostics.errors import InvalidInput

# A text model's nucleus is nearly always within so many ids; selecting them is cheaper than a sort.
LIKELY_IDS = 1024


class Sampler:
    """A logits processor that draws each token itself and keeps both of its log-probabilities.

    Cuts the logits to the shared vocabulary, applies temperature and top-p, draws, and leaves one
    finite score a row, so that `generate`'s argmax takes the token that was drawn.

    `sampler_logp` is under the distribution that was drawn from; `softmax_logp` is the same
    token's under the whole softmax(logits / temperature). They differ by the log of the nucleus's
    mass. noise: (B, T) uniform float64 in [0, 1), one number for each token.
    """

    def __init__(self, vocabulary: int, temperature: float, top_p: float, noise: Tensor) -> None:
        self.vocabulary, self.temperature, self.top_p = vocabulary, temperature, top_p
        self.noise = noise
        self.sampler_logp: list[Tensor] = []
        self.softmax_logp: list[Tensor] = []
        self.finite: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = len(self.noise)  # any further ones only fill a bucket
        logits = scores[:rows, : self.vocabulary].float()
        # NaN has no distribution: draw from anything, refuse after the rollout, without a sync here
        finite = logits.amax(1).isfinite()
        self.finite.append(finite.all())
        logits = torch.where(finite[:, None], logits, torch.zeros_like(logits))
        whole = (logits / self.temperature).log_softmax(-1)
        kept = whole if self.top_p >= 1 else nucleus(whole, self.top_p)
        token = draw(kept, self.noise[:, len(self.sampler_logp)])[:, None]
        self.sampler_logp.append(kept.gather(1, token)[:, 0])
        self.softmax_logp.append(whole.gather(1, token)[:, 0])
        chosen = torch.full_like(scores, -torch.inf)
        chosen[rows:, 0] = 0.0
        chosen[:rows].scatter_(1, token, 0.0)
        return chosen

    def check(self) -> None:
        """Raises ValueError: logits were NaN, or all of them infinite, at some token."""
        finite = torch.stack(self.finite)
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0, 0])
            raise InvalidInput(
                f"the student's logits are not finite from response token {first} on; its weights "
                "have diverged: go back to a checkpoint and lower the learning rate"
            )


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Log-probabilities restricted to the smallest set of ids with mass >= top_p, renormalised.

    (B, V) -> (B, V), -inf outside. The id that crosses the threshold is kept, so the set is never
    empty. Sorts whole rows only where some row's most probable ids do not reach the mass.
    """
    logp = logits.log_softmax(-1)
    if top_p >= 1:
        return logp
    ordered, order = logp.topk(min(LIKELY_IDS, logp.shape[-1]))
    if not bool((ordered.exp().sum(-1) >= top_p).all()):
        ordered, order = logp.sort(-1, descending=True)
    keep = ordered.exp().cumsum(-1) - ordered.exp() < top_p
    inside = torch.zeros_like(logp, dtype=torch.bool).scatter(-1, order, keep)
    return logp.masked_fill(~inside, -torch.inf).log_softmax(-1)


def draw(logp: Tensor, noise: Tensor) -> Tensor:
    """(B,) ids drawn by inversion: the first id whose cumulative probability exceeds the noise.

    logp: (B, V) normalised, -inf where the probability is 0; noise: (B,) float64 in [0, 1). The
    cumulative sums are float64, so an id's frequency errs by the float32 rounding of its own
    probability only. An id of probability 0 is never drawn.
    """
    mass = logp.exp().cumsum(-1, dtype=torch.float64)
    # noise is at most 1 - 2^-53, so the product stays below the total, which is about 1
    return torch.searchsorted(mass, noise[:, None] * mass[:, -1:], right=True)[:, 0]
