"""A server that speaks OpenAI's protocol for tests: its answers are a function of prompt and
pictures, it fails as a test wants, and it counts."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ModelServer(ThreadingHTTPServer):
    """A context manager: it listens on a free port of this machine.

    Attributes:
        requests: how many came for each prompt, and `answered` those that were answered.
        most: most requests that it had at once.
        times: when requests came, in seconds.
        last: the body of the last request.

    Args:
        reply: the text for (prompt, URLs of the pictures, how many times it was asked before).
        fault: for (prompt, how many times it was asked before), what goes wrong: a status, such as
            429, or "timeout", "reset", "cut", "malformed", "no_choices"; None answers.
        delay: seconds until it answers.
        schema: False refuses `response_format`.
        key: the API key that it wants.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        reply: Callable[[str, list[str], int], str] | None = None,
        fault: Callable[[str, int], object] = lambda prompt, nth: None,
        delay: float = 0.0,
        schema: bool = True,
        key: str = "",
        model: str = "tiny",
        refuses_max_tokens: bool = False,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.fault, self.delay = reply or default_reply, fault, delay
        self.schema, self.key, self.model = schema, key, model
        self.refuses_max_tokens = refuses_max_tokens
        self.requests: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.times: list[float] = []
        self.last: dict = {}
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> ModelServer:
        serve = {"poll_interval": 0.01}
        threading.Thread(target=self.serve_forever, kwargs=serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is no error of a test."""


def default_reply(prompt: str, pictures: list[str], nth: int) -> str:
    digest = hashlib.sha256("".join([prompt, *pictures]).encode()).hexdigest()
    return f"answer {digest[:8]} to {prompt[:40]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # small answers would wait for 40 ms
    server: ModelServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": self.server.model, "object": "model"}]})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        prompt = "".join(part["text"] for part in parts if part["type"] == "text")
        pictures = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        with server.lock:
            nth = server.requests[prompt]
            server.requests[prompt] += 1
            server.times.append(time.monotonic())
            server.last = body
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            self._answer(body, prompt, pictures, nth)
        finally:
            with server.lock:
                server.now -= 1

    def _answer(self, body: dict, prompt: str, pictures: list[str], nth: int) -> None:
        server = self.server
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            return self._error(401, "Incorrect API key provided")
        if body["model"] != server.model:
            return self._error(404, f"The model `{body['model']}` does not exist.")
        if server.refuses_max_tokens and "max_tokens" in body:
            return self._error(400, "Unsupported parameter: use 'max_completion_tokens' instead.")
        if not server.schema and "response_format" in body:
            return self._error(400, "response_format is not supported")
        fault = server.fault(prompt, nth)
        if fault == "reset":  # closes with RST
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            return self.connection.close()
        if fault == "timeout":
            server.closing.wait(5)
            self.close_connection = True
            return None
        if isinstance(fault, int):
            headers = {"Retry-After": "0.05"} if fault == 429 else {}
            return self._error(fault, f"fault {fault}", headers)
        if fault == "malformed":
            return self._raw(200, b'{"id": "x", "choi', {})
        if fault == "no_choices":
            return self._send(200, {"error": {"message": "upstream"}})
        server.closing.wait(server.delay)
        text = server.reply(prompt, pictures, nth)
        with server.lock:
            server.answered[prompt] += 1
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        if fault == "cut":
            choice["finish_reason"], message["content"] = "length", text[: len(text) // 2]
        tokens = {"prompt_tokens": 100 + len(pictures) * 500, "completion_tokens": 20}
        return self._send(
            200,
            {
                "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                "choices": [choice], "usage": tokens | {"total_tokens": sum(tokens.values())},
            },
        )  # fmt: skip

    def _error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, {"error": {"message": message, "type": "error"}}, headers)

    def _send(self, status: int, body: dict, headers: dict[str, str] | None = None) -> None:
        self._raw(status, json.dumps(body).encode(), headers or {})

    def _raw(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
