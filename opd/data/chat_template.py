"""Messages as a tokenizer's chat template writes them."""

from collections.abc import Sequence
from typing import Any

from diagnostics.errors import InvalidInput


def render_chat(tokenizer: Any, chat: Sequence[tuple[str, str]], **settings: Any) -> str:
    """The text of a chat up to where the next response begins.

    Args:
      chat: (role, content) of each message. settings: of the template.

    Raises:
      ValueError: the template refuses the messages, as some do a system message, or fails; names
        the model and the template's own words.
    """
    messages = [{"role": role, "content": content} for role, content in chat]
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **settings
        )
    except Exception as error:  # a template is a program, and fails in its own ways
        roles = [role for role, _ in chat]
        advice = "give messages that it knows, or set another tokenizer.chat_template"
        if "system" in roles:
            advice = (
                "leave out the system message, --system or that of the data, write its words into "
                "the user's message, or choose a model whose template has one"
            )
        raise InvalidInput(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} refuses messages by "
            f"{', '.join(roles)}: {error}; {advice}"
        ) from error
