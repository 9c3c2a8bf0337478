"""Signals that stop a run: it finishes its step, saves, and exits with a status."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from utils.console import process_rank
from utils.errors import StoppedBySignal

WATCH_SECONDS = 5  # between a worker's checks whether its training still runs
# Schedulers, users and closing terminals send these.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)


def exit_on_signals(state: str = "there was nothing to save") -> None:
    """`SIGNALS` end the program at once, with the status after which a scheduler may requeue it.

    Args:
        state: what the message says of it; a training saves nothing before its first step.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedBySignal(f"{signal.Signals(number).name}: stopped; {state}")

    for number in SIGNALS:
        if number != signal.SIGINT and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, stop)


class StopRequest:
    """A context in which `SIGNALS` do not end the process: `name` becomes the name of the signal.

    Signals that the process ignores (nohup) stay ignored. A second Ctrl-C raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.name = ""
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        active = [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._note) for number in active}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.name and process_rank() == 0:
            with suppress(OSError):  # print may be what the signal interrupted; it is not reentrant
                os.write(2, b"\nfinishing this step, then saving; press Ctrl-C again to exit now\n")
        self.name = self.name or signal.Signals(number).name


def init_worker_signals(training: int, _: int) -> None:
    """Set up signals in a loader process; `training` is the process id of its training.

    A scheduler signals all processes of a job, but only the training should react. A worker ends at
    SIGTERM from its training, or when the training has ended.

    The sender of SIGTERM is known only if no other thread can receive it. So any SIGTERM ends a
    worker on other systems than Linux, and if libraries have started threads in it.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    tasks = "/proc/self/task"
    single_thread = os.path.isdir(tasks) and len(os.listdir(tasks)) == 1
    if single_thread:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch() -> None:
        while True:
            if single_thread:
                received = signal.sigtimedwait({signal.SIGTERM}, WATCH_SECONDS)
                if received is not None and received.si_pid == training:
                    os._exit(0)
            else:
                time.sleep(WATCH_SECONDS)
            try:
                os.kill(training, 0)  # signal 0 only checks that the process exists
            except ProcessLookupError:
                os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
