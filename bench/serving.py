"""Measures a network as a server runs it: callers in threads of one process, and a busy process beside it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import runtimes
import torch
from engines import LITERT, ONNX, OPENVINO, Case, build, litert_file, onnx_file

Call = Callable[[], object]
Measure = Callable[[float], float]  # images a second, measured for about so many seconds


def images_per_second(calls: Sequence[Call], seconds: float) -> float:
    """Calls a second. Each of `calls` is repeated in a thread of its own until the time is over."""
    ready = threading.Barrier(len(calls) + 1)
    counts, ends = [0] * len(calls), [0.0] * len(calls)
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            with torch.no_grad():  # each thread has a mode of its own
                calls[i]()
                ready.wait()
                end = time.perf_counter() + seconds
                while ends[i] < end:
                    calls[i]()
                    counts[i] += 1
                    ends[i] = time.perf_counter()
        except BaseException as error:
            errors.append(error)
            ready.abort()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):
        ready.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(counts) / (max(ends) - start)


def _queue(case: Case, callers: int) -> Measure:
    """OpenVINO with its hint THROUGHPUT and `callers` requests under way. It chooses its streams and threads."""
    model = runtimes.openvino_model(onnx_file(case), "THROUGHPUT")
    queue = runtimes.use("openvino", "bench").AsyncInferQueue(model, callers)
    x = case.images().numpy()
    for _ in range(2 * callers):
        queue.start_async({0: x})
    queue.wait_all()

    def measure(seconds: float) -> float:
        count, start = 0, time.perf_counter()
        while time.perf_counter() < start + seconds:
            queue.start_async({0: x})  # waits for an idle request
            count += 1
        queue.wait_all()
        return count / (time.perf_counter() - start)

    return measure


def _calls(name: str, case: Case, callers: int) -> list[Call]:
    """One call for each caller. Ours, PyTorch and ONNX Runtime share one network, LiteRT has one for each caller."""
    if name == LITERT:
        path = litert_file(case.width, case.resolution, case.batch)
        return [runtimes.litert(path, case.images(), 1) for _ in range(callers)]
    if name == ONNX:
        session = runtimes.onnx_session(onnx_file(case), 1)
        inputs = {session.get_inputs()[0].name: case.images().numpy()}
        return callers * [lambda: session.run(None, inputs)]
    return callers * [build(case, [name])[0][name]]


def many_callers(case: Case, callers: int, checked: Sequence[str]) -> dict[str, Measure]:
    """`callers` threads, each of which runs one image at a time on one thread. `checked`: the engines to measure."""
    found: dict[str, Measure] = {}
    for name in checked:
        if name == OPENVINO:
            found[name] = _queue(case, callers)
        else:
            calls = _calls(name, case, callers)
            found[name] = lambda seconds, calls=calls: images_per_second(calls, seconds)
    return found


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """A process that keeps one processor busy while the body runs."""
    child = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        yield
    finally:
        child.kill()
        child.communicate()
