"""The live server of the report."""

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from diagnostics.records import rows


def get(address: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
        return answer.read().decode()


def test_the_server_serves_updates_to_this_machine_only(server: tuple[str, Path]) -> None:
    address, folder = server
    assert address.startswith("http://127.0.0.1:")
    version_before, data = get(address + "/version"), json.loads(get(address + "/data"))
    assert data["runs"][0]["done"] == 3
    assert get(address + "/version") == version_before
    row = rows.read_rows(folder / "rows.jsonl")[-1]
    rows.append_row(folder / "rows.jsonl", row | {"step": 3})
    assert get(address + "/version") != version_before
    assert json.loads(get(address + "/data"))["runs"][0]["done"] == 4
    assert "connect-src 'self'" in get(address + "/")
    for path, headers in (("/../config.json", {}), ("/data", {"Host": "evil.example"})):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(address + path, **headers)


def test_the_server_reports_an_unreadable_record_and_continues(server: tuple[str, Path]) -> None:
    address, folder = server
    rows_text = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text("{broken\n" + rows_text)
    with pytest.raises(urllib.error.HTTPError, match="503") as raised:
        get(address + "/data")
    assert "rows.jsonl line 1 is not JSON" in raised.value.read().decode()
    (folder / "rows.jsonl").write_text(rows_text)
    assert json.loads(get(address + "/data"))["runs"][0]["done"] == 3


def test_truncated_rows_are_noted(server: tuple[str, Path]) -> None:
    """A truncated row causes a note."""
    address, folder = server
    with open(folder / "rows.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert json.loads(get(address + "/data"))["runs"][0]["notes"] == [
        "rows.jsonl line 4 is truncated and was skipped"
    ]
