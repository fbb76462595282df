"""Files that are whole or not there, and the lock that one process holds."""

import os
import subprocess
import sys
import threading
import time

import pytest

from jaxgen.files import locked, write_whole

HOLD = """
import os, sys
from jaxgen.files import locked
with locked(sys.argv[1], wait=sys.argv[2] == "wait") as held:
    if sys.argv[2] == "fork" and os.fork() == 0:   # a child that outlives its parent
        sys.stdin.read()
        os._exit(0)
    print(held, flush=True)
    if sys.argv[2] != "fork":
        sys.stdin.read()
"""


def holder(path, how: str) -> subprocess.Popen:
    """Another process that holds the lock, until its input ends."""
    command = [sys.executable, "-c", HOLD, str(path), how]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    return process


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("content", ["naïve\n", b"\xff\n"])
def test_a_file_is_written_whole(tmp_path, content, sync):
    path = tmp_path / "file.json"
    path.write_text("old")
    write_whole(path, content, sync)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert os.listdir(tmp_path) == ["file.json"]


def test_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.json"]


def test_a_lock_refuses_while_another_process_holds_it(tmp_path):
    with holder(tmp_path / "lock", "refuse") as other:
        with pytest.raises(BlockingIOError, match="another process holds .*lock"):
            locked(tmp_path / "lock", wait=False).__enter__()
        other.communicate()
    with locked(tmp_path / "lock", wait=False) as held:
        assert held


def test_a_refusing_lock_is_not_inherited(tmp_path):
    with holder(tmp_path / "lock", "fork") as other:
        other.wait()   # and its child is there
        with locked(tmp_path / "lock", wait=False) as held:
            assert held
        other.communicate()


def test_a_lock_waits_for_another_process(tmp_path):
    entered = threading.Event()

    def enter():
        with locked(tmp_path / "lock") as held:
            assert held
            entered.set()

    with holder(tmp_path / "lock", "wait") as other:
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.2)
        other.communicate()
        assert entered.wait(10)
        thread.join()


def test_a_waiting_lock_holds_between_threads(tmp_path):
    inside, most = [], []

    def enter():
        with locked(tmp_path / "lock"):
            inside.append(1)
            time.sleep(0.005)
            most.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 8


@pytest.mark.parametrize("wait", [True, False])
def test_without_locks_one_goes_on(tmp_path, monkeypatch, wait):
    monkeypatch.setitem(sys.modules, "fcntl", None)   # as on Windows
    with locked(tmp_path / "lock", wait) as held:
        assert not held
