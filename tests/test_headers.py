"""The header reader: the small parser and pydicom give one answer on any bytes, within bounds of time and memory."""

import io
import json
import math
import os
import struct
import subprocess
import sys
import warnings
import zlib

import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import uid as uids
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.errors import InvalidDicomError

from lungct import headers
from lungct.headers import BadFile, FileProblem, read_header, read_header_pydicom

PLAIN = headers._Decoding()
SYNTAXES = [uids.ImplicitVRLittleEndian, uids.ExplicitVRLittleEndian]


# ---- converters ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("raw, value", [
    (b"1.5", 1.5), (b" 0.8417 ", 0.8417), (b"-2\0", -2), (b"1\\2", 1), (b"1e3", 1000),
    (b"", None), (b" ", None), (b"abc", None), (b"1,5", None), (b"nan", None), (b"inf", None), (b"1_0", None),
])
def test_number(raw, value):
    assert headers._number(raw, PLAIN) == value


@pytest.mark.parametrize("raw, value", [
    (b"12 ", 12), (b"3.000000", 3), (b"-7", -7), (b"3.5", None), (b"9" * 40, None), (b"", None)])
def test_whole(raw, value):
    assert headers._whole(raw, PLAIN) == value


@pytest.mark.parametrize("raw, value", [
    (b"061Y", 61), (b"018M", 1.5), (b"061Y ", 61), (b"Y", None), (b"061", None), (b"", None)])
def test_age(raw, value):
    assert headers._age(raw, PLAIN) == value


def test_text_keeps_several_values_and_reads_other_alphabets():
    assert headers._text(b"ORIGINAL \\PRIMARY\0", PLAIN) == "ORIGINAL\\PRIMARY"
    assert headers._text("Müller".encode("latin-1"), headers._Decoding(("latin_1",))) == "Müller"
    assert headers._text("肺".encode(), headers._Decoding(("UTF8",))) == "肺"
    assert headers._text(b" \0", PLAIN) is None


@given(st.binary(max_size=40))
def test_converters_never_raise(raw):
    for convert in (headers._number, headers._whole, headers._age, headers._short, headers._stored_value):
        value = convert(raw, PLAIN)
        assert value is None or math.isfinite(value)


def test_names_of_elements():
    assert headers.tag_name("weight_kg") == "PatientWeight (0010,1030)"
    assert headers.tag_name("injection_time") == "RadiopharmaceuticalStartTime (0018,1072)"
    assert headers.tag_name("tracer_items") == "RadiopharmaceuticalInformationSequence (0054,0016)"
    assert headers.tag_name("ge_scan_datetime") == "GEMS_PETD_01 (0009,xx0D)"
    assert all(headers.tag_name(column) for column in headers._CELLS)


# ---- made-up files ---------------------------------------------------------------------------------------------------

def item(**elements):
    made = Dataset()
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    return made


def image(number=1, **changes):
    """A PET image with nested sequences, private blocks and all the columns an index has a name for."""
    data = item(
        SpecificCharacterSet="ISO_IR 100", ImageType=["ORIGINAL", "PRIMARY", "AXIAL"], Modality="PT",
        SOPClassUID=uids.PositronEmissionTomographyImageStorage, SOPInstanceUID=f"1.2.3.{1000 + number}",
        StudyInstanceUID="1.2.1", SeriesInstanceUID="1.2.2", PatientID="Toy", PatientSize=1.75, PatientWeight=70,
        PatientAge="061Y", InstanceNumber=number, ImagePositionPatient=[-250, -250.5, 5 * number],
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[0.8, 0.5], SliceThickness=1.25,
        Rows=4, Columns=4, BitsAllocated=16, BitsStored=16, HighBit=15, SamplesPerPixel=1, PixelRepresentation=1,
        PixelPaddingValue=-2000, RescaleSlope=1.5, RescaleIntercept=0, Units="BQML", DecayCorrection="START",
        DecayFactor=1.02, FrameReferenceTime=1234.5, ActualFrameDuration=180000, SeriesTime="101112.5",
        PhotometricInterpretation="MONOCHROME2", PixelData=bytes(32))
    data["PixelData"].VR = "OW"
    data.ReferencedImageSequence = [item(ReferencedSOPInstanceUID="1.2.9"), item(PurposeOfReferenceCodeSequence=[
        item(CodeValue="x", CodeMeaning="deep")])]
    data.RadiopharmaceuticalInformationSequence = [item(
        Radiopharmaceutical="FDG", RadiopharmaceuticalStartTime="090000", RadionuclideTotalDose=350e6,
        RadionuclideHalfLife=6586.2, RadionuclideCodeSequence=[item(CodeValue="C-111A1")])]
    data.add_new(0x00090010, "LO", "GEMS_PETD_01")
    data.add_new(0x0009100D, "DT", "20240102101112.00")
    data.add_new(0x70530010, "LO", "Someone else")
    data.add_new(0x70530011, "LO", "Philips PET Private Group")
    data.add_new(0x70531100, "DS", "0.5")
    data.add_new(0x70531109, "DS", "2.25")
    for keyword, value in changes.items():
        if value is None:
            data.pop(keyword, None)
        else:
            setattr(data, keyword, value)
    return data


def encoded(data, syntax=uids.ExplicitVRLittleEndian, undefined=False):
    """The bytes of a file; with every sequence of undefined length if asked."""
    if undefined:
        for element in data.iterall():
            if element.VR == "SQ":
                element.is_undefined_length = element.value.is_undefined_length = True
                for each in element.value:
                    each.is_undefined_length_sequence_item = True
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True, implicit_vr=syntax == uids.ImplicitVRLittleEndian,
                 little_endian=syntax != uids.ExplicitVRBigEndian)
    return stream.getvalue()


BASES = [encoded(image(), syntax, undefined) for syntax in SYNTAXES for undefined in (False, True)]


def answer(read, path):
    """The row, or the refusal in words."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read(path)
        except Exception as error:
            return type(error), str(error)


def is_common(path):
    try:
        headers._Splitter().split(str(path), os.stat(path).st_size)
    except headers._Uncommon:
        return False
    return True


def assert_one_answer(path):
    expected = answer(read_header_pydicom, path)
    assert answer(read_header, path) == expected
    return expected


def in_bulk(folder, names):
    table = headers.read_headers(folder, [(name, os.stat(folder / name).st_size, 7) for name in names])
    assert sorted(table["path"].to_pylist()) == sorted(names) and set(table["changed_ns"].to_pylist()) <= {7}
    return {row["path"]: row for row in table.to_pylist()}


def assert_bulk_equals_pydicom(folder, names):
    rows = in_bulk(folder, names)
    for name in names:
        expected = answer(read_header_pydicom, folder / name)
        if isinstance(expected, dict):
            assert {column: rows[name][column] for column in headers.HEADER_DTYPES} == expected
            assert rows[name]["reason"] is None
        else:
            assert rows[name]["reason"] in set(FileProblem)
            if expected[0] is BadFile:
                assert f"{rows[name]['reason']}: {rows[name]['detail']}" == expected[1]


# ---- what a header tells ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content", BASES)
def test_all_columns(tmp_path, content):
    (tmp_path / "a.dcm").write_bytes(content)
    assert is_common(tmp_path / "a.dcm")
    row = assert_one_answer(tmp_path / "a.dcm")
    assert list(row) == list(headers.HEADER_DTYPES)
    expected = {
        "size_m": 1.75, "weight_kg": 70, "age_years": 61, "decay_factor": 1.02, "frame_reference_time_ms": 1234.5,
        "frame_duration_ms": 180000, "philips_suv_factor": 0.5, "philips_activity_factor": 2.25,
        "ge_scan_datetime": "20240102101112.00", "radiopharmaceutical": "FDG", "injection_time": "090000",
        "radionuclide_dose_bq": 350e6, "half_life_s": 6586.2, "pixel_padding_value": -2000, "rows": 4,
        "image_type": "ORIGINAL\\PRIMARY\\AXIAL", "position_mm": [-250, -250.5, 5], "frame_positions_mm": None,
        "pixel_offset": len(content) - 32, "file_bytes": len(content)}
    assert {column: row[column] for column in expected} == expected


def test_private_values_are_read_for_pet_only(tmp_path):
    (tmp_path / "a.dcm").write_bytes(encoded(image(Modality="CT")))
    row = assert_one_answer(tmp_path / "a.dcm")
    assert row["philips_suv_factor"] is None and row["ge_scan_datetime"] is None


def test_private_bytes_of_other_makers(tmp_path):
    data = image(Modality="CT")
    data[0x00090010].value = "ANOTHER MAKER"
    data.add_new(0x0009100D, "OB", b"\xff\xfe\x1b\x00")
    (tmp_path / "a.dcm").write_bytes(encoded(data))
    assert is_common(tmp_path / "a.dcm") and isinstance(assert_one_answer(tmp_path / "a.dcm"), dict)
    data = image(SpecificCharacterSet="ISO_IR 192")
    data.add_new(0x0009100D, "LO", "später")
    (tmp_path / "a.dcm").write_bytes(encoded(data))
    assert not is_common(tmp_path / "a.dcm")
    assert assert_one_answer(tmp_path / "a.dcm")["ge_scan_datetime"] == "später"


def test_real_files(real_data):
    files = sorted(p for p in (real_data / "Lung-PET-CT-Dx").rglob("*.dcm"))
    for path in files[::10]:
        assert is_common(path) and isinstance(assert_one_answer(path), dict)
    for folder in {path.parent for path in files}:
        assert_bulk_equals_pydicom(folder, [path.name for path in files if path.parent == folder][:40])


def test_header_agrees_with_pydicoms_own_values(real_data):
    for path in sorted((real_data / "Lung-PET-CT-Dx").rglob("*.dcm"))[::25]:
        row, dataset = read_header(path), pydicom.dcmread(path, stop_before_pixels=True)
        for column, (keyword, _) in headers._HEADER.items():
            element = dataset.get(keyword)
            if column == "age_years":
                expected = float(str(element)[:3])
            elif element in (None, ""):
                expected = None
            elif isinstance(element, pydicom.multival.MultiValue):
                expected = "\\".join(map(str, element)) if column == "image_type" else list(map(float, element))
            else:
                expected = element
            assert row[column] == expected, (path, column)


def test_phantoms(phantom_dir):
    for folder in sorted({path.parent for path in phantom_dir.rglob("*.dcm")})[:25]:
        assert_bulk_equals_pydicom(folder, sorted(path.name for path in folder.iterdir()))


# ---- what is not common goes to pydicom ------------------------------------------------------------------------------

@pytest.mark.parametrize("content", [
    encoded(image(), uids.ExplicitVRBigEndian), encoded(image(), uids.DeflatedExplicitVRLittleEndian),
    encoded(image(PatientID="Müller")), encoded(image(SpecificCharacterSet="ISO 2022 IR 87")),
    encoded(image(SOPClassUID=uids.EnhancedCTImageStorage)), encoded(image(PatientComments="x" * 400_000)),
    BASES[0].replace(b"Toy ", b"T\x1by "), BASES[2].replace(b"DS", b"ZZ", 1),
], ids=["big endian", "deflated", "umlaut", "other alphabet", "enhanced", "long", "escape", "odd letters"])
def test_uncommon(tmp_path, content):
    (tmp_path / "a.dcm").write_bytes(content)
    assert not is_common(tmp_path / "a.dcm")
    assert_one_answer(tmp_path / "a.dcm")
    assert_bulk_equals_pydicom(tmp_path, ["a.dcm"])


@pytest.mark.parametrize("syntax", [*SYNTAXES, uids.JPEG2000Lossless])
def test_headers_longer_than_the_first_read(tmp_path, syntax):
    content = encoded(image(PatientComments="x" * 20_000, PixelData=pydicom.encaps.encapsulate([b"jpeg"])
                            if syntax.is_compressed else bytes(32)), syntax)
    (tmp_path / "a.dcm").write_bytes(content)
    assert is_common(tmp_path / "a.dcm") and isinstance(assert_one_answer(tmp_path / "a.dcm"), dict)


def test_new_alphabets_and_old_friends(tmp_path):
    (tmp_path / "a.dcm").write_bytes(encoded(image(PatientID="Müller")))
    assert assert_one_answer(tmp_path / "a.dcm")["patient_id"] == "Müller"
    for name in ("ISO_IR 192", "ISO_IR 6", ""):
        (tmp_path / "a.dcm").write_bytes(encoded(image(SpecificCharacterSet=name)))
        assert assert_one_answer(tmp_path / "a.dcm")["patient_id"] == "Toy"


# ---- enhanced objects ------------------------------------------------------------------------------------------------

def frame(z, slope=2, orientation=(1, 0, 0, 0, 1, 0)):
    return item(PlanePositionSequence=[item(ImagePositionPatient=[1, 2, z])],
                PlaneOrientationSequence=[item(ImageOrientationPatient=list(orientation))],
                PixelValueTransformationSequence=[item(RescaleSlope=slope, RescaleIntercept=-1024)])


def enhanced(frames, **changes):
    shared = [item(PixelMeasuresSequence=[item(PixelSpacing=[0.8, 0.5], SliceThickness=2)])]
    absent = dict.fromkeys(("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
                            "RescaleSlope", "RescaleIntercept"))
    return image(**{
        "SOPClassUID": uids.EnhancedCTImageStorage, "Modality": "CT", "NumberOfFrames": len(frames), **absent,
        "PixelData": bytes(32 * len(frames)), "SharedFunctionalGroupsSequence": shared,
        "PerFrameFunctionalGroupsSequence": frames} | changes)


@pytest.mark.parametrize("undefined", [False, True])
@pytest.mark.parametrize("uid", [uids.EnhancedCTImageStorage, uids.LegacyConvertedEnhancedCTImageStorage,
                                 uids.EnhancedPETImageStorage, uids.LegacyConvertedEnhancedPETImageStorage])
def test_enhanced(tmp_path, uid, undefined):
    (tmp_path / "a.dcm").write_bytes(encoded(enhanced([frame(0), frame(2.5)], SOPClassUID=uid), undefined=undefined))
    row = assert_one_answer(tmp_path / "a.dcm")
    assert row["frame_positions_mm"] == [[1, 2, 0], [1, 2, 2.5]] and row["frames"] == 2
    assert row["orientation"] == [1, 0, 0, 0, 1, 0] and row["pixel_spacing_mm"] == [0.8, 0.5]
    assert (row["slice_thickness_mm"], row["rescale_slope"], row["rescale_intercept"]) == (2, 2, -1024)
    assert in_bulk(tmp_path, ["a.dcm"])["a.dcm"]["frame_positions_mm"] == [[1, 2, 0], [1, 2, 2.5]]


def test_the_unit_of_an_enhanced_image_is_read(tmp_path):
    frames = [frame(0), frame(2.5)]
    for each in frames:
        each.PixelValueTransformationSequence[0].RescaleType = "Z_EFF"
    (tmp_path / "a.dcm").write_bytes(encoded(enhanced(frames)))
    assert assert_one_answer(tmp_path / "a.dcm")["rescale_type"] == "Z_EFF"


def test_enhanced_values_that_differ_stay_missing(tmp_path):
    frames = [frame(0), frame(1, slope=3, orientation=(0, 1, 0, 0, 0, 1))]
    (tmp_path / "a.dcm").write_bytes(encoded(enhanced(frames)))
    row = assert_one_answer(tmp_path / "a.dcm")
    assert row["rescale_slope"] is None and row["orientation"] is None and row["rescale_intercept"] == -1024
    del frames[1].PlanePositionSequence
    (tmp_path / "a.dcm").write_bytes(encoded(enhanced(frames)))
    assert assert_one_answer(tmp_path / "a.dcm")["frame_positions_mm"] is None


def test_of_one_frame_everything_may_be_shared(tmp_path):
    whole = frame(7)
    for each in (enhanced([whole]), enhanced([item()])):
        if not len(each.PerFrameFunctionalGroupsSequence[0]):
            shared, = each.SharedFunctionalGroupsSequence
            for name in ("PlanePositionSequence", "PlaneOrientationSequence", "PixelValueTransformationSequence"):
                setattr(shared, name, getattr(whole, name))
        (tmp_path / "a.dcm").write_bytes(encoded(each))
        row = assert_one_answer(tmp_path / "a.dcm")
        assert row["position_mm"] == [1, 2, 7] and row["frame_positions_mm"] == [[1, 2, 7]] and row["frames"] == 1
        assert row["orientation"] == [1, 0, 0, 0, 1, 0]


def test_functional_groups_of_other_classes_are_left(tmp_path):
    (tmp_path / "a.dcm").write_bytes(encoded(enhanced([frame(0)], SOPClassUID=uids.CTImageStorage)))
    row = assert_one_answer(tmp_path / "a.dcm")
    assert row["orientation"] is None and row["frame_positions_mm"] is None


# ---- one answer, whatever the bytes ----------------------------------------------------------------------------------

def spans(content):
    """(start, stop) of each element in front of the pixels."""
    begin = 144 + struct.unpack_from("<L", content, 140)[0]
    explicit = uids.ExplicitVRLittleEndian.encode() + b"\0" in content[:begin]
    meta = headers._walk(content, 144, begin, True, headers._META, {}, {})[1]
    return meta, headers._walk(content, begin, len(content), explicit, headers._TOP, {}, {})[1]


SPANS = [spans(content) for content in BASES]
TRICKS = ["flip", "cut", "delete", "twice", "swap", "length", "empty", "nest", "tag", "noise"]


def nested(element, at, kind):
    """A sequence, of defined or undefined length, around an element."""
    whole = struct.pack("<4sL", headers._ITEM_START, len(element)) + element
    if kind % 2:
        whole = (struct.pack("<4sL", headers._ITEM_START, 0xFFFFFFFF) + element
                 + struct.pack("<4sL", headers._ITEM_END, 0))
    size, end = (0xFFFFFFFF, struct.pack("<4sL", headers._SEQUENCE_END, 0)) if kind & 2 else (len(whole), b"")
    tag = headers._key((0x00081140, 0x00540016, 0x00091099, 0x00100020)[at % 4])
    return tag + (b"SQ\0\0" if kind & 4 else b"") + struct.pack("<L", size) + whole + end


def damage(content, elements, trick, where, value):
    """One change to a file's bytes; `where` and `value` choose which."""
    start, stop = elements[where % len(elements)]
    change = {
        "flip": lambda: content[:132 + where % 900] + bytes([value % 256]) + content[133 + where % 900 :],
        "cut": lambda: content[: 100 + where % 1500],
        "delete": lambda: content[:start] + content[stop:],
        "twice": lambda: content[:stop] + content[start:stop] + content[stop:],
        "swap": lambda: content[:start] + content[stop : stop + 24] + content[start:stop] + content[stop + 24 :],
        "length": lambda: content[: start + 4 + value % 6] + struct.pack("<H", (value * 7919) % 65536)
        + content[start + 6 + value % 6 :],
        "empty": lambda: content[: start + 4] + struct.pack("<L", (0, 0xFFFFFFFF, 1 << 30)[value % 3])
        + content[start + 8 :],
        "nest": lambda: content[:start] + nested(content[start:stop], where, value) + content[stop:],
        "tag": lambda: content[:start] + headers._key((0x7FE00010, 0xFFFEE00D, 0x00080005, 0x00020010, 0x00000002,
                                                       0x00540016, 0x00280103, 0x52009230)[value % 8])
        + content[start + 4 :],
        "noise": lambda: content[:start] + zlib.compress(content[: value + 9])[: 8 + value % 40] + content[stop:],
    }
    return change[trick]()


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(base=st.integers(0, 3), changes=st.lists(st.tuples(
    st.sampled_from(TRICKS), st.booleans(), st.integers(0, 2000), st.integers(0, 999)), min_size=1, max_size=4))
def test_damaged_files_have_one_answer(tmp_path, base, changes):
    content = BASES[base]
    for trick, meta, where, value in changes:
        elements = SPANS[base][0] if meta and trick not in ("cut", "flip") else SPANS[base][1]
        content = damage(content, elements, trick, where, value)
    (tmp_path / "mutant.dcm").write_bytes(content)
    assert_one_answer(tmp_path / "mutant.dcm")
    for number in range(3):                                # siblings, so that the parser remembers runs
        (tmp_path / f"{number}.dcm").write_bytes(encoded_sibling(base, number))
    assert_bulk_equals_pydicom(tmp_path, ["0.dcm", "1.dcm", "2.dcm", "mutant.dcm"])


SIBLINGS = {}


def encoded_sibling(base, number):
    if (base, number) not in SIBLINGS:
        SIBLINGS[base, number] = encoded(image(number), SYNTAXES[base // 2], bool(base % 2))
    return SIBLINGS[base, number]


def test_runs_are_used_and_never_believed(tmp_path):
    names = [f"{number:03}.dcm" for number in range(40)]
    for number, name in enumerate(names):
        changes = {"RadionuclideTotalDose": 1e6 * number, "PatientWeight": 70 + (number > 20)}
        data = image(number, PatientWeight=changes["PatientWeight"])
        data.RadiopharmaceuticalInformationSequence[0].RadionuclideTotalDose = changes["RadionuclideTotalDose"]
        (tmp_path / name).write_bytes(encoded(data, undefined=number % 7 == 0))
    splitter = headers._Splitter()
    for name in names:
        splitter.split(str(tmp_path / name), os.stat(tmp_path / name).st_size)
    assert len(splitter.memory[True].runs) > 3
    assert_bulk_equals_pydicom(tmp_path, names)
    rows = in_bulk(tmp_path, names)
    assert [rows[name]["radionuclide_dose_bq"] for name in names] == [1e6 * number for number in range(40)]
    assert [rows[name]["weight_kg"] for name in names] == [70 + (number > 20) for number in range(40)]


def test_runs_hold_only_values_of_their_own(tmp_path):
    """Units (0054,1001) belong to group 54, as the tracer does, and not to the run that the tracer is in."""
    names = [f"{number:03}.dcm" for number in range(8)]
    for number, name in enumerate(names):
        changes = {"Units": ("BQML", "CNTS", None)[number % 3], "NumberOfSlices": number}
        (tmp_path / name).write_bytes(encoded(image(number, **changes)))
    assert_bulk_equals_pydicom(tmp_path, names)
    splitter = headers._Splitter()
    for name in names:
        splitter.split(str(tmp_path / name), os.stat(tmp_path / name).st_size)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.name)
@pytest.mark.parametrize("undefined", [False, True])
@pytest.mark.parametrize("count, told", [(None, None), (0, None), (1, 1), (2, 2), (3, 3)])
def test_injections_are_counted(tmp_path, syntax, undefined, count, told):
    names = [f"{number}.dcm" for number in range(3)]        # several, so that runs are used
    for number, name in enumerate(names):
        data = image(number)
        items = [item(RadionuclideTotalDose=1e6 * (k + 1)) for k in range(count or 0)]
        data.RadiopharmaceuticalInformationSequence = items
        if count is None:
            del data.RadiopharmaceuticalInformationSequence
        (tmp_path / name).write_bytes(encoded(data, syntax, undefined))
        assert is_common(tmp_path / name)
        row = assert_one_answer(tmp_path / name)
        assert row["tracer_items"] == told and row["radionuclide_dose_bq"] == (1e6 if count else None)
    assert_bulk_equals_pydicom(tmp_path, names)


# ---- hostile files ---------------------------------------------------------------------------------------------------

HEAD = BASES[2][: 144 + struct.unpack_from("<L", BASES[2], 140)[0]]        # explicit, up to the end of the meta group
DEEP = (b"\x08\0\x40\x11SQ\0\0" + b"\xff" * 4 + b"\xfe\xff\0\xe0" + b"\xff" * 4)
DEEP_TRACER = (b"\x54\0\x16\0SQ\0\0" + b"\xff" * 4 + b"\xfe\xff\0\xe0" + b"\xff" * 4)


def defined_nest(levels):
    """Sequences of defined length in one another, around nothing."""
    inner = b""
    for _ in range(levels):
        inner = b"\x54\0\x16\0SQ\0\0" + struct.pack("<L", len(inner) + 8) + b"\xfe\xff\0\xe0" \
            + struct.pack("<L", len(inner)) + inner
    return inner


def deflated_bomb(front=b""):
    """Two gigabytes of zeros in two megabytes, behind these elements."""
    pack = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    begin = pack.compress(front) + pack.flush(zlib.Z_FULL_FLUSH)
    block = pack.compress(bytes(1 << 20)) + pack.flush(zlib.Z_FULL_FLUSH)      # may be repeated
    return DEFLATED[: behind_meta(DEFLATED)] + begin + block * 2000 + pack.flush()


def behind_meta(content):
    return 144 + struct.unpack_from("<L", content, 140)[0]


DEFLATED = encoded(image(), uids.DeflatedExplicitVRLittleEndian)
ELEMENTS = zlib.decompress(DEFLATED[behind_meta(DEFLATED):], -zlib.MAX_WBITS)      # the same, inflated


HOSTILE = {
    "declares more than there is": HEAD + b"\x09\0\x01\x10OB\0\0" + struct.pack("<L", 1 << 30) + b"x",
    "cut in a private element": BASES[2][: BASES[2].index(b"\xe0\x7f\x10\0")] + b"\x99\x7f\1\x10OB\0\0\0\0\0\x40x",
    "wants more than there is": HEAD + b"\x10\0\x20\0UT\0\0" + struct.pack("<L", 1 << 30) + b"x",
    "deep": HEAD + DEEP * 100_000,
    "deep tracer": HEAD + DEEP_TRACER * 100_000,
    "deep and defined": HEAD + defined_nest(3000),
    "zeros": HEAD + bytes(8 << 20),
    "meta group without end": HEAD[:144] + b"\x02\0\x02\x01OB\0\0" + struct.pack("<L", 0xFFFFFFF0) + b"y" * 100_000,
    "many items": HEAD + DEEP_TRACER + b"\xfe\xff\0\xe0\0\0\0\0" * 400_000,
    "zero byte": b"", "text": b"text that calls itself DICOM\n" * 50, "four letters": bytes(128) + b"DICM",
}


def measured(folder, limit_mb=900, seconds=60):
    """Index a folder in a process of its own with little memory; its rows by path."""
    code = ("import sys, json, os, resource\n"
            "from lungct import headers\n"
            f"resource.setrlimit(resource.RLIMIT_AS, ({limit_mb << 20}, {limit_mb << 20}))\n"
            "folder = sys.argv[1]\n"
            "files = [(n, os.stat(os.path.join(folder, n)).st_size, 0) for n in sorted(os.listdir(folder))]\n"
            "table = headers.read_headers(folder, files).select(['path', 'reason', 'detail', 'patient_id'])\n"
            "print(json.dumps(table.to_pylist()))")
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-2000:]
    return {row["path"]: row for row in json.loads(done.stdout)}


def test_hostile_files_cost_little(tmp_path):
    for name, content in HOSTILE.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "deflated bomb").write_bytes(deflated_bomb())
    (tmp_path / "bomb behind the pixels").write_bytes(deflated_bomb(ELEMENTS))
    (tmp_path / "bomb of pixels").write_bytes(deflated_bomb(ELEMENTS[:-36] + (2000 << 20).to_bytes(4, "little")))
    (tmp_path / "good").write_bytes(BASES[2])
    with open(tmp_path / "a private gigabyte", "wb") as stream:               # it is there, and is jumped over
        stream.write(HEAD + b"\x09\0\x01\x10OB\0\0" + struct.pack("<L", 1 << 30))
        stream.seek(1 << 30, os.SEEK_CUR)
        stream.write(BASES[2][len(HEAD) :])
    with open(tmp_path / "a wanted gigabyte", "wb") as stream:
        stream.write(HEAD + b"\x10\0\x20\0UT\0\0" + struct.pack("<L", 1 << 30))
        stream.truncate(2 << 30)
    rows = measured(tmp_path)
    assert rows["good"]["reason"] is None and rows["a private gigabyte"]["reason"] is None
    assert rows["a private gigabyte"]["patient_id"] == "Toy"
    assert rows["a wanted gigabyte"]["detail"] == "the header is longer than 64 MB"
    assert rows["cut in a private element"]["reason"] == "truncated"
    assert rows["zero byte"]["reason"] == "zero byte" and rows["text"]["reason"] == "not DICOM"
    assert rows["deep"]["reason"] == rows["deep tracer"]["reason"] == rows["zeros"]["reason"] == "unreadable"
    for name in ("bomb behind the pixels", "bomb of pixels"):
        assert rows[name]["reason"] == "unreadable" and "its image needs 32" in rows[name]["detail"]
    for name in [*HOSTILE, "deflated bomb"]:
        assert rows[name]["reason"] in set(FileProblem) and rows[name]["detail"], name
        assert "MemoryError" not in rows[name]["detail"], name


def test_hostile_files_one_answer(tmp_path):
    for name, content in HOSTILE.items():
        (tmp_path / name).write_bytes(content[:200_000])
        assert not isinstance(assert_one_answer(tmp_path / name), dict)


def test_named_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadFile, match="zero byte"):
        read_header(tmp_path / "pipe")


def test_deflated(tmp_path):
    content = encoded(image(), uids.DeflatedExplicitVRLittleEndian)
    (tmp_path / "a.dcm").write_bytes(content)
    row = read_header(tmp_path / "a.dcm")
    assert row["pixel_offset"] is None and row["patient_id"] == "Toy" and row["radiopharmaceutical"] == "FDG"
    assert row["philips_suv_factor"] == 0.5


def test_refusals(tmp_path):
    with pytest.raises(InvalidDicomError):
        (tmp_path / "a").write_bytes(b"x" * 200)
        read_header(tmp_path / "a")
    (tmp_path / "b").write_bytes(BASES[2].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.9.9.9\0"))
    with pytest.raises(BadFile, match=r"unreadable: TransferSyntaxUID \(0002,0010\) is 1.2.840.10008.9.9.9"):
        read_header(tmp_path / "b")
    (tmp_path / "c").write_bytes(BASES[2][:-8])
    with pytest.raises(BadFile, match="truncated: pixel data has 24 of 32 bytes"):
        read_header(tmp_path / "c")
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "nowhere")


def test_bad_file_takes_any_problem():
    from enum import StrEnum

    class Other(StrEnum):
        ODD = "odd"

    error = BadFile(Other.ODD, "because")
    assert str(error) == "odd: because" and error.problem is Other.ODD and error.detail == "because"


# ---- the border to the pixels ----------------------------------------------------------------------------------------

PIXELS = {uids.ImplicitVRLittleEndian: b"\xe0\x7f\x10\0\x20\0\0\0",
          uids.ExplicitVRLittleEndian: b"\xe0\x7f\x10\0OW\0\0\x20\0\0\0",
          uids.ExplicitVRBigEndian: b"\x7f\xe0\0\x10OW\0\0\0\0\0\x20"}


def with_border(folder, syntax, border, behind=b""):
    content = encoded(image(), syntax)
    assert content.count(PIXELS[syntax]) == 1
    path = folder / "a"
    path.write_bytes(content.replace(PIXELS[syntax], border) + behind)
    assert_bulk_equals_pydicom(folder, ["a"])
    return assert_one_answer(path)


def resized(border, length, syntax):
    return border[:-4] + length.to_bytes(4, "big" if syntax == uids.ExplicitVRBigEndian else "little")


@pytest.mark.parametrize("syntax", PIXELS, ids=lambda uid: uid.name)
def test_pixels_declared_shorter_than_the_image(tmp_path, syntax):
    border = PIXELS[syntax]
    assert with_border(tmp_path, syntax, resized(border, 20, syntax), bytes(100)) == (
        BadFile, "truncated: pixel data has 20 of 32 bytes")
    assert with_border(tmp_path, syntax, resized(border, 5000, syntax), bytes(100)) == (
        BadFile, "unreadable: pixel data has 132 bytes, its header tells of 32")
    for enough in (32, 34, 60):
        row = with_border(tmp_path, syntax, resized(border, enough, syntax), bytes(100))
        assert (tmp_path / "a").read_bytes()[row["pixel_offset"] - len(border):].startswith(border[:4])


@pytest.mark.parametrize("syntax", PIXELS, ids=lambda uid: uid.name)
def test_fragments_under_an_uncompressed_syntax(tmp_path, syntax):
    kind, problem = with_border(tmp_path, syntax, resized(PIXELS[syntax], 0xFFFFFFFF, syntax), bytes(100))
    assert kind is BadFile and problem.startswith("unreadable: the pixel data is in fragments")


@pytest.mark.parametrize("syntax", [uids.ExplicitVRLittleEndian, uids.ExplicitVRBigEndian], ids=lambda uid: uid.name)
def test_kinds_of_pixel_data(tmp_path, syntax):
    for kind in (b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"UN"):
        assert isinstance(with_border(tmp_path, syntax, PIXELS[syntax].replace(b"OW", kind)), dict)
    for kind in (b"SS", b"US", b"LO", b"\0\0"):
        refused, problem = with_border(tmp_path, syntax, PIXELS[syntax].replace(b"OW", kind), bytes(100))
        assert refused is BadFile and problem.startswith("unreadable: the pixel data begins with")


def test_explicit_element_in_an_implicit_file(tmp_path):
    answer_ = with_border(tmp_path, uids.ImplicitVRLittleEndian, PIXELS[uids.ExplicitVRLittleEndian], bytes(30_000))
    assert answer_[0] is BadFile and answer_[1].startswith("unreadable: the pixel data begins with")


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.name)
def test_floating_point_pixels_are_taken_as_they_are(tmp_path, syntax):
    border = PIXELS[syntax].replace(b"\xe0\x7f\x10\0", b"\xe0\x7f\x08\0").replace(b"OW", b"OF")
    assert isinstance(with_border(tmp_path, syntax, resized(border, 4, syntax)), dict)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.name)
def test_binary_numbers_of_odd_length(tmp_path, syntax):
    content = encoded(image(), syntax)
    for tag in (b"\x28\0\x03\1", b"\x28\0\x01\1"):          # PixelRepresentation, BitsStored
        at = content.index(tag) + 8
        size = 2 if syntax == uids.ExplicitVRLittleEndian else 4
        for length in (1, 3):
            changed = content[: at - size] + length.to_bytes(size, "little") + b"\1\0\0"[:length] + content[at + 2 :]
            (tmp_path / "a").write_bytes(changed)
            assert_one_answer(tmp_path / "a")
            assert_bulk_equals_pydicom(tmp_path, ["a"])


# ---- packed pixels that break off ------------------------------------------------------------------------------------

def fragments(*lengths, frames=None, end=headers._SEQUENCE_END + bytes(4), **changes):
    """A JPEG 2000 file with an empty offset table, fragments of these lengths, and what closes them."""
    parts = [b"", *(bytes([0xFF, 0x4F, 0xFF, 0x51])[:length].ljust(length, b"j") for length in lengths)]
    value = b"".join(headers._ITEM_START + struct.pack("<L", len(part)) + part for part in parts)
    content = encoded(image(PixelData=pydicom.encaps.encapsulate([b"jpeg"]), NumberOfFrames=frames, **changes),
                      uids.JPEG2000Lossless)
    return content[: content.index(b"\xe0\x7f\x10\0OW\0\0") + 12] + value + end


BEHIND = b"\xfc\xff\xfc\xffOB\0\0\x06\0\0\0" + bytes(6)      # padding behind the pixels


@pytest.mark.parametrize("content, common", [
    (fragments(6), True), (fragments(6, 0, 8), True), (fragments(6, 8, frames=2), True),
    (fragments(6) + BEHIND, True), (fragments(*[2] * 3000, frames=3000), True)],
    ids=["one", "several", "frames", "padding behind", "many"])
def test_whole_packed_pixels(tmp_path, content, common):
    (tmp_path / "a.dcm").write_bytes(content)
    assert is_common(tmp_path / "a.dcm") == common and isinstance(assert_one_answer(tmp_path / "a.dcm"), dict)
    assert_bulk_equals_pydicom(tmp_path, ["a.dcm"])


@pytest.mark.parametrize("content, problem", [
    (fragments(6)[:-1], "truncated: the pixel data ends without its mark"),
    (fragments(6)[:-8], "truncated: the pixel data ends without its mark"),
    (fragments(6)[:-10], "truncated: the pixel data ends without its mark"),
    (fragments(600, 8)[:-200], "truncated: the pixel data ends without its mark"),
    (fragments(6)[:-18], "truncated: the pixel data ends without its mark"),
    (fragments(6)[:-26], "truncated: the pixel data ends without its mark"),
    (fragments(), "truncated: the pixel data has 0 of 1 frames"),
    (fragments(6, 8, frames=3), "truncated: the pixel data has 2 of 3 frames"),
    (fragments(6, 8, end=bytes(5000)), "unreadable: the pixel data is no chain of fragments"),
    (fragments(6, end=headers._ITEM_START + b"\xff" * 4), "unreadable: the pixel data is no chain of fragments"),
], ids=["last byte", "mark", "in a fragment", "far", "before", "table", "none", "frames", "zeros", "undefined"])
def test_packed_pixels_that_break_off(tmp_path, content, problem):
    (tmp_path / "a.dcm").write_bytes(content)
    refused, words = assert_one_answer(tmp_path / "a.dcm")
    assert refused is BadFile and words.startswith(problem)
    assert not is_common(tmp_path / "a.dcm")
    assert_bulk_equals_pydicom(tmp_path, ["a.dcm"])


def test_packed_pixels_of_a_declared_length(tmp_path):
    content = fragments(6)
    at = content.index(b"\xe0\x7f\x10\0OW\0\0") + 8
    held = len(content) - at - 4
    for length, good in ((held, True), (held - 8, True), (held + 2, False)):
        (tmp_path / "a.dcm").write_bytes(content[:at] + struct.pack("<L", length) + content[at + 4 :])
        found = assert_one_answer(tmp_path / "a.dcm")
        assert isinstance(found, dict) if good else found == (
            BadFile, f"truncated: pixel data has {held:,} of {length:,} bytes")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cut=st.integers(0, 90), flips=st.lists(st.tuples(st.integers(1, 90), st.integers(0, 255)), max_size=3))
def test_damaged_fragments_have_one_answer(tmp_path, cut, flips):
    content = bytearray(fragments(6, 20, frames=2) + BEHIND)
    for back, value in flips:
        content[-back] = value
    (tmp_path / "a.dcm").write_bytes(content[: len(content) - cut])
    assert_one_answer(tmp_path / "a.dcm")
    assert_bulk_equals_pydicom(tmp_path, ["a.dcm"])


def test_endless_fragments_cost_little(tmp_path):
    (tmp_path / "endless").write_bytes(fragments(6, end=(headers._ITEM_START + bytes(4)) * 3_000_000))
    (tmp_path / "good").write_bytes(BASES[2])
    assert measured(tmp_path, seconds=10)["good"]["reason"] is None


def test_deflated_that_breaks_off(tmp_path):
    begin = behind_meta(DEFLATED)
    for cut in (2, 3, 20, 200):
        (tmp_path / "a.dcm").write_bytes(DEFLATED[:-cut])
        assert assert_one_answer(tmp_path / "a.dcm")[1].startswith("truncated: the deflated part breaks off")

    def packed(elements):
        pack = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        return DEFLATED[:begin] + pack.compress(elements) + pack.flush()

    for elements, problem in ((ELEMENTS[:-8], "truncated: pixel data has 24 of 32 bytes"),
                              (ELEMENTS[:-36] + b"\x08\0\0\0" + bytes(99), "truncated: pixel data has 8 of 32 bytes"),
                              (ELEMENTS[:-44], "truncated: the file ends")):
        (tmp_path / "a.dcm").write_bytes(packed(elements))
        assert assert_one_answer(tmp_path / "a.dcm")[1].startswith(problem)
    (tmp_path / "a.dcm").write_bytes(packed(ELEMENTS + BEHIND) + b"\0")
    assert isinstance(assert_one_answer(tmp_path / "a.dcm"), dict)


def test_deflated_longer_than_a_piece(tmp_path):
    """Noise and zeros, so that pieces of input and of output end at different places."""
    noise = b"".join(os.urandom(30_000) + bytes(3_000_000) for _ in range(4))
    (tmp_path / "a.dcm").write_bytes(encoded(image(Rows=2020, Columns=3000, PixelData=noise), DEFLATED_SYNTAX))
    assert isinstance(assert_one_answer(tmp_path / "a.dcm"), dict)
    (tmp_path / "a.dcm").write_bytes(encoded(image(Rows=2021, Columns=3000, PixelData=noise), DEFLATED_SYNTAX))
    assert assert_one_answer(tmp_path / "a.dcm")[1] == "truncated: pixel data has 12,120,000 of 12,126,000 bytes"


DEFLATED_SYNTAX = uids.DeflatedExplicitVRLittleEndian
