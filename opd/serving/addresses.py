"""Addresses of servers: what is one, and that none holds a secret, which records would keep."""

import re
from urllib.parse import urlsplit

KEY = "OPDLAB_TEACHER_KEY"
"""Environment variable with the bearer key of a teacher's server, if it wants one."""


def is_url(name: str) -> bool:
    return "://" in name


def key_variable(role: str) -> str:
    """The environment variable with the key of the servers of a role, "teacher" or "rollout"."""
    return KEY.replace("TEACHER", role.upper())


def without_secrets(url: str) -> str:
    """An address as messages may show it: no user, password or query."""
    return re.sub(r"[?][^#]*", "?...", re.sub(r"//[^/?#]*@", "//...@", url))


def address_problem(url: str, role: str) -> str:
    """Why a server's address cannot be used, in words that show no secret; "" if it can."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port  # raises if it is no number
    except ValueError:
        valid = False
    if not valid:
        return f"{without_secrets(url)!r} is no http:// or https:// address of a server"
    if parts.username is not None or parts.password is not None or parts.query:
        return (
            f"the address of {parts.hostname} holds a user, a password or a query, which the "
            f"run's record would keep; put the key into the environment variable "
            f"{key_variable(role)}"
        )
    return ""
