"""Chats in dataset columns: messages as lists, arrays or JSON text, and their last reply."""

import json
import re
from dataclasses import dataclass
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.files import short_repr

Chat = tuple[tuple[str, str], ...]
"""(role, content) of each message."""
CHAT_TEXT = re.compile(r"\s*\[\s*\{\s*['\"](?:role|content)['\"]\s*:")
MESSAGES_COLUMN = "messages"
"""Column that is read where no row has the default prompt column."""


@dataclass(frozen=True)
class PromptAndReply:
    """A chat split at its last reply."""

    chat: Chat
    """The messages before the response, the last of them by the user."""
    reply: str | None
    """Content of the assistant's message that ends the chat; None if the user's message does."""


def split_reply(value: Any, column: str) -> PromptAndReply:
    """Convert a value to messages, and split off an assistant's message at their end.

    Args:
        value: Text, or a list or array of messages.
        column: Name of the column, for messages.

    Returns:
        The prompt and the reply.

    Raises:
        InvalidInput: As `parse_messages`, for what comes before the reply.
    """
    messages = to_messages(value, column)
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        return PromptAndReply(parse_messages(messages[:-1], column), messages[-1]["content"])
    return PromptAndReply(parse_messages(messages, column), None)


def parse_messages(prompt: Any, column: str) -> Chat:
    """Convert a prompt to (role, content) pairs.

    Args:
        prompt: Text, or a list or array of messages.
        column: Name of the prompt column, for messages.

    Returns:
        The messages, the last of them by the user.

    Raises:
        InvalidInput: The prompt is missing or empty, of another type, or does not end with a user
            message.
    """
    chat = tuple((x["role"], x["content"]) for x in to_messages(prompt, column))
    if chat[-1][0] != "user":
        raise InvalidInput(
            f"has a {column!r} whose last message is by {chat[-1][0]!r}, not by the user; end "
            "the chat with a user message, which may be followed by one reply of the assistant"
        )
    if not chat[-1][1].strip():
        raise InvalidInput(f"has an empty {column!r}")
    return chat


def to_messages(prompt: Any, column: str) -> list[dict[str, str]]:
    """Convert a prompt to messages {"role", "content"}.

    Args:
        prompt: Text, or a list or array of messages.
        column: Name of the prompt column, for messages.

    Returns:
        At least one message.

    Raises:
        InvalidInput: The prompt is missing or empty, or of another type.
    """
    if isinstance(prompt, str):
        prompt = parse_chat_text(prompt, column)
    if hasattr(prompt, "tolist"):  # an array, as parquet tables return
        prompt = prompt.tolist()
    prompt = list(prompt) if isinstance(prompt, tuple) else prompt
    if prompt is None or prompt == [] or (isinstance(prompt, float) and prompt != prompt):
        raise InvalidInput(f"has an empty {column!r}")
    if not isinstance(prompt, list) or not all(
        isinstance(x, dict) and isinstance(x.get("role"), str) and isinstance(x.get("content"), str)
        for x in prompt
    ):
        problem = f"neither text nor a list of messages with role and content as {column!r}"
        raise InvalidInput(f"has {problem}: {short_repr(prompt)}")
    return prompt


def parse_chat_text(prompt: str, column: str) -> list[Any]:
    """Convert a text prompt to messages; the JSON of a list of messages is parsed.

    Args:
        prompt: The text.
        column: Name of the prompt column, for messages.

    Returns:
        The messages.

    Raises:
        InvalidInput: The text is a printed Python list of messages, which is not JSON.
    """
    if not CHAT_TEXT.match(prompt):
        return [{"role": "user", "content": prompt}]
    try:
        return json.loads(prompt)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(
            f"has a list of messages as text in {column!r} that is not JSON: {short_repr(prompt)}; "
            "store the list itself, or its JSON"
        ) from error
