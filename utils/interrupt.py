"""Signals that ask a run to leave: it finishes its step, saves, and leaves with a status."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from utils.errors import StoppedBySignal, rank

WATCH_SECONDS = 5
# What schedulers, people, and terminals that close send.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)


def leave_at_once() -> None:
    """Outside of a training there is nothing to save: signals that ask to leave end the program
    with the status of one that may be started again."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise StoppedBySignal(f"{signal.Signals(number).name}: stopped; there was nothing to save")

    for number in SIGNALS:
        if number != signal.SIGINT and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, leave)


class StopRequest:
    """While entered, `SIGNALS` are noted, but for those that the process is to ignore (nohup).

    `name` is then the signal's. A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        heeded = [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.name and rank() == 0:
            with suppress(OSError):  # not print, which may have been what it interrupted
                os.write(2, b"\nfinishing this step, then saving; Ctrl-C leaves at once\n")
        self.name = self.name or signal.Signals(number).name


def serve_training(training: int, _: int) -> None:
    """For a loader's process: signals to the whole job are the training's to answer, whose process
    id is given. A worker ends at the training's own SIGTERM, or when the training is gone.

    Where a worker was not forked and libraries have started threads in it, or on other systems than
    Linux, SIGTERM from anyone ends it: the sender can be told only if no other thread may take it.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    tasks = "/proc/self/task"
    alone = os.path.isdir(tasks) and len(os.listdir(tasks)) == 1
    if alone:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def obey() -> None:
        while True:
            if alone:
                received = signal.sigtimedwait({signal.SIGTERM}, WATCH_SECONDS)
                if received is not None and received.si_pid == training:
                    os._exit(0)
            else:
                time.sleep(WATCH_SECONDS)
            try:
                os.kill(training, 0)  # asks whether it is there
            except ProcessLookupError:
                os._exit(0)

    threading.Thread(target=obey, daemon=True).start()
