"""HTTP on the standard library, for `serve` and `rank`: JSON comes in, JSON goes out, a connection is a thread."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tritium.core.config import UserError


class RequestError(Exception):
    """A request that can't be served: the sentence, and the HTTP status."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class Server(ThreadingHTTPServer):
    """Listens once made. Raises: UserError where the address can't be had."""

    daemon_threads = True
    request_queue_size = 128  # clients that connect at once; the base class lets 5 in, the next ones wait for seconds

    def __init__(self, host: str, port: int, handler: type["Handler"]):
        try:
            super().__init__((host, port), handler)
        except (OSError, UnicodeError) as error:
            raise UserError(f"host={host}, port={port}: {getattr(error, 'strerror', None) or error}") from None

    def run(self) -> None:
        """Serve until Ctrl-C."""
        try:
            self.serve_forever()
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
        finally:
            self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news; anything else is, in a line."""
        error = sys.exception()
        if not isinstance(error, (ConnectionError, TimeoutError)):
            print(f"{client_address[0]}: {type(error).__name__}: {error}", file=sys.stderr)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "tritium"
    timeout = 60.0  # seconds for a client to send its request
    longest = 16 << 20  # bytes of a body

    def log_message(self, *args: Any) -> None:
        """Not a line for each request."""

    def read_json(self) -> Any:
        """The request's body. Raises: RequestError for one that isn't JSON, or is too long."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 15 or int(length) > self.longest:
            self.close_connection = True  # what follows can't be told from a next request
            if not length:
                raise RequestError("no Content-Length: send the body whole, not in chunks", 411)
            raise RequestError(f"Content-Length: {length[:20]}; up to {self.longest} bytes are wanted", 413)
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the request's body is not JSON: {error}") from None

    def send(self, status: int, value: dict[str, Any] | str) -> None:
        """JSON, or a page."""
        body, kind = (to_json(value), "application/json") if isinstance(value, dict) else (value.encode(), "text/html")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_failure(self, message: str, status: int) -> None:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.send(status, {"error": {"message": message[:1000], "type": kind, "param": None, "code": None}})

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class says of malformed HTTP and of methods that are not here."""
        self.close_connection = True
        self.send_failure(message or "this is no HTTP request", code)


def to_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")  # a lone surrogate is \udXXX
