"""Server addresses: validation, and the environment variable that holds a server's API key."""

import re
from urllib.parse import urlsplit

KEY_VARIABLE = "OPDLAB_TEACHER_KEY"
"""Environment variable with the bearer key of a teacher server, if the server requires one."""


def is_url(name: str) -> bool:
    """Return whether a model name is the address of a server."""
    return "://" in name


def key_variable(role: str) -> str:
    """Return the environment variable with the API key of servers of a role.

    Args:
        role: "teacher" or "rollout".

    Returns:
        The name of the variable.
    """
    return KEY_VARIABLE.replace("TEACHER", role.upper())


def redact_url(url: str) -> str:
    """Return an address without user, password and query, for use in messages."""
    return re.sub(r"[?][^#]*", "?...", re.sub(r"//[^/?#]*@", "//...@", url))


def address_problem(url: str, role: str) -> str:
    """Return why a server address cannot be used.

    Addresses with credentials are rejected because run folders store the configuration.

    Args:
        url: The address to check.
        role: "teacher" or "rollout".

    Returns:
        A message without secrets, or "" if the address is valid.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port  # raises ValueError if it is not a number
    except ValueError:
        valid = False
    if not valid:
        return f"{redact_url(url)!r} is not an http:// or https:// address of a server"
    if parts.username is not None or parts.password is not None or parts.query:
        return (
            f"the address of {parts.hostname} contains a user, a password or a query, which would "
            f"be saved in the run folder; set the key in the environment variable "
            f"{key_variable(role)} instead"
        )
    return ""
