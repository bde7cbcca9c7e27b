"""Pixels: every way of packing gives the numbers that went in, and the fast way agrees with the plain one."""

import math
import os
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from pathlib import Path

import gdcm
import numpy as np
import pandas as pd
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import encaps
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from scipy import ndimage

from lungct import pixels, runs

GEOMETRY_TOLERANCE_MM = 1e-4
PLAIN = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
PACKED = (RLELossless, JPEGLSLossless, JPEG2000Lossless)


# ---- made-up files ---------------------------------------------------------------------------------------------------

def write(path, stored, syntax=ExplicitVRLittleEndian, bits=None, **changes):
    """One CT image, of several frames when `stored` has three axes; `changes` set elements, None removes them."""
    image, width = Dataset(), stored.dtype.itemsize * 8
    image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, "1.2.3"
    image.Rows, image.Columns = stored.shape[-2:]
    if stored.ndim == 3:
        image.NumberOfFrames = len(stored)
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit = width, bits or width, (bits or width) - 1
    image.PixelRepresentation = int(stored.dtype.kind == "i")
    image.RescaleSlope, image.RescaleIntercept = 1, -1024
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    raw = stored.astype(stored.dtype.newbyteorder(order)).tobytes()
    image.PixelData = raw + b"\0" * (len(raw) % 2)
    image["PixelData"].VR = "OB" if width == 8 else "OW"
    for keyword, value in changes.items():
        setattr(image, keyword, value)
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax in PACKED else syntax
    if syntax in PACKED:
        image.compress(syntax)
    image.save_as(path, enforce_file_format=True)
    return path


def jpeg_lossless(path):
    """Repack a file with GDCM, which is not what decodes it in pydicom's own tests of encoders."""
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    assert writer.Write()
    return path


def header_of(path, **changes):
    """What an index would say of a file, by pydicom alone."""
    image = pydicom.dcmread(path)
    offset = image.get_item("PixelData").value_tell
    return {
        "path": path.name, "rows": image.Rows, "columns": image.Columns, "samples_per_pixel": image.SamplesPerPixel,
        "bits_allocated": image.BitsAllocated, "bits_stored": image.BitsStored, "high_bit": image.HighBit,
        "pixel_representation": image.PixelRepresentation, "file_bytes": path.stat().st_size,
        "pixel_offset": None if image.file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian else offset,
        "transfer_syntax_uid": str(image.file_meta.TransferSyntaxUID),
        "rescale_slope": float(image.get("RescaleSlope", 1)),
        "rescale_intercept": float(image.get("RescaleIntercept", 0)),
        "pixel_padding_value": image.get("PixelPaddingValue"), "pixel_padding_limit": None} | changes


def values_of(bits, signed, shape=(36, 34), seed=0):
    """Random numbers of that many bits, with the lowest and the highest among them."""
    low = -(2 ** (bits - 1)) if signed else 0
    kind = np.dtype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")
    stored = np.random.default_rng(seed).integers(low, low + 2**bits, shape).astype(kind)
    stored.flat[:2] = low, low + 2**bits - 1
    return stored


# ---- packing ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", [8, 9, 10, 11, 12, 13, 14, 15, 16])
@pytest.mark.parametrize("syntax", [*PLAIN, *PACKED], ids=lambda uid: uid.name)
def test_numbers_come_back(tmp_path, syntax, bits, signed):
    stored = values_of(bits, signed)
    path = write(tmp_path / "a.dcm", stored, syntax, bits)
    assert np.array_equal(pixels.read_stored(path, header_of(path)), stored)


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_jpeg_lossless(tmp_path, bits, signed):
    stored = values_of(bits, signed, shape=(16, 16))
    path = jpeg_lossless(write(tmp_path / "a.dcm", stored, ExplicitVRLittleEndian, bits))
    assert header_of(path)["transfer_syntax_uid"] == JPEGLosslessSV1
    assert np.array_equal(pixels.read_stored(path, header_of(path)), stored)


@pytest.mark.parametrize("name", [
    "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm",
    "MR_small_jpeg_ls_lossless.dcm", "MR_small_padded.dcm"])
def test_one_image_packed_by_others(name):
    """Files that come with pydicom, written by other programs: one signed image in many packings."""
    reference = pydicom.dcmread(get_testdata_file("MR_small.dcm", download=False))
    expected = np.frombuffer(reference.PixelData, "<i2").reshape(reference.Rows, reference.Columns)
    path = Path(get_testdata_file(name, download=False))
    assert np.array_equal(pixels.read_stored(path, header_of(path)), expected)


@pytest.mark.parametrize("syntax", PLAIN, ids=lambda uid: uid.name)
@pytest.mark.parametrize("bits", [10, 12, 15])
def test_foreign_bits_are_dropped(tmp_path, syntax, bits):
    for signed in (False, True):
        stored = values_of(bits, signed)
        mask = (1 << bits) - 1
        drawn = (stored.view(np.uint16) & mask) | (np.uint16(0xFFFF) ^ mask) * (np.arange(34) % 2).astype(np.uint16)
        path = write(tmp_path / "a.dcm", drawn.view(stored.dtype), syntax, bits)
        assert np.array_equal(pixels.read_stored(path, header_of(path)), stored)


@pytest.mark.parametrize("syntax", PLAIN, ids=lambda uid: uid.name)
def test_values_at_the_upper_end_of_their_words(tmp_path, syntax):
    for signed in (False, True):
        stored = values_of(12, signed)
        path = write(tmp_path / "a.dcm", stored << 4 | 5, syntax, 12, HighBit=15)
        assert np.array_equal(pixels.read_stored(path, header_of(path)), stored)


def test_impossible_bits_are_refused(tmp_path):
    path = write(tmp_path / "a.dcm", values_of(12, False), bits=12)
    for change in ({"bits_stored": 17}, {"high_bit": 3}, {"high_bit": 16}):
        with pytest.raises(ValueError, match=r"a.dcm: \d+ bits stored up to bit \d+ do not fit in 16 bits"):
            pixels.read_stored(path, header_of(path) | change)


def test_target_is_filled_without_a_copy(tmp_path):
    stored = values_of(16, True)
    path = write(tmp_path / "a.dcm", stored)
    volume = np.zeros((3, *stored.shape), np.int16)
    back = pixels.read_stored(path, header_of(path), volume[1])
    assert np.shares_memory(back, volume) and np.array_equal(volume[1], stored) and not volume[[0, 2]].any()


@pytest.mark.parametrize("syntax", [*PLAIN, *PACKED], ids=lambda uid: uid.name)
def test_frames_in_any_order(tmp_path, syntax):
    stored = np.stack([values_of(12, False, seed=k) for k in range(5)])
    path = write(tmp_path / "a.dcm", stored, syntax, 12)
    header, opened = header_of(path), {}
    for frame in (3, 0, 4, 1, 2):
        assert np.array_equal(pixels.read_stored(path, header | {"frame": frame}, None, opened), stored[frame])


# ---- files that changed, decoders that are missing ----------------------------------------------------------------

@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless], ids=lambda uid: uid.name)
def test_changed_size_is_told(tmp_path, syntax):
    path = write(tmp_path / "a.dcm", values_of(12, False), syntax, 12)
    header = header_of(path)
    path.write_bytes(path.read_bytes() + b"\0\0")
    with pytest.raises(ValueError, match=r"a\.dcm changed since it was indexed: [\d,]+ bytes, expected [\d,]+"):
        pixels.read_stored(path, header)


def test_moved_pixels_are_told(tmp_path):
    path = write(tmp_path / "a.dcm", values_of(12, False), bits=12)
    header = header_of(path)
    longer = write(tmp_path / "b.dcm", values_of(12, False)[:30], bits=12, PatientComments="x" * 20)
    longer.write_bytes(longer.read_bytes()[: header["file_bytes"]].ljust(header["file_bytes"], b"\0"))
    with pytest.raises(ValueError, match=r"b\.dcm changed since it was indexed: no pixel data at byte"):
        pixels.read_stored(longer, header)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian], ids=lambda uid: uid.name)
def test_changed_length_is_told(tmp_path, syntax):
    path = write(tmp_path / "a.dcm", np.stack([values_of(12, False)] * 2), syntax, 12)
    header, content = header_of(path), path.read_bytes()
    at = header["pixel_offset"]
    for length, frame, problem in ((100, 0, "100 of 2,448 bytes of frame 0"), (2500, 1, "52 of 2,448 bytes of frame 1"),
                                   (0, 1, "0 of 2,448 bytes of frame 1"), (0xFFFFFFFF, 0, "no pixel data at byte")):
        path.write_bytes(content[: at - 4] + length.to_bytes(4, "little") + content[at:])
        with pytest.raises(ValueError, match=f"changed since it was indexed: {problem}"):
            pixels.read_stored(path, header | {"frame": frame})


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian], ids=lambda uid: uid.name)
def test_another_image_of_the_same_size_is_told(tmp_path, syntax):
    path = write(tmp_path / "a.dcm", values_of(12, False), syntax, 12, SOPInstanceUID="1.2.3.1")
    header = header_of(path, sop_uid="1.2.3.1")
    assert pixels.read_stored(path, header).shape == (36, 34)
    for other in ("1.2.3.2", "1.2.3.10"):                  # both take eight bytes
        write(path, values_of(12, False, seed=1), syntax, 12, SOPInstanceUID=other)
        assert path.stat().st_size == header["file_bytes"]
        with pytest.raises(ValueError, match=r"changed since it was indexed: another image than 1\.2\.3\.1 at byte"):
            pixels.read_stored(path, header)
        assert pixels.read_stored(path, header | {"sop_uid": other}).shape == (36, 34)
        assert pixels.read_stored(path, header | {"sop_uid": None}).shape == (36, 34)


@pytest.mark.parametrize("frame", [0, 1])
def test_where_the_system_cannot_read_into_many_buffers(tmp_path, monkeypatch, frame):
    stored = np.stack([values_of(12, False), values_of(12, False, seed=1)])
    path = write(tmp_path / "a.dcm", stored, bits=12)
    header, content = header_of(path, sop_uid="1.2.3"), path.read_bytes()
    monkeypatch.delattr(os, "preadv")                      # Windows, macOS before 11
    assert np.array_equal(pixels.read_stored(path, header | {"frame": frame}), stored[frame])
    path.write_bytes(content[:-4])
    with pytest.raises(ValueError, match="changed since it was indexed: 2,444 of 2,448 bytes of frame 1"):
        pixels.read_stored(path, header | {"frame": 1, "file_bytes": len(content) - 4})


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless], ids=lambda uid: uid.name)
def test_a_named_pipe_in_place_of_the_file_is_not_waited_for(tmp_path, syntax):
    path = write(tmp_path / "a.dcm", values_of(12, False), syntax, 12)
    header = header_of(path)
    path.unlink()
    os.mkfifo(path)
    code = (f"from lungct import pixels\ntry:\n    pixels.read_stored({str(path)!r}, {header!r})\n"
            "except ValueError as error:\n    print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert f"a.dcm changed since it was indexed: 0 bytes, expected {header['file_bytes']:,}" in done.stdout, done.stderr


def test_long_headers_are_not_searched(tmp_path):
    path = write(tmp_path / "a.dcm", values_of(12, False), bits=12, PatientComments="x" * 20_000)
    assert pixels.read_stored(path, header_of(path, sop_uid="1.2.3")).shape == (36, 34)


def test_frame_beyond_the_file(tmp_path):
    path = write(tmp_path / "a.dcm", np.stack([values_of(12, False)] * 2), bits=12)
    with pytest.raises(ValueError, match=r"changed since it was indexed: 0 of 2,448 bytes of frame 2"):
        pixels.read_stored(path, header_of(path, frame=2))


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless])
def test_missing_extra_is_named(tmp_path, monkeypatch, syntax):
    class Absent:
        is_available = False

    monkeypatch.setattr(pixels, "get_decoder", lambda uid: Absent)
    path = write(tmp_path / "a.dcm", values_of(12, False), bits=12)
    with pytest.raises(runs.InputError, match=r"a\.dcm: JPEG.*needs a decoder: pip install 'lungct\[codecs\]'"):
        pixels.read_stored(path, header_of(path) | {"transfer_syntax_uid": str(syntax)})


def test_syntax_problems():
    for syntax in (*PLAIN, *PACKED, JPEGLosslessSV1):
        assert pixels.syntax_problem(syntax, 12) is None
    assert pixels.syntax_problem("1.2.840.10008.1.2.4.51", 8) is None
    assert "pylibjpeg-libjpeg (licence: GPL)" in pixels.syntax_problem("1.2.840.10008.1.2.4.51", 12)
    assert "MPEG2" in pixels.syntax_problem("1.2.840.10008.1.2.4.100")


def test_damaged_stream_names_the_file(tmp_path):
    path = write(tmp_path / "a.dcm", values_of(12, False), JPEGLSLossless, 12)
    raw = bytearray(path.read_bytes())
    raw[-60:-20] = b"\0" * 40
    at = raw.rfind(b"\xff\xd8")
    raw[at : at + 30] = b"\1" * 30
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"a\.dcm: frame 0 cannot be decoded: "), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels.read_stored(path, header_of(path))


def test_colour_is_refused(tmp_path):
    path = write(tmp_path / "a.dcm", np.zeros((4, 18), np.uint8), SamplesPerPixel=3, Columns=6, PlanarConfiguration=0,
                 PhotometricInterpretation="RGB")
    with pytest.raises(ValueError, match=r"expected 4 x 6 pixels, got shape \(4, 6, 3\)"):
        pixels.read_stored(path, header_of(path))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_a_picture_in_colour_can_be_looked_at(tmp_path, syntax):
    colours = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    path = write(tmp_path / "a.dcm", colours.reshape(4, 18), SamplesPerPixel=3, Columns=6, PlanarConfiguration=0,
                 PhotometricInterpretation="RGB")
    if syntax == RLELossless:
        image = pydicom.dcmread(path)
        image.compress(syntax)
        image.save_as(path)
    assert np.array_equal(pixels.read_picture(path, header_of(path)), colours)
    with pytest.raises(ValueError, match=r"expected pixels of shape \(4, 6, 4\), got"):
        pixels.read_picture(path, header_of(path) | {"samples_per_pixel": 4})


def test_a_picture_in_grey_is_what_is_stored(tmp_path):
    frames = np.arange(3 * 4 * 6, dtype=np.uint16).reshape(3, 4, 6)
    header = header_of(write(tmp_path / "a.dcm", frames))
    assert np.array_equal(pixels.read_picture(tmp_path / "a.dcm", header | {"frame": 1}), frames[1])


# ---- files that promise more than they hold --------------------------------------------------------------------------

def packed_frames(path, frames, syntax=JPEG2000Lossless, told=None, bot=True, each=1):
    """A file of these frames, packed, that may tell of another number; with a table and fragments of a frame."""
    inside = []
    for k, plane in enumerate(frames):
        image = pydicom.dcmread(write(path.with_name(f"{k}.part"), plane, syntax, 12))
        inside += [encaps.get_frame(image.PixelData, 0, number_of_frames=1)]
    image.NumberOfFrames = told or len(frames)
    image.PixelData = encaps.encapsulate(inside, fragments_per_frame=each, has_bot=bot)
    image.save_as(path)
    return path


@pytest.mark.parametrize("bot", [True, False])
@pytest.mark.parametrize("syntax", PACKED, ids=lambda uid: uid.name)
def test_more_frames_than_the_header_tells(tmp_path, syntax, bot):
    frames = [values_of(12, False, seed=k) for k in range(3)]
    for told in (1, 2):
        path = packed_frames(tmp_path / "a.dcm", frames, syntax, told, bot)
        with pytest.raises(ValueError, match=rf"a\.dcm: frame 0 cannot be decoded: .*: 3 frames.* tells of {told}"):
            pixels.read_stored(path, header_of(path))


@pytest.mark.parametrize("table", [(0, 0, 0), (8, 16, 24), (0,), "swapped", "extended"])
def test_tables_of_offsets_are_not_believed(tmp_path, table):
    frames = [values_of(12, False, seed=k) for k in range(3)]
    path = packed_frames(tmp_path / "a.dcm", frames)
    image = pydicom.dcmread(path)
    true = encaps.parse_basic_offsets(image.PixelData)
    if table == "extended":
        image.ExtendedOffsetTable = np.array(true[::-1], "<u8").tobytes()
        image.ExtendedOffsetTableLengths = np.full(3, 5000, "<u8").tobytes()
    else:
        told = np.array([true[2], true[0], true[1]] if table == "swapped" else table, "<u4").tobytes()
        image.PixelData = b"\xfe\xff\0\xe0" + len(told).to_bytes(4, "little") + told + image.PixelData[8 + 12 :]
    image.save_as(path)
    for k in (2, 0, 1):
        assert np.array_equal(pixels.read_stored(path, header_of(path, frame=k)), frames[k])


def test_an_end_mark_by_chance_does_not_shift_frames(tmp_path):
    frames = [values_of(12, False, seed=k) for k in range(3)]
    path = packed_frames(tmp_path / "a.dcm", frames, bot=False, each=2)
    image = pydicom.dcmread(path)
    count, places = encaps.parse_fragments(image.PixelData[8:])
    middle = 8 + places[1] - 5                             # in the first half of the first frame
    image.PixelData = image.PixelData[:middle] + b"\xff\xd9" + image.PixelData[middle + 2 :]
    image.save_as(path)
    assert count == 6
    assert np.array_equal(pixels.read_stored(path, header_of(path, frame=2)), frames[2])


SIZES = {JPEG2000Lossless: (b"\xff\x4f\xff\x51", 8), JPEGLSLossless: (b"\xff\xf7", 5),
         JPEGLosslessSV1: (b"\xff\xc3", 5)}


def of_size(path, syntax, rows, columns):
    """Change the size that a packed stream tells, not that of the header."""
    content = bytearray(path.read_bytes())
    mark, behind = SIZES[syntax]
    at = content.index(mark) + behind
    if syntax == JPEG2000Lossless:
        struct.pack_into(">LL8xLL", content, at, columns, rows, columns, rows)       # one tile
    else:
        struct.pack_into(">HH", content, at, rows, columns)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("syntax", SIZES, ids=lambda uid: uid.name)
def test_a_stream_of_another_size_is_not_decoded(tmp_path, syntax, monkeypatch):
    path = write(tmp_path / "a.dcm", values_of(12, False), syntax if syntax in PACKED else ExplicitVRLittleEndian, 12)
    path = path if syntax in PACKED else jpeg_lossless(path)
    assert pixels.read_stored(path, header_of(path)).shape == (36, 34)
    of_size(path, syntax, 65535, 65500)
    monkeypatch.setattr(pixels, "iter_pixels", lambda *args, **kwargs: pytest.fail("was decoded"))
    with pytest.raises(ValueError, match=r"a\.dcm: .*65535 x 65500 pixels of 1 sample.* 36 x 34 pixels of 1 sample"):
        pixels.read_stored(path, header_of(path))


@pytest.mark.parametrize("syntax", [*SIZES, RLELossless], ids=lambda uid: uid.name)
def test_images_larger_than_any_scanner_makes(tmp_path, syntax):
    """Header and stream agree, and both lie."""
    path = write(tmp_path / "a.dcm", values_of(12, False), syntax if syntax in PACKED else ExplicitVRLittleEndian, 12)
    path = path if syntax in PACKED else jpeg_lossless(path)
    if syntax in SIZES:
        of_size(path, syntax, 65535, 65535)
    image = pydicom.dcmread(path)
    image.Rows = image.Columns = 65535
    image.save_as(path)
    with pytest.raises(ValueError, match=r"a\.dcm: .*65535 x 65535 pixels, allowed are 67,108,864"):
        pixels.read_stored(path, header_of(path))


def test_run_lengths_that_cannot_fill_the_image(tmp_path):
    path = write(tmp_path / "a.dcm", np.zeros((36, 34), np.uint16), RLELossless, 12)
    image = pydicom.dcmread(path)
    image.Rows = image.Columns = 8000
    image.save_as(path)
    with pytest.raises(ValueError, match=r"a\.dcm: .* bytes of run lengths cannot hold 128,000,000 bytes"):
        pixels.read_stored(path, header_of(path))


@pytest.mark.parametrize("depth", [0xFF, 0x7F, 0x14])
def test_a_stream_of_more_bits_than_its_header_is_not_decoded(tmp_path, depth):
    """One decoder, asked for 128 bits, ends the process; so a process of its own is asked."""
    path = write(tmp_path / "a.dcm", values_of(12, False), JPEG2000Lossless, 12)
    content = bytearray(path.read_bytes())
    content[content.index(b"\xff\x4f\xff\x51") + 42] = depth
    path.write_bytes(content)
    code = (f"from lungct import pixels\ntry:\n    pixels.read_stored({str(path)!r}, {dict(header_of(path))!r})\n"
            "except ValueError as error:\n    print(error)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and f"holds numbers of {(depth & 127) + 1} bits, its header says 16" in done.stdout


@pytest.mark.parametrize("front", [b"junk", b"\xff\xd8\xff"])
def test_a_stream_without_a_size_is_not_decoded(tmp_path, front):
    path = write(tmp_path / "a.dcm", values_of(12, False), JPEG2000Lossless, 12)
    image = pydicom.dcmread(path)
    image.PixelData = encaps.encapsulate([front + encaps.get_frame(image.PixelData, 0, number_of_frames=1)])
    image.save_as(path)
    with pytest.raises(ValueError, match=r"a\.dcm: frame 0 cannot be decoded: "):
        pixels.read_stored(path, header_of(path))


def peak_mb(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def deflated(path, elements):
    """A file whose deflated part inflates to these pieces."""
    content = path.read_bytes()
    begin = 144 + int.from_bytes(content[140:144], "little")
    pack = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    path.write_bytes(content[:begin] + b"".join(map(pack.compress, elements)) + pack.flush())


@pytest.mark.parametrize("where", ["behind the pixels", "in the pixels", "in the header"])
def test_deflated_bombs_cost_little(tmp_path, where):
    path = write(tmp_path / "a.dcm", values_of(12, False), DeflatedExplicitVRLittleEndian, 12)
    content = path.read_bytes()
    inside = zlib.decompress(content[144 + int.from_bytes(content[140:144], "little") :], -zlib.MAX_WBITS)
    zeros, header = (bytes(1 << 20) for _ in range(400)), header_of(path)
    pixels_at = inside.index(b"\xe0\x7f\x10\0OW\0\0")
    if where == "in the pixels":
        inside = inside[: pixels_at + 8] + (400 << 20).to_bytes(4, "little")
    deflated(path, [inside, *zeros] if where != "in the header" else [inside[:pixels_at], *zeros, inside[pixels_at:]])
    header["file_bytes"] = path.stat().st_size

    def refused():
        with pytest.raises(ValueError, match=r"a\.dcm: frame 0 cannot be decoded: .* inflates to more than"):
            pixels.read_stored(path, header)

    assert peak_mb(refused) < 100


def test_elements_behind_the_pixels_are_left(tmp_path):
    path = write(tmp_path / "a.dcm", values_of(12, False), RLELossless, 12)
    tail = b"".join(b"\xe1\x7f" + k.to_bytes(2, "little") + b"UN" + bytes(6) for k in range(60_000))
    path.write_bytes(path.read_bytes() + tail)
    header = header_of(path)
    assert peak_mb(lambda: pixels.read_stored(path, header)) < 5


@pytest.mark.parametrize("read", [pixels.read_hu, pixels.read_scaled])
def test_a_volume_that_fits_no_memory(tmp_path, read):
    header = header_of(write(tmp_path / "a.dcm", values_of(12, False), bits=12), rows=65535, columns=65535)
    words = r"a\.dcm: 2,000,000 slices of 65535 x 65535 pixels need [\d,]+ GB of memory"
    with pytest.raises(ValueError, match=words):
        read([header] * 2_000_000, tmp_path)


# ---- Hounsfield units ------------------------------------------------------------------------------------------------

@st.composite
def sixteen_bits(draw):
    """(stored numbers, header) of slope 1, with any intercept and padding."""
    bits, signed, seed = draw(st.integers(8, 16)), draw(st.booleans()), draw(st.integers(0, 2**31))
    ends = st.none() | st.integers(-32768, 65535)
    header = {"rescale_slope": 1.0, "rescale_intercept": float(draw(st.integers(-40_000, 40_000))),
              "bits_stored": bits, "pixel_padding_value": draw(ends), "pixel_padding_limit": draw(ends)}
    return values_of(bits, signed, (4, 5), seed).astype(np.int16 if signed else np.uint16), header


@settings(max_examples=400, deadline=None)
@given(plane=sixteen_bits())
def test_fast_way_agrees_with_the_plain_one(plane):
    stored, header = plane
    intercept = int(header["rescale_intercept"])
    expected, counted = pixels.to_hu(stored, header)
    before = stored.copy()
    outside = pixels._hu_in_place(stored, header)
    if outside is None:
        assert np.array_equal(stored, before)
        assert abs(intercept) >= 2**15 or pixels.AIR_HU - intercept >= 2**15 or int(stored.max()) + intercept >= 2**15
    else:
        assert outside == counted and np.array_equal(stored.view(np.int16), expected)


@settings(max_examples=400, deadline=None)
@given(plane=sixteen_bits())
def test_one_step_agrees_with_the_plain_way(plane):
    stored, header = plane
    padding, limit = header["pixel_padding_value"], header["pixel_padding_limit"]
    expected, counted = pixels.to_hu(stored, header)
    step = pixels._one_step(stored, header)
    if step is None:
        assert (counted and (padding is not None or limit is not None)) or int(header["rescale_intercept"]) < -(2**15)
    else:
        assert np.array_equal(np.maximum(stored.astype(int), step[0]) + step[1], expected)


def expected_hu(stored, slope, intercept, padding=None):
    """By hand, in double precision."""
    hu = stored.astype(np.float64) * slope + intercept
    outside = (hu < -1024) | (stored == padding if padding is not None else False)
    return np.where(outside, -1024, hu), int(outside.sum())


@pytest.mark.parametrize("slope, intercept", [(1, -1024), (1, 0), (2, -1024), (-1, 100), (1, 30000), (0.5, -1000.25)])
@pytest.mark.parametrize("bits, signed", [(8, False), (8, True), (12, False), (16, False), (16, True)])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian], ids=lambda uid: uid.name)
def test_volume_by_hand(tmp_path, syntax, bits, signed, slope, intercept):
    stored = np.stack([values_of(bits, signed, seed=k) for k in range(3)])
    headers = [header_of(write(tmp_path / f"{k}.dcm", plane, syntax, bits, RescaleSlope=slope,
                               RescaleIntercept=intercept), pixel_padding_value=7) for k, plane in enumerate(stored)]
    volume, outside = pixels.read_hu(headers, tmp_path)
    expected, counted = expected_hu(stored, slope, intercept, 7)
    whole = float(slope).is_integer() and expected.max() < 2**15
    assert volume.dtype == (np.int16 if whole else np.float32) and outside == counted
    assert np.array_equal(volume, expected.astype(np.float32))
    memory = np.empty(stored.shape[1:], np.int16)
    for header, plane in zip(headers, expected, strict=True):
        numbers, floor, shift = pixels.read_numbers(header, tmp_path, memory=memory)
        assert np.array_equal(np.maximum(numbers.astype(float), floor) + shift, plane)


@pytest.mark.parametrize("syntax", [*PLAIN, RLELossless], ids=lambda uid: uid.name)
@pytest.mark.parametrize("signed, padding, limit", [
    (True, -32768, None), (False, 63536, None), (True, -32768, -30000), (True, 30000, None), (True, -32768, -2048)])
def test_padding_beyond_the_bits_that_are_stored(tmp_path, syntax, signed, padding, limit):
    """A true 0 is no padding, though the padding's lower bits are 0 too."""
    stored = values_of(12, signed)
    stored[1, :4] = 0
    words = stored.copy()
    words[3, :5] = padding
    path = write(tmp_path / "a.dcm", words, syntax, 12, RescaleIntercept=0)
    stored = stored.astype(int)
    outside = (words == padding) | (stored < -1024) | (stored == limit)
    header = header_of(path, pixel_padding_value=padding, pixel_padding_limit=limit)
    volume, counted = pixels.read_hu([header], tmp_path)
    assert np.array_equal(volume[0], np.where(outside, -1024, stored)) and counted == outside.sum()
    scaled, counted = pixels.read_scaled([header], tmp_path)
    absent = (words == padding) | (stored == limit)
    assert np.array_equal(scaled[0], np.where(absent, 0, stored)) and counted == absent.sum()


def test_widening_keeps_earlier_slices(tmp_path):
    planes = [np.full((4, 6), value, np.uint16) for value in (1064, 60_000, 24)]
    headers = [header_of(write(tmp_path / f"{k}.dcm", plane)) for k, plane in enumerate(planes)]
    volume, outside = pixels.read_hu(headers, tmp_path)
    assert volume.dtype == np.float32 and outside == 0
    assert volume[:, 0, 0].tolist() == [40, 58_976, -1000]


def test_not_a_number_is_air():
    header = {"rescale_slope": 1.0, "rescale_intercept": 0.0}
    hu, outside = pixels.to_hu(np.array([[math.nan, 5.5]]), header)
    assert hu.tolist() == [[-1024, 5.5]] and outside == 1


def test_scaled_volume(tmp_path):
    stored = values_of(15, False)
    headers = [header_of(write(tmp_path / f"{k}.dcm", stored, bits=16, RescaleSlope=0.25 * (k + 1), RescaleIntercept=0),
                         pixel_padding_value=0) for k in range(2)]
    volume, outside = pixels.read_scaled(headers, tmp_path, 0.001)
    assert volume.dtype == np.float32 and outside == 2 * (stored == 0).sum()
    assert np.allclose(volume, stored * np.array([0.25, 0.5])[:, None, None] * 0.001, rtol=1e-6)
    each, _ = pixels.read_scaled(headers, tmp_path, [0.001, 0.003])
    assert np.array_equal(each[0], volume[0]) and np.allclose(each[1], 3 * volume[1], rtol=1e-6)


# ---- straightening ---------------------------------------------------------------------------------------------------

def leaning_affine(lean_x, lean_y, spacing=(0.7, 0.9, 2.5), angles=(0.3, -0.2)):
    """Voxel (x, y, z) -> mm of a stack whose slices are turned by two angles and shifted against each other."""
    a, b = angles
    turn = np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.array([[spacing[0], 0, lean_x], [0, spacing[1], lean_y], [0, 0, spacing[2]]])
    affine[:3, 3] = -30, 12, 100
    return affine


@settings(max_examples=40, deadline=None)
@given(lean_x=st.floats(-1.5, 1.5), lean_y=st.floats(-1.5, 1.5), seed=st.integers(0, 1000))
def test_straightened_values_are_those_at_the_same_place(lean_x, lean_y, seed):
    """Reference: scipy resamples the leaning array with the two affines; it knows nothing of slices and shifts."""
    values = np.random.default_rng(seed).normal(0, 100, (7, 12, 9))
    affine = leaning_affine(lean_x, lean_y)
    straight, upright = pixels.straighten(values, affine, outside=-1024)
    steps = upright[:3, :3].T @ upright[:3, :3]
    assert np.abs(steps - np.diag(np.diag(steps))).max() < 1e-9
    assert np.allclose(upright[:3, :2], affine[:3, :2]) and math.isclose(steps[2, 2] ** 0.5, 2.5, rel_tol=1e-9)
    to_leaning = (np.linalg.inv(affine) @ upright)[:3][::-1]
    reference = ndimage.affine_transform(values, to_leaning[:, 2::-1], to_leaning[:, 3], output_shape=straight.shape,
                                         order=1, mode="grid-constant", cval=-1024)
    assert np.abs(straight - reference).max() < 1e-6 * 1024


def test_straightening_loses_no_voxel_and_keeps_whole_numbers():
    """Shifts by whole pixels interpolate nothing: each slice is found again, at its place in mm, with air around."""
    values = np.random.default_rng(0).integers(-900, 900, (6, 8, 8)).astype(np.int16)
    affine = leaning_affine(-0.7 * 3, 0.9 * 2, spacing=(0.7, 0.9, 5))
    straight, upright = pixels.straighten(values, affine)
    assert straight.dtype == np.int16 and straight.shape == (6, 8 + 10, 8 + 15)
    for k, plane in enumerate(values):
        x, y, z, _ = np.linalg.inv(upright) @ affine @ [0, 0, k, 1]
        assert np.allclose([x, y, z], np.rint([x, y, z]), atol=GEOMETRY_TOLERANCE_MM)
        x, y = round(x), round(y)
        assert np.array_equal(straight[k, y : y + 8, x : x + 8], plane)
    assert (straight == pixels.AIR_HU).sum() == straight.size - values.size


def test_a_ball_lies_where_it_was():
    """A ball of known centre in mm, seen by a leaning scan; its centre of mass stays when straightened."""
    affine, centre = leaning_affine(0.4, -0.8), None
    z, y, x = np.mgrid[:30, :60, :60]
    places = np.stack([x, y, z], -1) @ affine[:3, :3].T + affine[:3, 3]
    centre = affine[:3, :3] @ [30, 30, 15] + affine[:3, 3]
    ball = np.where(np.linalg.norm(places - centre, axis=-1) < 12, 40, -1024).astype(np.int16)
    straight, upright = pixels.straighten(ball, affine)
    weights = straight.astype(float) + 1024
    k, j, i = np.indices(straight.shape)
    found = [np.average(axis, weights=weights) for axis in (i, j, k)]
    assert np.linalg.norm(upright[:3, :3] @ found + upright[:3, 3] - centre) < 0.1
    distance = np.linalg.norm(np.stack([i, j, k], -1) @ upright[:3, :3].T + upright[:3, 3] - centre, axis=-1)
    assert (straight[distance < 11] == 40).all() and (straight[distance > 13.5] == -1024).all()


def test_upright_stack_is_left_alone():
    values = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    straight, upright = pixels.straighten(values, leaning_affine(0, 0))
    assert np.array_equal(straight, values) and np.allclose(upright, leaning_affine(0, 0), atol=1e-12)


def test_a_lean_that_no_gantry_has_is_refused():
    with pytest.raises(ValueError, match=r"slices lean by 76 degrees, at most 45 can be straightened"):
        pixels.straighten(np.zeros((3, 4, 5), np.int16), leaning_affine(10, 0))


def test_missing_values_of_a_table_are_missing(tmp_path):
    """A table says NA where a header says nothing; bits and sign then have their plain meaning."""
    stored = values_of(16, False)
    header = header_of(write(tmp_path / "a.dcm", stored))
    for column in ("bits_stored", "high_bit", "pixel_representation", "pixel_padding_value", "samples_per_pixel",
                   "frame"):
        header[column] = pd.NA
    assert np.array_equal(pixels.read_stored(tmp_path / "a.dcm", header), stored)
    volume, outside = pixels.read_hu([header], tmp_path)
    assert np.array_equal(volume[0], stored - 1024.0) and outside == 0


# ---------------------------------------------------------------- what callers hand over

def test_slices_of_another_size_are_not_read_as_this_size(tmp_path):
    rows = [plain_file(tmp_path / f"{k}.dcm", np.arange(size, dtype=np.int16).reshape(shape))
            for k, (size, shape) in enumerate(((64, (8, 8)), (64, (4, 16)), (256, (16, 16))))]
    for other in rows[1:]:
        with pytest.raises(ValueError, match="its slice is .*, the memory for it"):
            pixels.read_hu([rows[0], other], tmp_path)
    with pytest.raises(ValueError, match="no slice to read"):
        pixels.read_hu([], tmp_path)


@pytest.mark.parametrize("change", [{"rescale_slope": np.nan}, {"rescale_intercept": None}, {"rescale_slope": np.inf}])
def test_a_rescale_that_is_no_number_is_not_air(tmp_path, change):
    row = plain_file(tmp_path / "a.dcm", np.zeros((4, 4), np.int16))
    assert (pixels.read_hu([row], tmp_path)[0] == -1024).all()
    with pytest.raises(ValueError, match="expected two numbers"):
        pixels.read_hu([row | change], tmp_path)


def plain_file(path, stored):
    """Pixels alone behind their element's head, and the row of an index for them."""
    path.write_bytes(b"\xe0\x7f\x10\0OW\0\0" + stored.nbytes.to_bytes(4, "little") + stored.tobytes())
    return {"path": path.name, "rows": stored.shape[0], "columns": stored.shape[1], "samples_per_pixel": 1,
            "bits_allocated": 16, "bits_stored": 16, "high_bit": 15, "pixel_representation": 1, "pixel_offset": 12,
            "file_bytes": path.stat().st_size, "transfer_syntax_uid": "1.2.840.10008.1.2.1", "rescale_slope": 1.0,
            "rescale_intercept": -1024.0}
