"""Ask a search page as many visitors at once would, and print how long they wait.

    python search.py serve --gallery galleries/campus
    python tools/askers.py http://127.0.0.1:7860 --askers 20 --seconds 60

Each asker is a session of its own, and asks again as soon as it has its page of hits. It asks at
least once.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not a module

import utils  # noqa: F401  before torch is loaded

# isort: split

import httpx
import numpy as np

from utils.console import say
from utils.errors import UserError, run_main
from utils.tables import console

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "grey", "brown", "orange", "purple")
GARMENTS = ("coat", "dress", "jacket", "shirt", "skirt", "hat", "bag", "backpack")
PATIENCE = 60.0  # seconds in which an answer must come


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("address", help="of the page")
    parser.add_argument("--askers", type=int, default=20, metavar="INT", help="(default: 20)")
    parser.add_argument(
        "--seconds", type=float, default=60.0, metavar="SECONDS", help="(default: 60)"
    )
    args = parser.parse_args()
    if args.askers < 1:
        raise UserError(f"--askers {args.askers}: at least 1")
    function, fields = form_of(args.address)
    end = time.monotonic() + args.seconds
    with ThreadPoolExecutor(args.askers) as threads:
        each = threads.map(
            lambda seed: asked(args.address, function, fields, end, seed), range(args.askers)
        )
        seconds = [second for some in each for second in some]
    good = np.array([s for s in seconds if s is not None]) * 1000
    if not len(good):
        raise UserError(f"{args.address}: none of {len(seconds)} questions was answered")
    head = ["askers", "answers", "a second", "median ms", "95 % ms", "longest ms", "errors"]
    row = [args.askers, len(good), f"{len(good) / args.seconds:.1f}"]
    row += [f"{value:.0f}" for value in (*np.percentile(good, (50, 95)), good.max())]
    say(console(head, [[*row, len(seconds) - len(good)]], left=0))


def form_of(address: str) -> tuple[int, list[Any]]:
    """The number of the function that answers questions, and what its fields have at first."""
    try:
        config = httpx.get(f"{address}/config").raise_for_status().json()
    except (httpx.HTTPError, ValueError) as error:
        raise UserError(f"{address}: not a search page without a password: {error}") from None
    values = {part["id"]: part["props"].get("value") for part in config["components"]}
    found = next(d for d in config["dependencies"] if d["api_name"] == "ask")
    return found["id"], [values[component] for component in found["inputs"]]


def asked(
    address: str, function: int, fields: list[Any], end: float, seed: int
) -> list[float | None]:
    """Seconds of each question of an asker until `end`; None for one without hits."""
    chance, session = random.Random(seed), secrets.token_hex(6)
    seconds: list[float | None] = []
    with httpx.Client(base_url=address, timeout=PATIENCE) as client:
        while not seconds or time.monotonic() < end:
            sentence = f"a person with a {chance.choice(COLOURS)} {chance.choice(GARMENTS)}"
            start = time.monotonic()
            right = _ask(client, session, function, [sentence, *fields[1:]])
            seconds.append(time.monotonic() - start if right else None)
    return seconds


def _ask(client: httpx.Client, session: str, function: int, data: list[Any]) -> bool:
    """Whether a question gets hits."""
    body = {"data": data, "fn_index": function, "session_hash": session}
    try:
        client.post("/gradio_api/queue/join", json=body).raise_for_status()
        with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as r:
            for line in r.iter_lines():
                event = json.loads(line.removeprefix("data:")) if line else {}
                if event.get("msg") == "process_completed":
                    return event["success"] and 'class="hit"' in str(event["output"]["data"])
    except (httpx.HTTPError, ValueError):
        pass
    return False


if __name__ == "__main__":
    run_main(main)
