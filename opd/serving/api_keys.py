"""Keys of servers: what one may be, and how it is kept out of messages and logs."""

import base64
import json
import logging
import re
from urllib.parse import quote, quote_plus

from diagnostics.errors import InvalidInput

LOGGERS = ("httpx2", "httpcore2.connection", "httpcore2.http11", "httpcore2.proxy")
"""Loggers that quote answers: the status line, and at level DEBUG headers."""


def refuse_odd_key(variable: str, key: str) -> None:
    """Refuse a key with a character that no header can hold, such as the end of a file's line.

    Raises:
      InvalidInput: names the variable and the place, and nothing of the key.
    """
    odd = [i for i, character in enumerate(key, 1) if not "!" <= character <= "~"]
    if odd:
        raise InvalidInput(
            f"the key in the environment variable {variable} has a line end, a space or another "
            f"character that no key has, as number {odd[0]} of {len(key)}; set it without"
        )


def spellings(key: str) -> re.Pattern[str] | None:
    """A pattern of the ways in which a server or a library may write a key; None without a key."""
    if not key:
        return None
    forms = {key, quote(key, safe=""), quote_plus(key), json.dumps(key)[1:-1], repr(key)[1:-1]}
    for prefix in ("", "Bearer ", ":", "user:"):
        raw = (prefix + key).encode()
        for encoded in (base64.b64encode(raw), base64.urlsafe_b64encode(raw), raw.hex().encode()):
            forms.add(encoded.decode().rstrip("="))
    longest_first = sorted(forms, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE)


def hide_in_logs(secret: re.Pattern[str]) -> None:
    """Keep what matches out of the HTTP client's log records, for the rest of the process."""

    def redact(record: logging.LogRecord) -> bool:
        record.msg, record.args = secret.sub("***", record.getMessage()), ()
        return True

    if secret.pattern not in _HIDDEN:
        _HIDDEN.add(secret.pattern)
        for name in LOGGERS:
            logging.getLogger(name).addFilter(redact)


_HIDDEN: set[str] = set()
