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
from diagnostics.io.files import has_type, short_repr

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


def get_ids(value: Any, location: str) -> list[int]:
    """Return a list of integers of a row; raises InvalidInput for anything else."""
    for t, token in enumerate(ids := get_list(value, location)):
        if not has_type(token, int):
            raise InvalidInput(f"{location}[{t}]: {short_repr(token)} is not a token id")
    return ids


def get_numbers(value: Any, location: str) -> list[Any]:
    """Return a list of numbers or nulls of a row; raises InvalidInput for anything else."""
    for t, number in enumerate(numbers := get_list(value, location)):
        if number is not None and not has_type(number, float):
            raise InvalidInput(f"{location}[{t}]: {short_repr(number)} is not a number")
    return numbers


def get_object(value: Any, location: str) -> Mapping[str, Any]:
    """Return an object of a row; raises InvalidInput for anything else."""
    if not isinstance(value, Mapping):
        raise InvalidInput(f"{location}: {short_repr(value)} is not an object")
    return value


def get_length(value: Any, limit: int, location: str) -> int:
    """Return a number of tokens from 0 to `limit`; raises InvalidInput for anything else."""
    if not has_type(value, int) or not 0 <= value <= limit:
        raise InvalidInput(
            f"{location}: {short_repr(value)}, expected an integer from 0 to {limit}"
        )
    return value


def encode_prompt(prompt: Any, location: str, tokenizer: DumpTokenizer) -> list[int]:
    """Return the ids of a prompt.

    Args:
        prompt: Text, a list of messages, or a list of ids.
        location: Beginning of every message.
        tokenizer: Tokenizer of the models.

    Returns:
        The ids.

    Raises:
        InvalidInput: It is none of these.
    """
    if isinstance(prompt, str):
        return tokenizer.prompt_ids(prompt)
    if isinstance(prompt, list | tuple) and prompt and all(isinstance(m, Mapping) for m in prompt):
        messages = []
        for message in prompt:
            if not isinstance(message.get("role"), str):
                raise InvalidInput(f"{location}: the message {short_repr(message)} has no role")
            content = message_text(message, location)
            messages.append({"role": message["role"], "content": content})
        return tokenizer.prompt_ids(messages)
    if isinstance(prompt, list | tuple) and all(has_type(token, int) for token in prompt):
        return list(prompt)
    raise InvalidInput(
        f"{location}: the prompt {short_repr(prompt)} is neither text nor a list of messages"
    )


def message_text(message: Any, location: str) -> str:
    """Return the text of a chat message, of which parts of other kinds than text are refused."""
    content = get_object(message, f"{location}, a message").get("content")
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in get_list(content, f"{location}, the content of a message"):
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            raise InvalidInput(f"{location}: the part {short_repr(part)} of a message is not text")
        texts.append(text)
    return "".join(texts)


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
        if len(response) != 1:
            raise InvalidInput(
                f"{location}: the response has {len(response)} messages, expected one of the "
                "assistant; text of tools cannot be told from what was sampled"
            )
        response = message_text(response[0], f"{location}, the response")
    if not isinstance(response, str):
        raise InvalidInput(f"{location}: the response {short_repr(response)} is not text")
    return {
        "prompt": prompt,
        "prompt_tokens": encode_prompt(prompt, location, context.tokenizer),
        "tokens": context.tokenizer.response_ids(response),
    }
