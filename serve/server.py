"""The process around the application: a socket, uvicorn, logs, and an orderly end.

On SIGTERM or Ctrl-C the server takes no more work, says so at /ready, lets running requests end, and exits with 0; a
second signal ends it at once.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

from minillm_jax.errors import UserError
from serve.config import ServeConfig
from serve.service import Service

LAST_BYTES_SECONDS = 5
"""How long clients may take to read what was written before the end."""


class ServeError(UserError):
    """A server that cannot start; the message says which flag to change."""


def listen(host: str, port: int) -> socket.socket:
    """Bind the address, so that a port in use is told before a model is loaded; connections queue from here on.

    Raises:
        ServeError: the address is taken or not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0].lower()
        raise ServeError(f"--host {host} --port {port}: cannot listen there: {reason}; try another port") from error


def set_up_logs() -> None:
    """Write the access log, one JSON object a line, and warnings of everything else to stderr."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr, level=logging.WARNING, force=True
    )
    logging.getLogger("serve").setLevel(logging.INFO)
    access = logging.getLogger("serve.access")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.addHandler(handler)
    access.propagate = False


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains the engine before it stops."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal: drain at the first, leave at the second."""
        if self._service.draining:
            os._exit(128 + sig)
        self._service.draining = True
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def _drain(self) -> None:
        timeout = self._service.config.drain_timeout
        if not self._service.engine.drain(timeout):
            logging.getLogger("serve").warning("requests were still running after %.0f s and were given up", timeout)
        self.should_exit = True


def run(app: FastAPI, config: ServeConfig, listener: socket.socket) -> int:
    """Serve until a signal comes; return the exit status."""
    service: Service = app.state.service
    uvicorn_config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=LAST_BYTES_SECONDS,
    )
    if config.host not in ("127.0.0.1", "::1", "localhost") and not service.keys:
        logging.getLogger("serve").warning("anybody who reaches %s can use this server; set keys", config.host)
    port = listener.getsockname()[1]
    host = f"[{config.host}]" if ":" in config.host else config.host
    logging.getLogger("serve").info("%s is served at http://%s:%d", config.model_name, host, port)
    DrainingServer(uvicorn_config, service).run([listener])
    return 0
