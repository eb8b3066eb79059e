"""Live server of the report (`opd report --watch`), on this machine only."""

import json
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from diagnostics.errors import UserError
from diagnostics.records.run_folder import RunFolder

HOST = "127.0.0.1"
WATCHED_FILES = ("config.json", "evals.jsonl", "batches", "dumps", "doctor.json")


def serve(folders: list[Path], tokens: int, port: int, models: bool = False) -> None:
    """Serve the page until Ctrl-C."""
    server = make_server(folders, tokens, port, models)
    print(f"http://{HOST}:{server.server_address[1]}/  (Ctrl-C to stop)", file=sys.stderr)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def make_server(
    folders: list[Path], tokens: int, port: int, models: bool = False
) -> ThreadingHTTPServer:
    """Build a server of "/" (the page), "/data" and "/version" (text that changes with the runs).

    Args:
        folders: Run folders.
        tokens: Largest number of tokens in the rollout viewer.
        port: Port; 0 for any free one.
        models: Whether files outside the run folders may be read.

    Returns:
        The server, not started.

    Raises:
        MissingFile: A folder is not a run folder.
        OSError: The port is in use.
    """
    from opd.report.build import embed_json, render_page, report_data

    report_data(folders, tokens, models)  # fail before serving if the runs cannot be read

    def current_data() -> str:
        return embed_json(report_data(folders, tokens, models))

    handlers: dict[str, tuple[str, Callable[[], str]]] = {
        "/": ("text/html", lambda: render_page(report_data(folders, tokens, models), watch=True)),
        "/data": ("application/json", current_data),
        "/version": ("text/plain", lambda: data_version(folders)),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            handler = handlers.get(self.path.split("?")[0])
            host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
            if handler is None or host not in (HOST, "localhost"):  # against DNS rebinding
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            kind, make_body = handler
            status = HTTPStatus.OK
            try:
                body = make_body().encode()
            except UserError as error:  # a record that is damaged or being written
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


def data_version(folders: list[Path]) -> str:
    """Return sizes and modification times of the files that the page is made from."""
    file_states = []
    for folder in folders:
        for path in [RunFolder(folder).rows_file, *(folder / name for name in WATCHED_FILES)]:
            if path.exists():
                state = path.stat()
                file_states.append([state.st_size, state.st_mtime_ns])
    return json.dumps(file_states)
