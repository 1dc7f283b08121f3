"""A real local HTTP server that speaks the chat protocol, and misbehaves on demand."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[[int], str]
"""From the number of a call to what happens: a status code, or ok, torn, drop, wrong (schema), gzip
(a body that is not what its header says), drip (a byte at a time), unmeasured (no usage)."""


@dataclass
class ChatServer:
    """What the server saw and how it behaves."""

    behave: Behaviour = lambda number: "ok"
    delay_s: float = 0.0
    retry_after: str = "0"
    complaint: str = ""
    say: Callable[[str], str] = lambda prompt: f"echo: {prompt}"
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    proxy_keys: list[str | None] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    peak: int = 0
    num_connections: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def enter(self, body: dict[str, Any], key: str | None) -> str:
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.keys.append(key)
            self._now += 1
            self.peak = max(self.peak, self._now)
        time.sleep(self.delay_s)
        return self.behave(number)

    def leave(self) -> None:
        with self._lock:
            self._now -= 1


def reply_to(body: dict[str, Any], say: Callable[[str], str]) -> dict[str, Any]:
    content = say(body["messages"][-1]["content"])
    return {
        "choices": [
            {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
    }


def make_handler(server: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            with server._lock:
                server.num_connections += 1

        def log_message(self, *args: object) -> None:
            """Be quiet."""

        def do_CONNECT(self) -> None:
            """A proxy that refuses everybody."""
            server.proxy_keys.append(self.headers.get("Proxy-Authorization"))
            server.keys.append(self.headers.get("Authorization"))
            self.send_error(407)

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            body = json.loads(self.rfile.read(length))
            server.proxy_keys.append(self.headers.get("Proxy-Authorization"))
            what = server.enter(body, self.headers.get("Authorization"))
            try:
                self.respond(what, body)
            finally:
                server.leave()

        def respond(self, what: str, body: dict[str, Any]) -> None:
            if what == "drop":
                self.close_connection = True
                self.connection.close()
                return
            content = json.dumps(reply_to(body, server.say)).encode()
            status = int(what) if what.isdigit() else 200
            if what == "torn":
                content = content[:20]
            if what == "wrong":
                content = b'{"choices": []}'
            if what == "unmeasured":
                whole = reply_to(body, server.say) | {"usage": {"prompt_tokens": None}}
                content = json.dumps(whole).encode()
            if status == 400:
                content = server.complaint.encode()
            if what == "ok":
                server.answered.append(body["messages"][-1]["content"])
            self.send_response(status)
            if what == "429":
                self.send_header("Retry-After", server.retry_after)
            self.send_header("Content-Length", str(len(content)))
            if what == "gzip":
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            if what == "drip":
                for byte in content:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.02)
            else:
                self.wfile.write(content)

    return Handler


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is what some tests are about."""


@contextmanager
def chat_server(server: ChatServer) -> Iterator[ChatServer]:
    """Serve on a free loopback port while the block runs."""
    http = _QuietServer(("127.0.0.1", 0), make_handler(server))
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        thread.join(timeout=10)
        http.server_close()
