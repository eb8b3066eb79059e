"""API keys of servers: validation, and redaction in messages and logs."""

import base64
import json
import logging
import re
from urllib.parse import quote, quote_plus

from diagnostics.errors import InvalidInput

LOGGERS = ("httpx2", "httpcore2.connection", "httpcore2.http11", "httpcore2.proxy")
"""Loggers that quote responses: the status line, and the headers at level DEBUG."""


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
        A pattern for the plain, URL-quoted, JSON, base64 and hexadecimal forms; None without a key.
    """
    if not key:
        return None
    forms = {key, quote(key, safe=""), quote_plus(key), json.dumps(key)[1:-1], repr(key)[1:-1]}
    for prefix in ("", "Bearer ", ":", "user:"):
        raw = (prefix + key).encode()
        for encoded in (base64.b64encode(raw), base64.urlsafe_b64encode(raw), raw.hex().encode()):
            forms.add(encoded.decode().rstrip("="))
    longest_first = sorted(forms, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE)


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
