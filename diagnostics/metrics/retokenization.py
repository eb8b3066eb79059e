"""Comparison of two tokenizations of one text (C-4, C-5).

Pure functions of the bytes of tokens, for a teacher with another tokenizer or a student that splits
what is one token of the teacher. A span is a shortest run of bytes that begins and ends at a token
boundary of both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from diagnostics.errors import InvalidInput


@dataclass(frozen=True)
class TokenSpan:
    """Tokens [first, last) of each model that cover the same bytes."""

    student: tuple[int, int]
    teacher: tuple[int, int]


def common_spans(
    student_tokens: Sequence[bytes], teacher_tokens: Sequence[bytes]
) -> list[TokenSpan]:
    """Return the shortest spans with common boundaries, in order; they cover both texts.

    Args:
        student_tokens: Bytes of each token of the first tokenization.
        teacher_tokens: Bytes of each token of the second tokenization.

    Returns:
        The spans.

    Raises:
        InvalidInput: The two do not decode to the same bytes, or a token has none.
    """
    if b"".join(student_tokens) != b"".join(teacher_tokens):
        raise InvalidInput(
            "the two tokenizations decode to different bytes; tokenize the same text with both"
        )
    if not (all(student_tokens) and all(teacher_tokens)):
        raise InvalidInput(
            "a token has no bytes; remove special ids before comparing tokenizations"
        )
    student_boundaries, teacher_boundaries = (
        {0: 0} | {end: i for i, end in enumerate(accumulate(map(len, tokens)), 1)}
        for tokens in (student_tokens, teacher_tokens)
    )
    boundaries = sorted(student_boundaries.keys() & teacher_boundaries.keys())
    return [
        TokenSpan(
            (student_boundaries[first], student_boundaries[last]),
            (teacher_boundaries[first], teacher_boundaries[last]),
        )
        for first, last in pairwise(boundaries)
    ]


def boundary_agreement(
    student_tokens: Sequence[bytes], teacher_tokens: Sequence[bytes]
) -> dict[str, float]:
    """C-4: Compute how far two tokenizations of one text agree.

    Healthy: boundaries above 0.9. Matching token by token silently discards everything outside the
    coverage. NaN for a text of one token.

    Args:
        student_tokens: Bytes of each token of the first tokenization.
        teacher_tokens: Bytes of each token of the second tokenization.

    Returns:
        boundaries: Share of the student's inner token boundaries that are also the teacher's.
        coverage: Share of the bytes in spans of one token on each side.
        tokens_per_byte: Of the student.
        theirs_per_byte: Tokens per byte of the teacher.
    """
    spans = common_spans(student_tokens, teacher_tokens)
    num_bytes = len(b"".join(student_tokens))
    single_token_spans = [
        s for s in spans if s.student[1] - s.student[0] == s.teacher[1] - s.teacher[0] == 1
    ]
    covered_bytes = sum(len(student_tokens[s.student[0]]) for s in single_token_spans)
    num_boundaries = len(student_tokens) - 1
    return {
        "boundaries": (len(spans) - 1) / num_boundaries if num_boundaries > 0 else float("nan"),
        "coverage": covered_bytes / num_bytes if num_bytes else float("nan"),
        "tokens_per_byte": len(student_tokens) / num_bytes if num_bytes else float("nan"),
        "theirs_per_byte": len(teacher_tokens) / num_bytes if num_bytes else float("nan"),
    }


def span_ratios(
    spans: Sequence[TokenSpan], student_logp: Sequence[float], teacher_logp: Sequence[float]
) -> list[float]:
    """C-5: Compute R, the student's minus the teacher's log-probability of each span.

    Each model scores its own tokenization. Where sum |R| is far below sum |r| over tokens, the cost
    of a token is due to the segmentation, not to a disagreement about the text.

    Args:
        spans: Spans of the two tokenizations.
        student_logp: Log-probability of each student token.
        teacher_logp: Log-probability of each teacher token.

    Returns:
        R of each span, nats.
    """
    return [
        sum(student_logp[s.student[0] : s.student[1]])
        - sum(teacher_logp[s.teacher[0] : s.teacher[1]])
        for s in spans
    ]


def noncanonical_share(
    responses: Sequence[Sequence[int]],
    decode: Callable[[Sequence[int]], str],
    encode: Callable[[str], Sequence[int]],
) -> float:
    """C-4: Compute the share of responses whose ids differ from the tokenization of their own text.

    A sampled response need not be canonical; a teacher has been trained almost only on canonical
    ones.
    Healthy: a few percent.

    Args:
        responses: Ids of each response.
        decode: Ids to text.
        encode: Text to ids.

    Returns:
        The share; NaN for no responses.
    """
    noncanonical = [list(encode(decode(ids))) != list(ids) for ids in responses]
    return sum(noncanonical) / len(noncanonical) if noncanonical else float("nan")
