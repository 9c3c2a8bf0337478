"""Open the search page of a gallery, for browsers.

    python search.py serve --gallery galleries/campus
    python search.py serve --gallery galleries/campus --host 0.0.0.0 --password_file secret.txt

Without --host, only browsers on this machine reach it. Elsewhere it asks for a password, which is
in a file or in the environment variable SEARCH_PASSWORD: a command line can be read by other users.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
from pathlib import Path

from gallery.manifest import read_manifest
from gallery.milvus import FORM, STORE_HELP, store_option
from utils.console import say
from utils.errors import UserError
from utils.files import path_option, read_file

PASSWORD = "SEARCH_PASSWORD"  # environment variable
LEAST = 12  # characters of a password
LOOPBACK = "127.0.0.1"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--gallery", required=True, type=path_option, metavar="FOLDER", help="the gallery")
    add("--encoder", type=path_option, metavar="PATH",
        help="where the gallery's encoder is now, if it was moved")  # fmt: skip
    add("--onnx", type=path_option, metavar="FOLDER",
        help="the encoder in ONNX, as for find: without torch, and without heat maps")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="as for train.py")
    add("--store", type=store_option, metavar=FORM,
        help=f"search the gallery's copy there, made by index --store. {STORE_HELP}")  # fmt: skip
    add("--host", default=LOOPBACK, metavar="ADDRESS",
        help="address to listen at, such as 0.0.0.0 for all of this machine's; other than the "
        f"default's it needs a password (default: {LOOPBACK}, this machine alone)")  # fmt: skip
    add("--port", type=int, default=7860, metavar="INT", help="0: any free one (default: 7860)")
    add("--password_file", type=path_option, metavar="FILE",
        help=f"file whose first line is the password, of at least {LEAST} characters; or set the "
        f"environment variable {PASSWORD}")  # fmt: skip
    add("--max_requests", type=int, default=64, metavar="INT",
        help="questions that may wait; further ones are refused (default: 64)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Serve until a signal. Raises UserError."""
    if args.max_requests < 1:
        raise UserError(f"--max_requests {args.max_requests}: at least 1")
    if args.onnx and args.encoder:
        raise UserError("--onnx and --encoder: two encoders; give one of them")
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port {args.port}: must be 0 to 65535")
    password = read_password(args.password_file)
    if not is_loopback(args.host) and not password:
        raise UserError(
            f"--host {args.host}: others could see the gallery; give --password_file, or set "
            f"{PASSWORD}"
        )
    read_manifest(args.gallery)
    listening = listen(args.host, args.port)  # before the model is loaded, which takes seconds
    from gallery.page_server import serve
    from gallery.service import Service

    service = Service(args.gallery, args.encoder, args.device, args.store, args.onnx)
    host = f"[{args.host}]" if ":" in args.host else args.host
    port = listening.getsockname()[1]
    count = len(service.now())
    say(f"{args.gallery}: {count} people; http://{host}:{port} (Ctrl-C ends it)")
    if not count:
        say("nobody can be found yet: search.py index adds people, also while the page is open")
    if not is_loopback(args.host):
        say("pictures and password are sent unencrypted: see docs/search.md on how to encrypt them")
    serve(service, listening, password, args.max_requests)


def read_password(path: Path | None) -> str:
    """The password of a file, or of the environment; "" if there is none. Raises UserError."""
    password, place = os.environ.get(PASSWORD, ""), PASSWORD
    if path is not None:
        place = f"--password_file {path}"
        try:
            password = (read_file(path).decode().splitlines() or [""])[0]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{place}: {getattr(error, 'strerror', None) or error}") from None
    elif not password:
        return ""
    if len(password) < LEAST:
        raise UserError(f"{place}: the password needs at least {LEAST} characters")
    return password


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError, for example if the port is in use."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host {host} --port {port}: {reason}; choose another; --port 0 is any free one"
        ) from None
    # For its connections too: without it, the end of a short answer comes 40 ms later.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening
