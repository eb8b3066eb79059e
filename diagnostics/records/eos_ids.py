"""The ids at which a model's generation ends, from a loaded model or from its folder."""

from pathlib import Path

from diagnostics.errors import InvalidInput
from diagnostics.io.files import has_type, read_object, short_repr
from diagnostics.records.vocabulary import Vocabulary


def combine_eos_ids(
    tokenizer_id: int | None, configured: int | list[int] | None
) -> tuple[int, ...]:
    """Return the ids that end a generation: the tokenizer's own, and those of the configuration.

    The tokenizer's EOS token is what a model was trained to end with; a generation may stop at more
    ids.

    Args:
        tokenizer_id: EOS id of the tokenizer.
        configured: EOS ids of the generation config.

    Returns:
        The tokenizer's id first, then the others in rising order; empty if there is none.
    """
    ids = configured if isinstance(configured, list) else [configured]
    others = sorted(i for i in set(ids) - {tokenizer_id} if i is not None)
    return tuple(others) if tokenizer_id is None else (tokenizer_id, *others)


def read_eos_ids(folder: Path, vocabulary: Vocabulary) -> tuple[int, ...]:
    """Read the ids that end a generation from the files of a model folder.

    They are the tokenizer's EOS id, and those of generation_config.json, else of config.json.

    Args:
        folder: The folder of the model.
        vocabulary: Its vocabulary.

    Returns:
        See `combine_eos_ids`.

    Raises:
        InvalidInput: A file holds something else than ids.
    """
    text = read_eos_token(folder)
    tokenizer_id = None if text is None else vocabulary.ids.get(text.encode())
    for name in ("generation_config.json", "config.json"):
        configured = read_configured_eos(folder / name) if (folder / name).exists() else None
        if configured is not None:
            return combine_eos_ids(tokenizer_id, configured)
    return combine_eos_ids(tokenizer_id, None)


def read_configured_eos(path: Path) -> list[int] | None:
    """Read the EOS ids of a model's config, also of a nested text config.

    Args:
        path: A config file.

    Returns:
        The ids; None if it has none.

    Raises:
        InvalidInput: The value is not an id or a list of ids.
    """
    settings = read_object(path)
    text_config = settings.get("text_config")
    configured = settings.get("eos_token_id")
    if configured is None and isinstance(text_config, dict):
        configured = text_config.get("eos_token_id")
    if configured is None:
        return None
    ids = configured if isinstance(configured, list) else [configured]
    if not all(has_type(i, int) for i in ids):
        raise InvalidInput(
            f"{path}, field eos_token_id: {short_repr(configured)} is not an id or a list of ids"
        )
    return ids


def read_eos_token(folder: Path) -> str | None:
    """Return the EOS token of tokenizer_config.json, if it has one."""
    settings = folder / "tokenizer_config.json"
    token = read_object(settings).get("eos_token") if settings.exists() else None
    return token.get("content") if isinstance(token, dict) else token
