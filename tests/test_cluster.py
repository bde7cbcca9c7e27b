"""Chapter 3 on a real dask cluster: a scheduler and two workers, processes of their own on the loopback."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import distributed
import pandas as pd
import pytest

from lungct import annotations, dicom, runs, volumes

DASK = Path(sys.executable).with_name("dask")
GRID = volumes.Grid(96, 4.0)  # large enough for a stack to take a moment
PATIENCE = 90  # seconds after which a cluster that does not come up counts as broken


def wait_for(condition, what):
    """Poll until `condition()` is true and return what it gave."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise TimeoutError(f"no {what} within {PATIENCE} seconds")


class Cluster:
    """A scheduler and its workers, each a process started as a person would start it."""

    def __init__(self, folder):
        self.folder, self.processes, self.address = folder, {}, ""
        folder.mkdir(parents=True)

    def add_scheduler(self):
        """On a free port, which its file tells; one that dies instead is an error in its own words."""
        file = self.folder / "scheduler.json"

        def written():
            if self.processes["scheduler"].poll() is not None:
                raise RuntimeError((self.folder / "scheduler.log").read_text()[-2000:])
            return file.is_file() and file.stat().st_size

        self.start("scheduler", "scheduler", "--port", "0", "--scheduler-file", str(file))
        wait_for(written, "scheduler")
        self.address = runs.load_json(file)["address"]

    def start(self, name, *words):
        with (self.folder / f"{name}.log").open("w") as log:
            self.processes[name] = subprocess.Popen(
                [DASK, *words, "--host", "127.0.0.1", "--no-dashboard"], stdout=log, stderr=log, cwd=self.folder,
                start_new_session=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})

    def add_worker(self, name):
        """A worker of one thread without a nanny, so that it stays dead when it is killed."""
        self.start(name, "worker", self.address, "--name", name, "--nthreads", "1", "--no-nanny", "--memory-limit", "0",
                   "--local-directory", str(self.folder))

    def stop(self):
        for process in self.processes.values():
            with suppress(ProcessLookupError):             # each heads a group of its own
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)


@contextmanager
def cluster_of(folder, *names):
    """(cluster, a client of it) with these workers at work; all processes are gone afterwards, whatever happened."""
    cluster = Cluster(folder)
    try:
        cluster.add_scheduler()
        for name in names:
            cluster.add_worker(name)
        with distributed.Client(cluster.address, set_as_default=False, timeout=PATIENCE) as client:
            if names:
                client.wait_for_workers(len(names), timeout=PATIENCE)
            yield cluster, client
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def source(phantom_dir):
    """Arguments of `build_cohort` for the phantoms: root, instances, stacks, lesions, boxes."""
    root = phantom_dir / "Lung-PET-CT-Dx"
    stacks, instances = dicom.build_stacks(dicom.index_dicom(root, workers=1)[0], root=root)
    boxes, problems = annotations.read_annotations(phantom_dir / "Annotation")
    boxes = annotations.place_boxes(boxes, annotations.reconcile(instances, stacks, boxes, problems))
    lesions, boxes = annotations.join_lesions(boxes, stacks)
    return root, instances, stacks, lesions, boxes


@pytest.fixture(scope="module")
def serial(source, tmp_path_factory):
    """What this process builds by itself: (table, bytes of the store)."""
    out = tmp_path_factory.mktemp("serial")
    table = volumes.build_cohort(*source, out, GRID, workers=1)
    assert len(table) >= 10 and (table.status == "accepted").all()
    return table, bytes_of(out)


def bytes_of(out):
    return {path.name: path.read_bytes() for path in sorted((out / "volumes").glob("*.npz"))}


def build(source, out, address, on_done=lambda stack_id, outcome: None):
    """The table and how often each (stack_id, outcome) was told."""
    told = Counter()

    def count(stack_id, outcome):
        told[stack_id, outcome] += 1
        on_done(stack_id, outcome)

    return volumes.build_cohort(*source, out, GRID, scheduler=address, on_done=count), told


def test_two_workers_build_the_bytes_and_the_table_of_one_process(source, serial, tmp_path):
    table, expected = serial
    hands = set()
    with cluster_of(tmp_path / "cluster", "first", "second") as (cluster, client):
        def note_who_works(stack_id, outcome):
            hands.update(address for address, results in client.has_what().items() if results)

        found, told = build(source, tmp_path / "out", cluster.address, note_who_works)
        again, kept = build(source, tmp_path / "out", cluster.address)
    assert told == Counter((stack_id, "built") for stack_id in table.stack_id) and len(hands) == 2
    assert kept == Counter((stack_id, "kept") for stack_id in table.stack_id)
    assert bytes_of(tmp_path / "out") == expected
    pd.testing.assert_frame_equal(found, table)
    pd.testing.assert_frame_equal(again, table)


def test_a_worker_killed_in_the_middle_costs_nothing(source, serial, tmp_path):
    """SIGKILL while it works on a stack; it has no nanny and stays dead, and the other one finishes its work, too."""
    table, expected = serial
    at_the_kill = {}
    with cluster_of(tmp_path / "cluster", "victim", "survivor") as (cluster, client):
        address = {worker["name"]: address for address, worker in client.scheduler_info()["workers"].items()}
        seen = []

        def kill_once(stack_id, outcome):
            seen.append(stack_id)
            in_hand = client.processing().get(address["victim"], ())
            if not at_the_kill and len(seen) >= 2 and in_hand:
                os.kill(cluster.processes["victim"].pid, signal.SIGKILL)
                at_the_kill.update(done=len(seen), in_hand=len(in_hand))

        found, told = build(source, tmp_path / "out", cluster.address, kill_once)
        assert cluster.processes["victim"].wait(timeout=PATIENCE) == -signal.SIGKILL
        left = [worker["name"] for worker in client.scheduler_info()["workers"].values()]
    assert at_the_kill and at_the_kill["done"] + at_the_kill["in_hand"] <= len(table) and left == ["survivor"]
    # a stack that the victim had written but not yet told of is found and kept: told once all the same
    assert Counter(stack_id for stack_id, _ in told.elements()) == Counter(table.stack_id)
    assert {outcome for _, outcome in told} <= {"built", "kept"}
    assert bytes_of(tmp_path / "out") == expected
    pd.testing.assert_frame_equal(found, table)


def test_nothing_of_a_cluster_is_left_when_a_test_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), cluster_of(tmp_path / "cluster", "only") as (cluster, _):
        raise ZeroDivisionError
    assert all(process.returncode == -signal.SIGKILL for process in cluster.processes.values())


def test_without_a_worker_the_build_says_so_and_does_not_wait_for_ever(source, tmp_path, monkeypatch):
    monkeypatch.setattr(volumes, "_NO_WORKER_SECONDS", 1)
    words = "has had no worker for 1 seconds: start workers"
    with cluster_of(tmp_path / "cluster") as (cluster, _), pytest.raises(runs.InputError, match=words):
        build(source, tmp_path / "out", cluster.address)


def test_a_scheduler_lost_in_the_middle_is_one_line_and_the_next_call_goes_on(source, serial, tmp_path):
    told = []
    with cluster_of(tmp_path / "cluster", "first", "second") as (cluster, _):
        def kill_scheduler(stack_id, outcome):
            told.append(stack_id)
            if len(told) == 3:
                os.kill(cluster.processes["scheduler"].pid, signal.SIGKILL)

        with pytest.raises(runs.InputError, match=r"went away with \d+ of \d+ stacks to do"):
            build(source, tmp_path / "out", cluster.address, kill_scheduler)
    assert len(told) < len(serial[0])
    volumes.build_cohort(*source, tmp_path / "out", GRID, workers=1)
    assert bytes_of(tmp_path / "out") == serial[1]


def test_a_worker_with_other_code_or_other_folders_stops_the_build(source, tmp_path, monkeypatch):
    with cluster_of(tmp_path / "cluster", "only") as (cluster, _):
        elsewhere = (tmp_path / "nowhere", *source[1:])
        with pytest.raises(runs.InputError, match="does not see .*nowhere: mount it there under the same path"):
            build(elsewhere, tmp_path / "out", cluster.address)
        monkeypatch.setattr(runs, "code_hash", lambda: "other")
        with pytest.raises(runs.InputError, match="runs another lungct"):
            build(source, tmp_path / "out", cluster.address)
    assert bytes_of(tmp_path / "out") == {}
