"""Two tokenisations of one text (C-4, C-5): where they part, and whether the cost is real.

Pure functions of the bytes of tokens, for a teacher with another tokenizer or a student that spells
what the teacher has a token for. A span is the least run of bytes that begins and ends at a token
boundary of both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from diagnostics.errors import InvalidInput


@dataclass(frozen=True)
class Span:
    """Tokens [first, last) of each side that cover the same bytes."""

    ours: tuple[int, int]
    theirs: tuple[int, int]


def common_spans(ours: Sequence[bytes], theirs: Sequence[bytes]) -> list[Span]:
    """The least spans with common boundaries, in order; they cover both texts.

    Raises:
      ValueError: the two do not spell the same bytes, or a token has none.
    """
    if b"".join(ours) != b"".join(theirs):
        raise InvalidInput("the two tokenisations are of different texts; decode one, encode again")
    if not (all(ours) and all(theirs)):
        raise InvalidInput("a token without bytes has no place in a text; leave special ids out")
    mine, other = (
        {0: 0} | {end: i for i, end in enumerate(accumulate(map(len, x)), 1)}
        for x in (ours, theirs)
    )
    both = sorted(mine.keys() & other.keys())
    return [Span((mine[a], mine[b]), (other[a], other[b])) for a, b in pairwise(both)]


def agreement(ours: Sequence[bytes], theirs: Sequence[bytes]) -> dict[str, float]:
    """C-4: how far two tokenisations of one text agree.

    boundaries = share of our inner token boundaries that are theirs too; coverage = share of the
    bytes in spans of one token on each side; tokens_per_byte, theirs_per_byte.
    Healthy: boundaries above 0.9. What lies outside the coverage is what matching token by token
    discards without a word. NaN for a text of one token.
    """
    spans = common_spans(ours, theirs)
    size = len(b"".join(ours))
    single = [s for s in spans if s.ours[1] - s.ours[0] == s.theirs[1] - s.theirs[0] == 1]
    covered = sum(len(ours[s.ours[0]]) for s in single)
    inner = len(ours) - 1
    return {
        "boundaries": (len(spans) - 1) / inner if inner > 0 else float("nan"),
        "coverage": covered / size if size else float("nan"),
        "tokens_per_byte": len(ours) / size if size else float("nan"),
        "theirs_per_byte": len(theirs) / size if size else float("nan"),
    }


def span_ratios(
    spans: Sequence[Span], student_logp: Sequence[float], teacher_logp: Sequence[float]
) -> list[float]:
    """C-5: R = sum of the student's log-probabilities in a span minus the teacher's in the same.

    Each model scores its own tokenisation. Where sum |R| is far below sum |r| over tokens, the cost
    of a token was made by the segmentation, not by a disagreement about the text.
    """
    return [
        sum(student_logp[s.ours[0] : s.ours[1]]) - sum(teacher_logp[s.theirs[0] : s.theirs[1]])
        for s in spans
    ]


def uncanonical(
    responses: Sequence[Sequence[int]],
    decode: Callable[[Sequence[int]], str],
    encode: Callable[[str], Sequence[int]],
) -> float:
    """C-4: share of responses whose ids are not those that the tokenizer makes of their text.

    A sampled response need not be canonical; a teacher has seen canonical ones almost only.
    Healthy: a few percent. NaN for no responses.
    """
    wrong = [list(encode(decode(ids))) != list(ids) for ids in responses]
    return sum(wrong) / len(wrong) if wrong else float("nan")
