"""What a cached score belongs to: the ids that the teacher read.

Shapes: B responses.
"""

import hashlib
from collections.abc import Sequence

import torch

from diagnostics.batch import Rollouts
from opd.data.prompts import Prompts

KEY_BYTES = 16
"""Length of a key; two of 2^40 rows have the same with a probability of 2^-49."""


def row_keys(prompts: Prompts, rollouts: Rollouts) -> list[bytes]:
    """Return a hash of each row: the prompt's ids, the response's ids, and which of them count.

    Args:
        prompts: B prompts, as the teacher reads them.
        rollouts: B responses.

    Returns:
        B keys, which do not depend on padding.
    """
    keys = []
    rows = zip(
        *(x.cpu() for x in (prompts.tokens, prompts.mask, rollouts.tokens)),
        *(x.cpu() for x in (rollouts.attention_mask, rollouts.sampled)),
        strict=True,
    )
    for prompt, in_prompt, response, in_response, sampled in rows:
        prompt_ids, response_ids = prompt[in_prompt], response[in_response]
        sizes = torch.tensor([len(prompt_ids), len(response_ids)])
        parts = (sizes, prompt_ids, response_ids, sampled[in_response].long())
        content = torch.cat(parts).long().numpy().tobytes()
        keys.append(hashlib.blake2b(content, digest_size=KEY_BYTES).digest())
    return keys


def batch_key(keys: Sequence[bytes]) -> bytes:
    """Return a hash of a batch: of its rows, in order.

    A row has the same bits only if it is scored among the same others, since these decide which
    micro-batch it is in.

    Args:
        keys: Keys of the rows.

    Returns:
        The key.
    """
    return hashlib.blake2b(b"".join(keys), digest_size=KEY_BYTES).digest()
