"""`opd report --watch`: the page, served on this machine alone, with what is new in the runs."""

import json
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from diagnostics.errors import UserError
from opd.report.run_data import rows_file

HOST = "127.0.0.1"
WATCHED = ("config.json", "evals.jsonl", "batches", "dumps", "doctor.json")


def serve(folders: list[Path], tokens: int, port: int, models: bool = False) -> None:
    """Serve until Ctrl-C."""
    server = make_server(folders, tokens, port, models)
    print(f"http://{HOST}:{server.server_address[1]}/  (Ctrl-C ends it)", file=sys.stderr)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def make_server(
    folders: list[Path], tokens: int, port: int, models: bool = False
) -> ThreadingHTTPServer:
    """A server of "/", the page, "/version", a word that changes with the runs, and "/data".

    Raises:
      FileNotFoundError: a folder is not a run folder. OSError: the port is taken.
    """
    from opd.report.build import contents, embedded, page

    contents(folders, tokens, models)  # refuse at once what cannot be shown

    def now() -> str:
        return embedded(contents(folders, tokens, models))

    answers: dict[str, tuple[str, Callable[[], str]]] = {
        "/": ("text/html", lambda: page(contents(folders, tokens, models), watch=True)),
        "/data": ("application/json", now),
        "/version": ("text/plain", lambda: version(folders)),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = answers.get(self.path.split("?")[0])
            host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
            if known is None or host not in (HOST, "localhost"):  # no page of another name reads us
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            kind, answer = known
            status = HTTPStatus.OK
            try:
                body = answer().encode()
            except UserError as error:  # a record that is damaged since, or is being written
                kind, status = "text/plain", HTTPStatus.SERVICE_UNAVAILABLE
                body = str(error).encode()
                print(error, file=sys.stderr)
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return ThreadingHTTPServer((HOST, port), Handler)


def version(folders: list[Path]) -> str:
    """Sizes and times of what the page is made of."""
    found = []
    for folder in folders:
        for path in [rows_file(folder), *(folder / name for name in WATCHED)]:
            if path.exists():
                at = path.stat()
                found.append([at.st_size, at.st_mtime_ns])
    return json.dumps(found)
