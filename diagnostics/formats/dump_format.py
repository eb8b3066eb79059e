"""What a dump format declares, and what its conversion may use.

A format is a table of the other tool's fields beside ours, the fields by which its rows are
recognised, and a function from one row of the file to rows with the columns of
`diagnostics.records.columns`. The rows are checked there; a conversion only finds, splits and
aligns, and raises where the dump contradicts itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from diagnostics.errors import InvalidInput
from diagnostics.io.files import short_repr

Row: TypeAlias = dict[str, Any]
"""A row with our columns, not yet checked."""

Scores: TypeAlias = Literal["sampler", "student", "teacher"]
"""The model whose log-probabilities a server's answers hold."""

Message: TypeAlias = Mapping[str, Any]
"""A chat message with role and content."""


ID_FIELDS = frozenset(
    (
        *("tokens", "response_ids", "response_tokens", "completion_ids", "output_ids"),
        *("responses", "sequence", "sequences", "input_ids"),
    )
)
"""Names under which a row holds the ids of a response, so that its text is not tokenised."""


class DumpTokenizer(Protocol):
    """Token ids of the text in a dump, where models are given."""

    def prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        """Return the ids of a prompt: text as it is, messages by the chat template."""

    def response_ids(self, text: str) -> list[int]:
        """Return the ids of a response's text, without special tokens."""

    def token_id(self, token: bytes) -> int | None:
        """Return the id that stands for these bytes, or None."""


@dataclass(frozen=True)
class ReadContext:
    """What a conversion may use besides the row."""

    scores: Scores | None = None
    """Model of a server's log-probabilities; None for the format's default."""
    tokenizer: DumpTokenizer | None = None
    """Tokenizer of the models that score the file, if any."""
    token_numbers: dict[bytes, int] = field(default_factory=dict)
    """Bytes of a token -> its number in this file, where neither ids nor a tokenizer exist."""


Conversion: TypeAlias = Callable[[Mapping[str, Any], str, ReadContext], Iterator[Row]]
"""(row of the file, location for messages, context) -> rows with our columns."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """A field of another tool's row, and what it becomes."""

    name: str
    """Name in the other tool; a dot enters an object."""
    columns: str = ""
    """Our columns that are made of it, separated by commas; empty if it is not used."""
    remark: str = ""
    """How, where the name does not say it."""


@dataclass(frozen=True, kw_only=True)
class DumpFormat:
    """A dump format of another tool."""

    name: str
    """Value of `--format`."""
    title: str
    """The tool and its dump, for messages and the page."""
    source: str
    """How the file is written."""
    signatures: tuple[frozenset[str], ...]
    """A row has this format if it holds all fields of one of these sets."""
    fields: tuple[Field, ...]
    """Fields that the conversion reads or knowingly ignores."""
    convert: Conversion
    """Function from a row of the file to rows with our columns."""
    notes: str = ""
    """What to know about the numbers; shown beside every result."""
    is_text: bool = False
    """The rows hold text without token ids; the tokens are not exactly those that were sampled."""

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row holds the fields of the format; one of text holds no token ids."""
        if self.is_text and ID_FIELDS & row.keys():
            return False
        return any(signature <= row.keys() for signature in self.signatures)

    @property
    def top_level_fields(self) -> frozenset[str]:
        """Names of the fields at the top of a row; all other fields are passed on unchanged."""
        return frozenset(f.name.partition(".")[0] for f in self.fields)


def get_list(value: Any, location: str) -> list[Any]:
    """Return a list of a row; raises InvalidInput for anything else."""
    if not isinstance(value, list | tuple):
        raise InvalidInput(f"{location}: {short_repr(value)} is not a list")
    return list(value)


def get_object(value: Any, location: str) -> Mapping[str, Any]:
    """Return an object of a row; raises InvalidInput for anything else."""
    if not isinstance(value, Mapping):
        raise InvalidInput(f"{location}: {short_repr(value)} is not an object")
    return value


def get_length(value: Any, limit: int, location: str) -> int:
    """Return a number of tokens from 0 to `limit`; raises InvalidInput for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
        raise InvalidInput(
            f"{location}: {short_repr(value)}, expected an integer from 0 to {limit}"
        )
    return value


def tokenize_row(
    prompt: Any, response: Any, location: str, context: ReadContext, title: str
) -> Row:
    """Return the ids of a row that holds text only.

    Args:
        prompt: Text, or a list of messages.
        response: Text, or a list with one message of the assistant.
        location: Beginning of every message.
        context: Its tokenizer is needed.
        title: Name of the format in messages.

    Returns:
        `prompt`, `prompt_tokens` and `tokens`.

    Raises:
        InvalidInput: There is no tokenizer, or a value is neither text nor messages.
    """
    if context.tokenizer is None:
        raise InvalidInput(
            f"{location} ({title}) holds text and no token ids; give --student and --teacher, with "
            "whose tokenizer it is tokenised and by which it is scored"
        )
    if isinstance(response, list | tuple):
        response = "".join(
            str(get_object(message, f"{location}, the response").get("content") or "")
            for message in response
        )
    if not isinstance(response, str):
        raise InvalidInput(f"{location}: the response {short_repr(response)} is not text")
    is_messages = isinstance(prompt, list | tuple) and all(isinstance(m, Mapping) for m in prompt)
    if not isinstance(prompt, str) and not is_messages:
        raise InvalidInput(
            f"{location}: the prompt {short_repr(prompt)} is neither text nor a list of messages"
        )
    return {
        "prompt": list(prompt) if is_messages else prompt,
        "prompt_tokens": context.tokenizer.prompt_ids(prompt),
        "tokens": context.tokenizer.response_ids(response),
    }
