"""A real server on a free port, in a thread, for tests of the API; and a socket to see its raw bytes."""

import contextlib
import json
import socket
import threading
import time

import uvicorn
from example_tokenizers import TOKENIZER

from serve.api import create_app
from serve.auth import ApiKeys
from serve.config import ServeConfig


class Server:
    """An application under uvicorn."""

    def __init__(self, engine, config=None, keys=(), tokenizer=TOKENIZER):
        self.engine = engine
        self.app = create_app(engine, tokenizer, config or ServeConfig("runs/tiny"), ApiKeys(keys))
        self.service = self.app.state.service
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(uvicorn.Config(self.app, log_level="error", access_log=False))
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(10)

    def connection(self):
        """Open a socket to the server."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def raw(self, method, path, body=b"", headers=(), read=True):
        """Send a request by hand; return all bytes of the answer, or the open socket."""
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: test", "Connection: close", f"Content-Length: {len(body)}"]
        if not any(header.startswith("Content-Type:") for header in headers):
            lines.append("Content-Type: application/json")
        lines += headers
        connection = self.connection()
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        if not read:
            return connection
        with contextlib.closing(connection):
            return b"".join(iter(lambda: connection.recv(65536), b""))


def unchunked(raw):
    """The body of an answer in chunked transfer encoding, and its head."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return head, body


def events(body):
    """The data of all events of a stream."""
    assert body.endswith(b"\n\n")
    lines = body[:-2].split(b"\n\n")
    assert all(line.startswith(b"data: ") for line in lines)
    return [line[6:] if line[6:] == b"[DONE]" else json.loads(line[6:]) for line in lines]
