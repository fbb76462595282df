"""One function in several child processes, answering in order.

Plain children that speak over pipes: unlike multiprocessing's they never run the user's main script again, need no fork
beneath JAX's threads, and end by themselves when this process is killed, since their input ends.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import os
import pickle
import queue
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from jaxgen.errors import UserError


@contextlib.contextmanager
def workers(function: Callable[[Any], Any], processes: int) -> Iterator[Callable[[Iterable], Iterator[tuple]]]:
    """Gives `run`, which turns an iterable of arguments into (argument, function(argument)), in order.

    Args:
      function: called in the children; sent with cloudpickle, so that it may be a method, a lambda or a class of a
        script. What it raises is raised here.
      processes: how many; at most two arguments a process are in flight. 0 calls the function right here.
    """
    if not processes or not sys.executable:
        yield lambda arguments: ((a, function(a)) for a in arguments)
        return
    import cloudpickle

    code = f"import sys; sys.path[:] = {sys.path!r}; from jaxgen.data.processes import serve; serve()"
    children = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                for _ in range(processes)]
    idle: queue.SimpleQueue = queue.SimpleQueue()
    for child in children:
        idle.put(child)

    def ask(argument: Any) -> Any:
        child = idle.get()
        try:
            _send(child.stdin, pickle.dumps(argument))
            good, answer = pickle.load(child.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as e:
            raise RuntimeError(f"a data process died (exit code {child.poll()})") from e
        finally:
            idle.put(child)
        if not good:
            raise answer
        return answer

    def run(arguments: Iterable) -> Iterator[tuple]:
        flying: collections.deque = collections.deque()
        for argument in arguments:
            flying.append((argument, threads.submit(ask, argument)))
            if len(flying) >= 2 * processes:
                first, future = flying.popleft()
                yield first, future.result()
        for first, future in flying:
            yield first, future.result()

    threads = concurrent.futures.ThreadPoolExecutor(processes, thread_name_prefix="jaxgen-data")
    try:
        sent = cloudpickle.dumps(function)
        for child in children:
            with contextlib.suppress(BrokenPipeError):  # it died at once, of which `ask` will tell
                _send(child.stdin, sent)
        yield run
    finally:
        for child in children:
            child.kill()
        threads.shutdown(wait=True, cancel_futures=True)
        for child in children:
            child.wait()
            child.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()


def _send(stream: BinaryIO, data: bytes) -> None:
    stream.write(data)
    stream.flush()


def serve() -> None:
    """The child: reads the function, then arguments to the end; answers (True, value) or (False, error)."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up between the answers
    with contextlib.suppress(EOFError, BrokenPipeError):
        function = pickle.load(source)
        while True:
            argument = pickle.load(source)
            try:
                answer = pickle.dumps((True, function(argument)), protocol=pickle.HIGHEST_PROTOCOL)
            except Exception as e:
                if not isinstance(e, UserError):  # which says all there is to say
                    e.add_note("in a data process:\n" + traceback.format_exc())
                answer = pickle.dumps((False, e))
            _send(answers, answer)
