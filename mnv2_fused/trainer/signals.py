"""How SIGINT and SIGTERM stop a run: after a step, and without errors from the processes that decode images."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether SIGINT or SIGTERM came in the body. The same one again raises
    KeyboardInterrupt.

    The first one does nothing else: raising at once would leave a step half done. A launcher may pass Ctrl-C on as
    SIGTERM. Only the main thread may handle signals; in another one the function returns False.
    """
    requests: list[int] = []

    def request(number: int, frame: object) -> None:
        requests.append(number)
        if requests.count(number) > 1:
            raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, request) for number in _SIGNALS}
    try:
        yield lambda: bool(requests)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Processes that the body starts keep both signals pending until `set_up_worker` has set their handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def set_up_worker(worker: int) -> None:
    """Lets a loader's worker exit with code 0 on SIGTERM and ignore SIGINT.

    Terminals and service managers send signals to all processes. If a worker dies of one, PyTorch raises in the parent
    at any moment, also in the middle of a step. If it exits with 0, the parent notices when the next images are due.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
