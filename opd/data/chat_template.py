"""Rendering of messages with a tokenizer's chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.io.files import read_text


@dataclass(frozen=True)
class ChatFormat:
    """How messages become text: a chat template, and the special tokens that it may name."""

    template: str
    """Jinja text of the template."""
    special_tokens: tuple[tuple[str, str], ...] = ()
    """Name and text of special tokens, such as ("eos_token", "<|im_end|>")."""

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that make a tokenizer render in this format."""
        return {**dict(self.special_tokens), "chat_template": self.template}


def chat_format_of(tokenizer: Any) -> ChatFormat | None:
    """Return the format of a tokenizer's own chat template; None if it has none."""
    if tokenizer.chat_template is None:
        return None
    tokens = tokenizer.special_tokens_map.items()
    return ChatFormat(
        tokenizer.get_chat_template(),
        tuple((name, str(text)) for name, text in tokens if isinstance(text, str)),
    )


def read_chat_template(path: str, setting: str) -> str:
    """Read the text of a chat template.

    Args:
        path: Jinja file.
        setting: Name of the setting that holds the path, for messages.

    Returns:
        The text.

    Raises:
        InvalidInput: The file is empty or is not text.
        MissingFile: It does not exist.
    """
    if not Path(path).is_file():
        raise MissingFile(f"{setting} {path} does not exist; give the path of a Jinja file")
    text = read_text(path)
    if not text.strip():
        raise InvalidInput(f"{setting} {path} is empty; give the text of a template")
    return text


def set_chat_template(tokenizer: Any, path: str) -> None:
    """Give a tokenizer the chat template of a file, in the place of its own.

    Args:
        tokenizer: A Hugging Face tokenizer.
        path: Jinja file; empty to change nothing.

    Raises:
        InvalidInput: The file is empty or is not text.
        MissingFile: It does not exist.
    """
    if path:
        tokenizer.chat_template = read_chat_template(path, "chat_template")


def render_chat(tokenizer: Any, chat: Sequence[tuple[str, str]], **settings: Any) -> str:
    """Render a chat up to where the next response begins.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        chat: (role, content) of each message.
        **settings: Keyword arguments passed to the template.

    Returns:
        The rendered text, with the header of the assistant's message at its end.

    Raises:
        InvalidInput: The template rejects the messages (some have no system role) or fails; the
            message contains the model's name and the template's error.
    """
    messages = [{"role": role, "content": content} for role, content in chat]
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **settings
        )
    except Exception as error:  # a template is a program and can raise anything
        roles = [role for role, _ in chat]
        advice = "use only roles that it supports, or set another tokenizer.chat_template"
        if "system" in roles:
            advice = (
                "remove the system message (--system, or the one in the data), move its text into "
                "the user message, or choose a model whose template supports system messages"
            )
        raise InvalidInput(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} rejects messages "
            f"with roles {', '.join(roles)}: {error}; {advice}"
        ) from error
