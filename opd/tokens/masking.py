"""Special tokens: which sampled tokens are not supervised, what that removes, which end is scored.

A masked token stays in the sequence, in the attention and in what was sampled; only its supervision
goes, so a mask may have holes. Shapes: B responses, T response positions, K support, V ids that a
tokenizer names, Q bytes of text in a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from diagnostics.batch import Rollouts, ScoredRollouts
from diagnostics.core.totals import Accumulator, Mean
from diagnostics.errors import InvalidInput
from opd.tokens.eos import first_of_each
from opd.tokens.mask_rules import MaskRule, parse
from opd.tokens.token_bytes import TokenBytes, pieces, token_bytes

Batch = TypeVar("Batch", bound=Rollouts)
THINK = ("<think>", "</think>")


@dataclass(frozen=True, eq=False)
class ResolvedMaskRules:
    """A rule in the ids of one tokenizer: the ids, or the byte strings, that it takes out."""

    name: str
    first: bool
    ids: tuple[int, ...]
    strings: tuple[bytes, ...]
    pieces: TokenBytes


def resolve(texts: Sequence[str], tokenizer: Any, eos: Sequence[int]) -> list[ResolvedMaskRules]:
    """Rules (`opd.tokens.mask_rules`) in the ids of a tokenizer; `eos` holds every id that ends a response.

    Raises:
      ValueError: a text is no rule, or the tokenizer has no token that it names.
    """
    rules = parse(texts)
    if not rules:
        return []
    table = token_bytes(tokenizer)
    laid = pieces(table)
    return [_resolve(rule, tokenizer, tuple(eos), table, laid) for rule in rules]


def _resolve(
    rule: MaskRule, tokenizer: Any, eos: tuple[int, ...], table: list[bytes], laid: TokenBytes
) -> ResolvedMaskRules:
    ids: tuple[int, ...] = ()
    strings: tuple[bytes, ...] = ()
    if rule.kind == "string":
        strings = (rule.value.encode(),)
    elif rule.kind == "role" and rule.value == "think":
        strings = tuple(tag.encode() for tag in THINK)
    elif rule.kind == "id":
        ids = (int(rule.value),)
    elif rule.kind == "token":
        ids = tuple(v for v, piece in enumerate(table) if piece == rule.value.encode())
    else:
        one = {"bos": tokenizer.bos_token_id, "pad": tokenizer.pad_token_id}
        ids = {"eos": eos, "special": special_ids(tokenizer)}.get(rule.value) or tuple(
            v for v in [one.get(rule.value)] if v is not None
        )
    if not ids and not strings:
        hint = "; string:TEXT finds text in pieces" if rule.kind == "token" else "; drop the rule"
        raise InvalidInput(f"mask rule {rule.name!r}: the tokenizer has no such token{hint}")
    return ResolvedMaskRules(rule.name, rule.occurrence == "first", ids, strings, laid)


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids that are special by name (eos, pad, ...) or by the flag of an added token."""
    flagged = {i for i, added in tokenizer.added_tokens_decoder.items() if added.special}
    return tuple(sorted(flagged | set(tokenizer.all_special_ids)))


def supervised(tokens: Tensor, mask: Tensor, rules: Sequence[ResolvedMaskRules]) -> Tensor:
    """(B, T) the mask without the tokens that any rule takes out.

    Every rule looks at the batch as given, so their order does not matter.

    Args:
      tokens: (B, T) ids; mask: (B, T) bool, what is supervised so far. Positions behind the last
        supervised one are padding and are not read; a hole before it is text.
    """
    taken = [hits(tokens, mask, rule) for rule in rules]
    return mask & ~torch.stack(taken).any(0) if taken else mask


def hits(tokens: Tensor, mask: Tensor, rule: ResolvedMaskRules) -> Tensor:
    """(B, T) bool: the supervised tokens that one rule takes out.

    `first` means the first occurrence in the response of each id, or of each string, that touches
    a supervised token.
    """
    found = torch.zeros_like(mask)
    if rule.ids:
        found = torch.isin(tokens, torch.tensor(rule.ids, device=tokens.device)) & mask
        if rule.first:
            found = first_of_each(tokens, found)
    laid = rule.pieces.to(tokens.device) if rule.strings else rule.pieces
    for string in rule.strings:
        found = found | string_hits(tokens, mask, string, laid, first=rule.first)
    return found


def string_hits(
    tokens: Tensor, mask: Tensor, string: bytes, laid: TokenBytes, *, first: bool
) -> Tensor:
    """(B, T) bool: supervised tokens that share a byte with an occurrence of the string.

    The ids are spelled out in bytes (Q,), row after row; the string is compared at every byte.
    Occurrences may overlap one another, and never run from one response into the next.
    """
    width, flat = tokens.shape[1], tokens.flatten().clamp(max=len(laid.length) - 1)
    real = mask.long().flip(1).cumsum(1).flip(1) > 0
    length = torch.where(real.flatten(), laid.length[flat], 0)
    owner = torch.repeat_interleave(length)  # (Q,) whose byte it is
    if len(owner) < len(string):
        return torch.zeros_like(mask)
    place = torch.arange(len(owner), device=tokens.device) - (length.cumsum(0) - length)[owner]
    text = laid.data[laid.start[flat[owner]] + place]
    wanted = torch.tensor(list(string), dtype=torch.uint8, device=tokens.device)
    begin, end = owner[: len(owner) - len(string) + 1], owner[len(string) - 1 :]
    before = torch.nn.functional.pad(mask.flatten().long().cumsum(0), (1, 0))
    found = (text.unfold(0, len(string), 1) == wanted).all(1)
    found &= (begin // width == end // width) & (before[end + 1] > before[begin])
    begin, end = begin[found], end[found]
    if first:
        row = begin // width
        fresh = torch.ones_like(row, dtype=torch.bool)
        fresh[1:] = row[1:] != row[:-1]
        begin, end = begin[fresh], end[fresh]
    step = torch.zeros(tokens.numel() + 1, dtype=torch.long, device=tokens.device)
    step.index_add_(0, begin, torch.ones_like(begin))
    step.index_add_(0, end + 1, -torch.ones_like(end))
    return (step[:-1].cumsum(0) > 0).reshape(tokens.shape) & mask


def masked(batch: Batch, rules: Sequence[ResolvedMaskRules]) -> Batch:
    """The batch with the rules' tokens unsupervised and the rules in its name (`supervise`).

    The rules read what was sampled, so that what else is unsupervised does not matter to them.
    """
    if not rules:
        return batch
    keep = supervised(batch.tokens, batch.sampled, rules)
    return batch.supervise(keep, " - ".join(rule.name for rule in rules))


def audit(batch: ScoredRollouts, rules: Sequence[ResolvedMaskRules]) -> dict[str, Accumulator]:
    """What the rules take out of the tokens that were sampled, whatever else is unsupervised.

    With r = log student - log teacher and m the sampled tokens, for each rule by itself and for
    "all" of them together: mask/RULE/tokens = sum m 1[out] / sum m; mask/RULE/signal = sum m 1[out]
    |r| / sum m |r|; mask/RULE/energy = sum m 1[out] r^2 / sum m r^2. Totals add over steps;
    sampling unit: prompt.
    """
    sampled = batch.sampled
    out = {rule.name: hits(batch.tokens, sampled, rule) for rule in rules}
    out["all"] = sampled & ~supervised(batch.tokens, sampled, rules)
    sizes = {"tokens": torch.ones_like(batch.log_ratio), "signal": batch.log_ratio.abs()}
    sizes["energy"] = batch.log_ratio.square()
    return {
        f"mask/{name}/{what}": Mean.ratio(size * gone, size, sampled, batch.prompt)
        for name, gone in out.items()
        for what, size in sizes.items()
    }


def removed_by_id(batch: ScoredRollouts, after: Tensor, size: int) -> Tensor:
    """(size, 3) float64: tokens, sum |r| and sum r^2 of sampled tokens not in `after`, by id.

    Adds over steps. `size` is at least the largest id plus one.
    """
    gone = batch.sampled & ~after
    r = batch.log_ratio[gone].double()
    size_of = torch.stack([torch.ones_like(r), r.abs(), r.square()], 1)
    sums = torch.zeros(size, 3, dtype=torch.float64, device=r.device)
    return sums.index_add(0, batch.tokens[gone], size_of)
