"""SEG and SR in a real archive: Orthanc takes them over the network and files them where they belong."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import warnings

import numpy as np
import pydicom
import pytest

from lungct import dicom, exchange

ORTHANC = shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
STORESCU = shutil.which("storescu")
pytestmark = pytest.mark.skipif(not (ORTHANC and STORESCU),
                                reason="Orthanc or storescu is not installed (Debian: orthanc, dcmtk)")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Archive:
    """A running Orthanc that listens on this machine alone."""

    def __init__(self, folder):
        self.http, self.port = free_port(), free_port()
        settings = {"Name": "lungct", "StorageDirectory": str(folder / "storage"), "HttpPort": self.http,
                    "IndexDirectory": str(folder / "storage"), "DicomPort": self.port, "DicomAet": "LUNGCT",
                    "RemoteAccessAllowed": False, "AuthenticationEnabled": False, "DicomAlwaysAllowStore": True,
                    "Plugins": []}
        (folder / "orthanc.json").write_text(json.dumps(settings))
        self.log = (folder / "log.txt").open("w")
        self.process = subprocess.Popen([ORTHANC, folder / "orthanc.json"], stdout=self.log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 30
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
            time.sleep(0.1)

    def answers(self):
        try:
            return bool(self.get("/system"))
        except (urllib.error.URLError, ConnectionError):
            return False

    def get(self, path, body=None):
        request = urllib.request.Request(f"http://127.0.0.1:{self.http}{path}", body)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())

    def store(self, *paths):
        command = [STORESCU, "--required", "-aec", "LUNGCT", "127.0.0.1", str(self.port), *map(str, paths)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    def find(self, uid):
        """Orthanc's own numbers of what it holds under a UID, by level."""
        return {item["Type"]: item["ID"] for item in self.get("/tools/lookup", uid.encode())}

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=30)
        self.log.close()


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    running = Archive(tmp_path_factory.mktemp("orthanc"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def scan(phantom_dir, archive):
    """One CT stack of a phantom, stored in the archive."""
    root = phantom_dir / "Lung-PET-CT-Dx"
    stacks, instances = dicom.build_stacks(dicom.index_dicom(root, workers=1)[0], root=root)
    stack_id = stacks[(stacks.modality == "CT") & (stacks.status == "accepted")].stack_id.iloc[0]
    slices = instances[instances.stack_id == stack_id]
    archive.store(*[root / path for path in slices.path])
    return root, slices


def send(archive, folder, slices, patient):
    found = exchange.Findings(np.array([[20, 30, 25, 32, 2, 6]]), [0.9], "0f", {"A": 1.0})
    sources = exchange.source_headers(slices, patient)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                    # the phantoms' names have one part, which pydicom finds odd
        seg = exchange.to_seg(sources, found)
        report = exchange.to_sr(sources, seg, found)
    seg.save_as(folder / "seg.dcm")
    report.save_as(folder / "sr.dcm")
    archive.store(folder / "seg.dcm", folder / "sr.dcm")
    return seg.SOPInstanceUID, report.SOPInstanceUID


def references(item):
    """UIDs of the instances that a data set of Orthanc's simplified JSON names, at any depth."""
    if isinstance(item, dict):
        for name, value in item.items():
            if name == "ReferencedSOPInstanceUID":
                yield value
            else:
                yield from references(value)
    elif isinstance(item, list):
        for part in item:
            yield from references(part)


def test_objects_of_the_patient_join_the_study_and_their_references_resolve(archive, scan, tmp_path):
    root, slices = scan
    uids = send(archive, tmp_path, slices, exchange.patient_module(root / slices.path.iloc[0]))
    study = archive.get(f"/instances/{archive.find(slices.sop_uid.iloc[0])['Instance']}/study")
    modalities = set()
    for uid in uids:
        number = archive.find(uid)["Instance"]
        assert archive.get(f"/instances/{number}/study")["ID"] == study["ID"]
        modalities.add(archive.get(f"/instances/{number}/series")["MainDicomTags"]["Modality"])
        named = set(references(archive.get(f"/instances/{number}/simplified-tags")))
        assert len(named) >= 4
        for other in named:
            assert archive.get(f"/instances/{archive.find(other)['Instance']}/study")["ID"] == study["ID"]
    assert modalities == {"SEG", "SR"}
    assert len(archive.get(f"/studies/{study['ID']}")["Series"]) == 3


def test_objects_of_nobody_keep_the_uids_and_become_a_patient_of_their_own(archive, scan, tmp_path):
    root, slices = scan
    before = len(archive.get("/patients"))
    uids = send(archive, tmp_path, slices, None)
    person = pydicom.dcmread(root / slices.path.iloc[0], stop_before_pixels=True).PatientID
    for uid in uids:
        number = archive.find(uid)["Instance"]
        patient = archive.get(f"/instances/{number}/patient")["MainDicomTags"]["PatientID"]
        assert patient == exchange.pseudonym(slices.study_uid.iloc[0]) != person
        tags = archive.get(f"/instances/{number}/simplified-tags")
        assert tags["StudyInstanceUID"] == slices.study_uid.iloc[0]
        assert all(archive.find(named) for named in references(tags))
    assert len(archive.get("/patients")) == before + 1


def test_sent_twice_is_stored_once(archive, scan, tmp_path):
    root, slices = scan
    send(archive, tmp_path, slices, exchange.patient_module(root / slices.path.iloc[0]))
    count = len(archive.get("/instances"))
    send(archive, tmp_path, slices, exchange.patient_module(root / slices.path.iloc[0]))
    assert len(archive.get("/instances")) == count
