"""The download: a series is there whole or not at all, and the same command goes on."""

import errno
import os
import subprocess
import zipfile

import pytest

from lungct import download, runs

UIDS = ["1.2.3", "1.2.4", "1.2.5"]


@pytest.fixture
def collection(tmp_path):
    (tmp_path / "c.tcia").write_text("downloadServerUrl=somewhere\nListOfSeriesToDownload=\n" + "\n".join(UIDS) + "\n")
    rows = "".join(f"{uid},2\n" for uid in UIDS)
    (tmp_path / "metadata.csv").write_text("Series UID,Number of Images\n" + rows)
    return tmp_path


def server(uid, folder, slices=2):
    archive = folder / f"{uid}.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for number in range(slices):
            packed.writestr(f"1-{number}.dcm", bytes(128) + f"DICM slice {number}".encode())
    return archive


def test_all_series_arrive_and_a_second_call_fetches_nothing(collection):
    said = download.download_collection("", str(collection), fetch=server)
    assert "0 series were in place, 3 fetched" in said
    assert sorted(p.name for p in (collection / "Lung-PET-CT-Dx").iterdir()) == UIDS
    assert "3 series were in place, 0 fetched" in download.download_collection("", str(collection), fetch=server)


def test_incomplete_series_is_refused_and_tried_again(collection):
    with pytest.raises(runs.InputError, match=r"3 series failed, first: series 1.2.3 has 1 images, expected 2"):
        download.download_collection("", str(collection), fetch=lambda uid, folder: server(uid, folder, slices=1))
    assert list((collection / "Lung-PET-CT-Dx").iterdir()) == []
    assert "3 fetched" in download.download_collection("", str(collection), fetch=server)


def test_damaged_archive_is_refused(collection):
    def broken(uid, folder):
        archive = server(uid, folder)
        archive.write_bytes(archive.read_bytes().replace(b"slice 1", b"sl1ce 1"))
        return archive

    with pytest.raises(OSError, match="arrived damaged"):
        download.download_series("1.2.3", collection, 2, broken)
    assert not (collection / "1.2.3").exists()


def sending(files):
    """A server whose archives hold these files, name -> content."""
    def fetch(uid, folder):
        with zipfile.ZipFile(folder / f"{uid}.zip", "w", zipfile.ZIP_DEFLATED) as packed:
            for name, content in files.items():
                packed.writestr(name, content)
        return folder / f"{uid}.zip"
    return fetch


IMAGE = bytes(128) + b"DICM and more"


def test_only_images_and_the_licence_are_unpacked(tmp_path):
    sent = {"1-1.dcm": IMAGE, "sub/2.dcm": IMAGE, "../../out.dcm": IMAGE, "LICENSE": "CC BY", "pandas.py": "print(1)"}
    download.download_series("1.2.3", tmp_path, None, sending(sent))
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"1.2.3/1-1.dcm", "1.2.3/LICENSE", "1.2.3/out.dcm", "1.2.3/sub/2.dcm"}


def test_what_is_no_image_is_no_series(tmp_path):
    with pytest.raises(OSError, match="arrived damaged: 1-1.dcm is no DICOM file"):
        download.download_series("1.2.3", tmp_path, 1, sending({"1-1.dcm": "<html>not today</html>"}))
    assert not list(tmp_path.iterdir())


def test_a_series_cannot_fill_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MOST_BYTES", 1_000_000)
    with pytest.raises(OSError, match="it unpacks to 1,000,139 bytes, allowed are 1,000,000"):
        download.download_series("1.2.3", tmp_path, 1, sending({"1-1.dcm": IMAGE + bytes(1_000_000 - 2)}))
    assert not list(tmp_path.iterdir())


def test_real_images_do_not_go_among_phantoms(collection):
    (collection / "phantom.json").write_text("{}")
    with pytest.raises(runs.InputError, match="holds phantoms: choose another folder"):
        download.download_collection("", str(collection), fetch=server)


def test_leftovers_of_an_interrupted_download_are_forgotten(collection):
    gone = subprocess.Popen(["true"])
    gone.wait()
    here = runs.host_mark()
    left, filling, own = (collection / "Lung-PET-CT-Dx" / f".incoming-{name}" / "unpacked"
                          for name in (f"{here}{gone.pid}-abc", f"{here}{os.getppid()}-abc", "notes"))
    for folder in (left, filling, own):
        folder.mkdir(parents=True)
    download.download_collection("", str(collection), fetch=server)
    assert not left.parent.exists() and filling.exists() and own.exists()


def test_limit_fetches_only_so_many(collection):
    assert "1 fetched" in download.download_collection("", str(collection), limit=1, fetch=server)


def test_a_negative_limit_is_refused_and_fetches_nothing(collection):
    with pytest.raises(runs.InputError, match="limit is -1, expected 0 for all series, or more"):
        download.download_collection("", str(collection), limit=-1, fetch=server)
    assert not (collection / "Lung-PET-CT-Dx").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_ends_the_download_at_the_first_series(collection, code):
    asked = []

    def full(uid, folder):
        asked.append(uid)
        raise OSError(code, os.strerror(code))

    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        download.download_collection("", str(collection), fetch=full)
    assert caught.value.errno == code and asked == UIDS[:1]
    assert list((collection / "Lung-PET-CT-Dx").iterdir()) == []


SIX = [f"1.2.{number}" for number in range(6)]


@pytest.mark.parametrize(("arrive", "tried"), [
    ([], [*SIX[:3], SIX[5]]), (SIX[:1], SIX), (SIX[2:3], SIX), (SIX[3:], [*SIX[:3], SIX[5], *SIX[3:5]]),
    (SIX[5:], [*SIX[:3], SIX[5], *SIX[3:5]])], ids=["none", "first", "third", "all but three", "last"])
def test_without_a_network_not_every_series_is_tried(collection, arrive, tried):
    (collection / "c.tcia").write_text("ListOfSeriesToDownload=\n" + "\n".join(SIX) + "\n")
    asked = []

    def weak(uid, folder):
        asked.append(uid)
        if uid in arrive:
            return server(uid, folder)
        raise OSError(f"series {uid} did not arrive")

    with pytest.raises(runs.InputError) as caught:
        download.download_collection("", str(collection), fetch=weak)
    assert asked == tried
    assert str(caught.value).startswith(f"{6 - len(arrive)} series failed" if arrive else
                                        "none of 4 series arrived, so the others were not tried; series 1.2.0 did not")


@pytest.mark.parametrize("content", [
    b"patient,weight\n1,70\n", b"", b"\xff\xfe\x00", b"Series UID,Number of Images\n1.2.3,two\n",
    b"Series UID,Number of Images\n1.2.3,\n", b'Series UID,Number of Images\n"1.2.3,2\n'])
def test_a_table_that_is_not_the_collections_is_refused_by_name(collection, content):
    (collection / "metadata.csv").write_bytes(content)
    words = "metadata.csv is not the collection's table, expected columns Series UID and Number of Images, got: "
    with pytest.raises(runs.InputError, match=words) as caught:
        download.download_collection("", str(collection), fetch=server)
    assert "\n" not in str(caught.value)


def test_members_that_point_outside_stay_inside(collection):
    def hostile(uid, folder):
        archive = folder / f"{uid}.zip"
        with zipfile.ZipFile(archive, "w") as packed:
            packed.writestr("../../../escaped.dcm", IMAGE)
            packed.writestr("1-1.dcm", IMAGE)
        return archive

    download.download_series("1.2.3", collection, None, hostile)
    outside = [p for p in collection.rglob("escaped.dcm") if "1.2.3" not in p.parts]
    assert outside == [] and not (collection.parent / "escaped.dcm").exists()


@pytest.mark.parametrize(("text", "message"), [("", "names no series"), ("a=b\n", "names no series")])
def test_manifest_without_series_is_refused(tmp_path, text, message):
    (tmp_path / "x.tcia").write_text(text)
    with pytest.raises(runs.InputError, match=message):
        download.read_manifest(tmp_path / "x.tcia")


def test_real_manifest(real_data):
    uids = download.read_manifest(real_data / "Lung-PET-CT-Dx-NBIA-Manifest-122220.tcia")
    expected = download.expected_images(real_data)
    assert len(uids) == 1295 and set(uids) == set(expected) and sum(expected.values()) == 251_135


@pytest.mark.parametrize("raw", [
    "\ufeff1.2.3\n1.2.4\n".encode(), "1.2.3\n1.2.4\n".encode("utf-16"), b'"1.2.3",\r\n..\r\n1.2.4;\r\n',
    b"ListOfSeriesToDownload=\n1.2.3\n\n1.2.4"])
def test_a_manifest_as_editors_and_spreadsheets_save_it(tmp_path, raw):
    (tmp_path / "m.tcia").write_bytes(raw)
    assert download.read_manifest(tmp_path / "m.tcia") == ["1.2.3", "1.2.4"]


def test_a_uid_that_is_none_is_not_passed_over(tmp_path):
    (tmp_path / "m.tcia").write_text("a=b\n1.2.3\n1.2.x4\n")
    with pytest.raises(runs.InputError, match="line 3: '1.2.x4' is no Series Instance UID"):
        download.read_manifest(tmp_path / "m.tcia")


def test_a_damaged_member_costs_its_series_only(collection):
    def squeezed(uid, folder):
        archive = folder / f"{uid}.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for number in range(2):
                packed.writestr(f"1-{number}.dcm", IMAGE + bytes(1000))
        raw = bytearray(archive.read_bytes())
        if uid == "1.2.3":
            raw[30 + len("1-0.dcm")] = 0xFF                # no deflated block begins so
        archive.write_bytes(raw)
        return archive

    with pytest.raises(runs.InputError, match="1 series failed, first: series 1.2.3 arrived damaged"):
        download.download_collection("", str(collection), fetch=squeezed)
    assert (collection / "Lung-PET-CT-Dx" / "1.2.5").is_dir()


def test_a_second_download_leaves_the_first_alone(collection):
    def meanwhile(uid, folder):
        runs.clear_dead(folder.parent, download.WAITING)   # what every download begins with
        if uid == "1.2.4":
            (folder.parent / uid).mkdir()                  # the other one was quicker
        return server(uid, folder)

    assert "3 fetched" in download.download_collection("", str(collection), fetch=meanwhile)
