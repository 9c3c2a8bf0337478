"""The server of the search page: its password, and which requests it answers.

It gives out no file and takes none, and `Guard` refuses every address of Gradio that the page does
not need, such as uploads.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from gallery.page import SPOKEN, STYLES, THEME, build
from gallery.sent import MAX_BYTES
from gallery.service import Service

WRONG_SECONDS = 1.0  # for which a wrong password keeps all others waiting that are wrong
MAX_BODY, MAX_QUESTION = 2**16, 2**16 + 4 * MAX_BYTES // 3  # bytes of a request
# What a browser may ask for. Gradio's other addresses (files, uploads, proxies, an API) are closed.
OPEN = re.compile(
    r"/|/config/?|/login/?|/logout/?|/theme\.css|/favicon\.ico|/(?:assets|static)/[\w./-]+"
    r"|/gradio_api/(?:queue/(?:join|data)|heartbeat/\w+|startup-events|cancel)/?"
)
QUESTION = "/gradio_api/queue/join"  # has the visitor's picture
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; font-src 'self' data:; "
    # Gradio puts styles and scripts into the page, and makes functions of text.
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Guard:
    """The server's app, with fewer addresses, smaller requests, and headers that bind browsers.

    Args:
        names: of this server, in requests; none: any. Without a password, a page elsewhere on the
            web could otherwise lead its own name to this machine and read the gallery.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], names: Sequence[str] = ()) -> None:
        self.app, self.names = app, names

    async def __call__(
        self, scope: MutableMapping[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        given = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        length = given.get("content-length", "" if "transfer-encoding" in given else "0")
        name = re.sub(r":\d+$", "", given.get("host", ""))
        most = MAX_QUESTION if scope["path"] == QUESTION else MAX_BODY
        status = 0
        if self.names and name not in self.names:
            status = 421
        elif ".." in scope["path"] or not OPEN.fullmatch(scope["path"]):
            status = 404
        elif not length.isdecimal() or int(length) > most:
            status = 413

        async def start(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        if not status:
            return await self.app(scope, receive, start)
        await start({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def app_of(page: gr.Blocks, password: str = "", names: Sequence[str] = ()) -> Guard:
    """The app of a page, behind a password unless it is ""."""
    refused = asyncio.Lock()

    async def right(_: str, given: str) -> bool:
        if hmac.compare_digest(given.encode(), password.encode()):
            return True
        async with refused:  # so that nobody can try many passwords
            await asyncio.sleep(WRONG_SECONDS)
        return False

    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None), page, path="/", footer_links=[], run_history=False,
        auth=right if password else None, auth_message="Type any name, and the password.",
        allowed_paths=[], blocked_paths=["/"], show_error=False, max_file_size=0, ssr_mode=False,
        enable_monitoring=False, pwa=False, mcp_server=False, theme=THEME,
        css_paths=[STYLES], i18n=gr.I18n(en=SPOKEN),
    )  # fmt: skip
    return Guard(app, names)


class Server(uvicorn.Server):
    """A server that ends in silence: it cuts the connections of open pages, and would report each
    of them with a traceback."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def server_of(app: Guard) -> uvicorn.Server:
    """A server of an app, for a socket that listens."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return Server(
        uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=1,
            lifespan="on",
        )
    )


def serve(service: Service, listening: socket.socket, password: str, max_requests: int) -> None:
    """Serve a gallery's page until a signal."""
    names = () if password else ("localhost", "127.0.0.1", "[::1]", listening.getsockname()[0])
    app = app_of(build(service, max_requests), password, names)
    server_of(app).run(sockets=[listening])
