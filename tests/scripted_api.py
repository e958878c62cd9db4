"""A stand-in for the API under the chat page: serves the page's files and plays replies that a test wrote.

It needs no model. It sends the strictest Content-Security-Policy, which forbids inline scripts and styles, other
origins, and every way of turning a string into HTML; it remembers requests and notices when a client hangs up.
"""

import json
import threading
import time
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).parent.parent / "serve" / "web"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


@dataclass(frozen=True)
class Reply:
    """What the next completion request gets: a stream of byte pieces, or an error."""

    pieces: Iterable[bytes | threading.Event] = ()
    """An event among the bytes holds the stream until a test sets it."""
    delay: float = 0.0
    """Seconds before each piece."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def event(payload):
    return b"data: " + json.dumps(payload, ensure_ascii=False).encode() + b"\n\n"


def chunk(finish=None, **delta):
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return event({"object": "chat.completion.chunk", "model": "base", "choices": [choice]})


def usage(prompt, completion, cached=0):
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    return event({"choices": [], "usage": counts | {"prompt_tokens_details": {"cached_tokens": cached}}})


def spoken(*words, finish="stop", delay=0.0, **first):
    """A whole streamed reply that says words one by one, after a first delta with other keys if there are any."""
    deltas = [chunk(role="assistant", content="")] + ([chunk(**first)] if first else [])
    deltas += [chunk(content=word) for word in words]
    return Reply((*deltas, chunk(finish), usage(12, len(words), 4), b"data: [DONE]\n\n"), delay)


def refused(status, message, **headers):
    body = json.dumps({"error": {"message": message, "type": "error", "code": status}}).encode()
    return Reply((body,), 0.0, status, {name.replace("_", "-"): value for name, value in headers.items()})


class ScriptedApi(ThreadingHTTPServer):
    """The server, with what tests set and read."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies = []
        """What completion requests get, in order."""
        self.requests = []
        """Bodies of completion requests, in order."""
        self.keys = []
        """Authorization headers of all requests to /v1, in order."""
        self.models = ["base", "poet"]
        self.api_key = None
        self.ready = True
        self.hung_up = threading.Event()
        """Set when a client closed the connection before its reply ended."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    server: ScriptedApi

    def log_message(self, *_):
        pass

    def start(self, status, content_type, headers=()):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()

    def answer(self, payload, status=200):
        self.start(status, "application/json")
        self.wfile.write(json.dumps(payload).encode())

    def allowed(self):
        self.server.keys.append(self.headers["Authorization"])
        if self.server.api_key in (None, (self.headers["Authorization"] or "").removeprefix("Bearer ")):
            return True
        self.answer({"error": {"message": "give the right key"}}, 401)
        return False

    def do_GET(self):
        if self.path == "/ready":
            return self.answer({"ready": self.server.ready}, 200 if self.server.ready else 503)
        if self.path == "/v1/models":
            if self.allowed():
                self.answer({"object": "list", "data": [{"id": name} for name in self.server.models]})
            return None
        name = "index.html" if self.path == "/" else self.path.removeprefix("/web/")
        if name not in {path.name for path in PAGE.iterdir()}:
            return self.answer({"error": {"message": f"nothing at {self.path}"}}, 404)
        self.start(200, TYPES[Path(name).suffix])
        self.wfile.write((PAGE / name).read_bytes())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        self.server.requests.append(body)
        reply = self.server.replies.pop(0)
        self.start(reply.status, "text/event-stream" if reply.status == 200 else "application/json", reply.headers)
        try:
            for piece in reply.pieces:
                time.sleep(reply.delay)
                if isinstance(piece, threading.Event):
                    piece.wait(20)
                else:
                    self.wfile.write(piece)
        except OSError:
            self.server.hung_up.set()


@contextmanager
def serving():
    """Run the server in a thread."""
    server = ScriptedApi()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
