"""Hostile text, and the scripts, attributes and links of a page."""

import html.parser
from typing import Any

HOSTILE = (
    "</script><script>window.owned=1</script>",
    "<img src=x onerror=window.owned=1>",
    "\u202egnp.exe\u202c",
    "a\u2028b\u2029c",
    "\x00\x1b[31m\x7f\u200b\ufeff",
    "\ud800 lone",
    "{{data}} {{scripts}}",
)


class Scripts(html.parser.HTMLParser):
    """Collects the text of every script of a page, with its type."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "script":
            self.inside = True
            self.found.append((dict(attrs).get("type", ""), ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "script"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[-1] = (self.found[-1][0], self.found[-1][1] + data)


class Attributes(html.parser.HTMLParser):
    """Collects every attribute of a page with its value."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found += attrs


def attributes(page: str) -> set[str]:
    parser = Attributes()
    parser.feed(page)
    return {name for name, _ in parser.found}


def links(page: str) -> list[str]:
    parser = Attributes()
    parser.feed(page)
    return [value for name, value in parser.found if name == "href"]


def policy(page: str) -> dict[str, str]:
    """Return the content security policy by directive."""
    text = page.split('http-equiv="Content-Security-Policy" content="')[1].split('"')[0]
    return dict(directive.strip().split(" ", 1) for directive in text.split(";"))


def scripts(page: str) -> list[tuple[str, str]]:
    parser = Scripts()
    parser.feed(page)
    return parser.found
