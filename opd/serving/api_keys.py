"""API keys of servers: validation, and redaction in messages and logs."""

import base64
import logging
import re

from diagnostics.errors import InvalidInput

LOGGERS = ("httpx2", "httpcore2.connection", "httpcore2.http11", "httpcore2.proxy")
"""Loggers that quote responses: the status line, and the headers at level DEBUG."""

MAX_CUT_LENGTH = 16
"""Characters of a key that are recognised where the rest is cut off: half of it, at most these."""
MAX_SPELLED_LENGTH = 256
"""Characters whose escapes are recognised; what follows them in a long token is removed too."""
NAMED = {"&": ("amp",), "<": ("lt",), ">": ("gt",), '"': ("quot",), "'": ("apos",)}
"""HTML's names of characters that have one."""


def check_key(variable: str, key: str) -> None:
    """Reject a key with characters that are not allowed in an HTTP header.

    The usual cause is the newline at the end of a file.

    Args:
        variable: The environment variable that the key was read from.
        key: The key.

    Raises:
        InvalidInput: Names the variable and the position of the character, but no part of the key.
    """
    invalid_positions = [i for i, character in enumerate(key, 1) if not "!" <= character <= "~"]
    if invalid_positions:
        raise InvalidInput(
            f"the key in the environment variable {variable} has a newline, a space or another "
            f"character that is not allowed in a header: character {invalid_positions[0]} of "
            f"{len(key)}; remove it"
        )


def key_pattern(key: str) -> re.Pattern[str] | None:
    """Return a pattern that matches the encodings in which a server or library may quote a key.

    Args:
        key: The API key; may be empty.

    Returns:
        A pattern for the key with any of its characters escaped or wrapped onto another line, for
        its beginning where the rest is cut off, and for its base64 and hexadecimal forms; None
        without a key.
    """
    if not key:
        return None
    spellings = [_spelling(character) for character in key[:MAX_SPELLED_LENGTH]]
    remainder = r"[^\s\"'<>]*"
    complete = r"\s*".join(spellings) + remainder * (len(key) > MAX_SPELLED_LENGTH)
    cut = "".join(spellings[: max(8, min(len(key) // 2, MAX_CUT_LENGTH))]) + remainder
    forms: set[str] = set()
    for prefix in ("", "Bearer ", ":", "user:"):
        raw = (prefix + key).encode()
        for encoded in (base64.b64encode(raw), base64.urlsafe_b64encode(raw), raw.hex().encode()):
            forms.add(encoded.decode().rstrip("="))
    longest_first = sorted(forms, key=len, reverse=True)
    return re.compile("|".join([complete, cut, *map(re.escape, longest_first)]), re.IGNORECASE)


def _spelling(character: str) -> str:
    """Return a pattern for a character as it is, and escaped for URLs, JSON, Python or HTML."""
    code = ord(character)
    escapes = (f"%{code:02x}", f"\\u{code:04x}", f"\\x{code:02x}", f"&#{code};", f"&#x{code:x};")
    named = [f"&{name};" for name in NAMED.get(character, ())]
    alternatives = map(re.escape, (*escapes, *named))
    return rf"(?:{'|'.join(alternatives)}|\\?{re.escape(character)})"


def redact_logs(secret: re.Pattern[str]) -> None:
    """Remove matches of a pattern from the HTTP client's log records until the process ends."""

    def redact(record: logging.LogRecord) -> bool:
        record.msg, record.args = secret.sub("***", record.getMessage()), ()
        return True

    if secret.pattern not in _REDACTED_PATTERNS:
        _REDACTED_PATTERNS.add(secret.pattern)
        for name in LOGGERS:
            logging.getLogger(name).addFilter(redact)


_REDACTED_PATTERNS: set[str] = set()
