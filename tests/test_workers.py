"""Worker processes: started without the script that asks for them, gone with it, replaced when they die."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import psutil
import pytest

from lungct import runs, workers
from lungct.workers import connect, worker_pool


def run_script(path, text):
    path.write_text(text, encoding="utf-8")
    return subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=60, check=False)


def test_a_script_without_a_guard_runs_once(tmp_path):
    told = run_script(tmp_path / "unguarded.py", (
        "from lungct.workers import worker_pool\n"
        "print('once')\n"
        "with worker_pool(2) as pool:\n"
        "    print(sum(pool.map(len, ['ab', 'cde'])))\n"))
    assert (told.returncode, told.stdout.split(), told.stderr) == (0, ["once", "5"], "")


def test_an_unguarded_script_may_index_a_folder(tmp_path, phantom_dir):
    told = run_script(tmp_path / "unguarded.py", (
        "from lungct import dicom\n"
        "dicom.FILES_A_WORKER = 100\n"
        f"instances, problems = dicom.index_dicom({str(phantom_dir)!r}, workers=2)\n"
        "print(len(instances) > 0)\n"))
    assert (told.returncode, told.stdout.split(), told.stderr) == (0, ["True"], "")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_leave_with_their_parent(how):
    script = ("import os, time\nfrom lungct.workers import worker_pool\npool = worker_pool(1)\n"
              "print(pool.submit(os.getpid).result(), flush=True)\ntime.sleep(60)\n")
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True)
    with parent.stdout as told:
        worker = psutil.Process(int(told.readline()))
    parent.send_signal(how)
    parent.wait()
    assert psutil.wait_procs([worker], timeout=20)[1] == []


def test_the_main_module_is_back_after_starts_in_many_threads():
    before = sys.modules["__main__"]

    def start(times):
        for _ in range(times):
            with workers._nameless_main():
                time.sleep(0.001)

    threads = [threading.Thread(target=start, args=(20,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sys.modules["__main__"] is before


def test_as_many_processes_as_this_one_may_use_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 9}, raising=False)
    assert (workers.processes(), workers.processes(7)) == (3, 7)
    monkeypatch.setattr(workers, "current_process", lambda: SimpleNamespace(daemon=True))
    assert workers.processes(7) == 1                          # it may start none


def test_the_main_module_is_back_after_a_start():
    before = sys.modules["__main__"]
    with worker_pool(1) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()
    assert sys.modules["__main__"] is before


def test_a_killed_worker_breaks_its_pool_and_not_the_next_one():
    with worker_pool(1) as pool, pytest.raises(BrokenProcessPool):
        pool.submit(os.kill, pool.submit(os.getpid).result(), signal.SIGKILL).result()
    with worker_pool(1) as pool:
        assert pool.submit(len, "abc").result() == 3


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request"], ids=["nothing", "another protocol"])
def test_a_server_that_is_no_scheduler_is_one_line_within_seconds(says):
    pytest.importorskip("distributed")
    callers = []

    def answer():
        callers.append(server.accept()[0])
        callers[0].sendall(says)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, daemon=True).start()
        address, began = f"tcp://127.0.0.1:{server.getsockname()[1]}", time.monotonic()
        with pytest.raises(runs.InputError, match=f"^no dask scheduler answers at '{address}' .*empty$"):
            connect(address, seconds=1)
    assert time.monotonic() - began < 10
    callers[0].close()


def test_a_very_long_folder_for_temporary_files_does_not_matter(tmp_path):
    long = tmp_path / ("a" * 60) / ("b" * 60)
    long.mkdir(parents=True)
    script = ("from lungct.workers import worker_pool\n"
              "with worker_pool(1) as pool:\n    print(pool.submit(len, 'abc').result())\n")
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False,
                          env=os.environ | {"TMPDIR": str(long)})
    assert (told.returncode, told.stdout.split(), told.stderr) == (0, ["3"], "")
