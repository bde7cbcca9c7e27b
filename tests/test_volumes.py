"""Chapter 3: nothing is lost between the scanner's voxels and the cube, and the store survives what happens to it."""

import contextlib
import dataclasses
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from lungct import dicom, runs, volumes
from lungct.volumes import Grid, axis_spans, build_cohort, find_lungs, load_cohort, load_volume, resample_area

SUPERSAMPLE = 0.02  # HU-scale tolerance of float32 sums


def stack_of(hu_zyx, affine, name="toy"):
    hu_zyx, affine = np.asarray(hu_zyx, np.int16), np.asarray(affine, float)
    return dicom.Stack(stack_id=name, hu_zyx=hu_zyx, affine=affine, modality="CT", sop_uids=(), padding_voxels=0)


def affine_of(spacing_xyz, origin=(0, 0, 0), directions=None):
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if directions is None else directions) * np.asarray(spacing_xyz, float)
    affine[:3, 3] = origin
    return affine


def rotation(degrees, axes=(0, 1)):
    turn, (a, b), angle = np.eye(3), axes, np.radians(degrees)
    turn[a, a] = turn[b, b] = np.cos(angle)
    turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
    return turn


# ------------------------------------------------------------------ averaging


def overlap_means(values, spacing_zyx, origin_edge_zyx, grid_spacing, low_edge_zyx, shape):
    """The definition, written out: for each target voxel the overlap of every source voxel."""
    out = np.empty(shape)
    for index in np.ndindex(*shape):
        weights = []
        for axis in range(3):
            low = low_edge_zyx[axis] + index[axis] * grid_spacing
            high, n = low + grid_spacing, values.shape[axis]
            starts = [origin_edge_zyx[axis] + i * spacing_zyx[axis] for i in range(n)]
            cells = [max(0.0, min(high, start + spacing_zyx[axis]) - max(low, start)) for start in starts]
            weights.append(np.array(cells) / grid_spacing)
        share = weights[0][:, None, None] * weights[1][None, :, None] * weights[2]
        out[index] = (share * values).sum() + (1 - share.sum()) * volumes.AIR_HU
    return out


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    spacing=st.tuples(*[st.floats(0.4, 5.9)] * 3),
    shift=st.tuples(*[st.floats(-15, 15)] * 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_area_means_equal_the_definition(shape, spacing, shift, seed):
    values = np.random.default_rng(seed).integers(-1024, 3000, shape).astype(np.int16)
    origin = np.array(shift) + np.array(spacing[::-1]) / 2 - np.array(shape[::-1]) * np.array(spacing[::-1]) / 2
    target = Grid(4, 6.0).affine((0, 0, 0))
    got = resample_area(values, affine_of(spacing[::-1], origin), target, (4, 4, 4), volumes.AIR_HU)
    edges = (origin - np.array(spacing[::-1]) / 2)[::-1]
    want = overlap_means(values.astype(float), spacing, edges, 6.0, (-12, -12, -12), (4, 4, 4))
    assert np.sqrt(np.mean((got - want) ** 2)) < SUPERSAMPLE
    assert np.sqrt(np.mean((np.rint(got) - want) ** 2)) <= 1.0  # the goal of the project, after rounding to HU


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([np.int16, np.uint16, np.float32, np.int32]),
    far=st.sampled_from([10, 3000, 5000, 32767]),
    wide=st.integers(1, 70),
    step=st.floats(0.3, 40.0),
    first=st.floats(-20, 20),
    backwards=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@example(kind=np.int16, far=32767, wide=9, step=16.0, first=0.0, backwards=False, seed=0)  # sums of four rows
@example(kind=np.uint16, far=32767, wide=9, step=16.0, first=0.0, backwards=True, seed=0)
def test_numbers_of_every_kind_and_size_have_the_same_means(kind, far, wide, step, first, backwards, seed):
    random = np.random.default_rng(seed)
    low, high = (0, 2 * far + 1) if kind == np.uint16 else (-far, far)
    values = random.integers(low, high, (3, 11, wide), endpoint=True)
    values[0, :6], values[1, 3:9] = high, low  # where sums would overflow first
    step = -step if backwards else step
    spans = [axis_spans(3, 0, 1.5, 2), axis_spans(11, first / 4, step / 4, 9), axis_spans(wide, first, step, 37)]
    got = volumes._weigh(values.astype(kind), spans, -5.0)
    weights = [span.matrix(n).astype(float) for span, n in zip(spans, values.shape, strict=True)]
    want = np.einsum("Zk,Yy,Xx,kyx->ZYX", *weights, values + 5.0, optimize=True) - 5
    assert got.dtype == np.float32 and abs(got - want).max() <= (1024 + far) * 1e-6


HASH = """
import hashlib
import numpy as np
from lungct import volumes
random = np.random.default_rng(0)
values, affine = random.integers(-1024, 3000, (20, 300, 310)).astype(np.int16), np.diag([0.7, 0.9, 2.5, 1])
target = np.diag([6.0, 6.0, 6.0, 1])
for kind in (np.int16, np.uint16, np.float32):
    cube = volumes.resample_area((values.clip(0) * kind(1.5)).astype(kind), affine, target, (9, 40, 40), -1024.0)
    print(hashlib.md5(cube).hexdigest())
"""


def test_another_processor_gives_the_same_bytes():
    """Code for the oldest processors of this kind, without wide registers and fused products, against this one's."""
    def hashes(**ways):
        done = subprocess.run([sys.executable, "-c", HASH], env=os.environ | ways, capture_output=True, text=True)
        return done.stdout.split()

    plain, own = hashes(NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES=""), hashes()
    assert plain == own and len(own) == 3


def test_slices_of_another_shape_are_refused():
    class Mixed:
        shape = (2, 8, 8)

        def __len__(self):
            return 2

        def __getitem__(self, k):
            return np.zeros((8 - k, 8), np.int16)

    with pytest.raises(ValueError, match=r"slice 1 has \(7, 8\) voxels, expected \(8, 8\)"):
        resample_area(Mixed(), np.eye(4), np.eye(4), (2, 8, 8), 0)


def test_what_is_not_a_number_stays_in_its_own_cell():
    values = np.ones((8, 8, 8), np.float32)
    values[1, 1, 1] = np.nan
    got = volumes._weigh(values, [axis_spans(8, 0, 2, 4)] * 3, 0.0)
    assert np.argwhere(np.isnan(got)).tolist() == [[0, 0, 0]]


def overlaps(n, first, step, targets):
    """Area overlap, or linear interpolation where the target is finer, one matrix cell after the other."""
    edges, weights = first + step * np.arange(targets + 1), np.zeros((targets, n))
    for t, (low, high) in enumerate(np.sort(np.stack([edges[:-1], edges[1:]], axis=1))):
        covered = max(0.0, min(high, n) - max(low, 0)) / abs(step)
        centre = min(max((low + high) / 2 - 0.5, 0), n - 1)
        for i in range(n):
            area = max(0.0, min(high, i + 1) - max(low, i)) / abs(step)
            weights[t, i] = area if abs(step) >= 1 else max(0.0, 1 - abs(centre - i)) * covered
    return weights


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), step=st.floats(0.2, 9.0), first=st.floats(-20, 50), backwards=st.booleans())
@example(n=4, step=2.0, first=0.0, backwards=False)
@example(n=4, step=1.0, first=8.0, backwards=True)
@example(n=1, step=0.5, first=0.0, backwards=False)
def test_spans_are_the_overlaps(n, step, first, backwards):
    step = -step if backwards else step
    spans = axis_spans(n, first, step, 7)
    assert np.allclose(spans.matrix(n), overlaps(n, first, step, 7), rtol=1e-7, atol=1e-7)
    some = spans.first <= spans.last
    assert (spans.shares >= 0).all() and not spans.shares[~some].any()
    assert not spans.shares[spans.first == spans.last, 2].any()
    assert (spans.first[some] >= 0).all() and (spans.last[some] < n).all()
    used = volumes._used(spans, n)
    assert set(np.flatnonzero(spans.matrix(n).any(axis=0))) <= set(used) <= set(range(n))


@settings(max_examples=20, deadline=None)
@given(spacing=st.tuples(*[st.floats(0.5, 5.9)] * 3), seed=st.integers(0, 1000))
def test_mass_is_kept(spacing, seed):
    values = np.random.default_rng(seed).integers(-1024, 2000, (12, 14, 10)).astype(np.int16)
    shape_xyz, spacing_xyz = np.array((10, 14, 12)), np.array(spacing[::-1])
    affine = affine_of(spacing_xyz, -(shape_xyz - 1) / 2 * spacing_xyz + 1.3)
    out = resample_area(values, affine, Grid(20, 6.0).affine((0, 0, 0)), (20,) * 3, volumes.AIR_HU)
    assert (out + 1024).sum(dtype=float) * 216 == pytest.approx((values + 1024.0).sum() * np.prod(spacing), rel=1e-5)


def sphere(centre_mm, radius_mm, spacing=(0.7, 0.7, 1.25), shape=(60, 96, 96), background=-850, value=40):
    """Anti-aliased sphere; the volume's middle is at 0 mm."""
    affine = affine_of(spacing, [-(n - 1) / 2 * s for n, s in zip(shape[::-1], spacing, strict=True)])
    z, y, x = (np.arange(n) * s - (n - 1) / 2 * s for n, s in zip(shape, spacing[::-1], strict=True))
    z, y, x = z[:, None, None] - centre_mm[2], y[None, :, None] - centre_mm[1], x - centre_mm[0]
    distance = np.sqrt(z**2 + y**2 + x**2)
    inside = np.clip((radius_mm - distance) / 0.8 + 0.5, 0, 1)
    return background + (value - background) * inside, affine, inside.sum() * np.prod(spacing)


@settings(max_examples=25, deadline=None)
@given(centre=st.tuples(*[st.floats(-6, 6)] * 3))
def test_a_6_mm_nodule_is_never_lost(centre):
    values, affine, volume_mm3 = sphere(centre, 3.0)
    out = resample_area(values, affine, Grid(8, 6.0).affine((0, 0, 0)), (8,) * 3, volumes.AIR_HU)
    signal = out + 850
    assert signal[1:-1, 1:-1, 1:-1].max() > 50  # at worst split between eight voxels; the noise left is a few HU
    assert signal[1:-1, 1:-1, 1:-1].sum() * 216 == pytest.approx(890 * volume_mm3, rel=0.01)
    inner, places = np.clip(signal[1:-1, 1:-1, 1:-1], 0, None), np.arange(6) * 6 - 15
    found = [(inner.sum(axis=other) * places).sum() / inner.sum() for other in ((0, 1), (0, 2), (1, 2))]
    assert np.allclose(found, centre, atol=1.5)  # a quarter of a voxel: inside one voxel a place is not seen


def test_outside_is_air_and_a_half_covered_voxel_is_half_air():
    air, nothing = volumes.AIR_HU, np.zeros((2, 2, 2), np.int16)
    out = resample_area(nothing, np.eye(4), affine_of((2, 2, 2), (-0.5, 0.5, 0.5)), (1, 1, 2), air)
    assert out.ravel().tolist() == [-512.0, -512.0]
    far = resample_area(nothing, np.eye(4), affine_of((2, 2, 2), (500, 0, 0)), (2, 2, 2), air)
    assert (far == volumes.AIR_HU).all()


def test_suv_has_its_own_outside():
    out = resample_area(np.ones((1, 1, 1), np.float32), np.eye(4), affine_of((2, 2, 2)), (1, 1, 1), outside=0.0)
    assert out.item() == pytest.approx(1 / 8)  # one cubic millimetre of eight, nothing else


# --------------------------------------------- any spacing and direction, against SimpleITK


def smooth(points_mm):
    x, y, z = np.moveaxis(points_mm, -1, 0)
    return 300 * np.sin(x / 40) + 200 * np.cos(y / 35 + 0.3) + 4 * z + 100 * np.sin((x + z) / 60)


def sampled(affine, shape_zyx):
    z, y, x = np.meshgrid(*[np.arange(n) for n in shape_zyx], indexing="ij")
    return smooth(np.stack([x, y, z], -1) @ affine[:3, :3].T + affine[:3, 3])


FLIPS = {
    "axial": np.eye(3),
    "feet first": np.diag([1.0, -1.0, -1.0]),
    "coronal": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]).T,
    "sagittal, mirrored": np.array([[0, 0, -1.0], [1, 0, 0], [0, 1, 0]]),
    "oblique 12": rotation(12),
    "oblique twice": rotation(25) @ rotation(-17, (1, 2)),
}


@pytest.mark.parametrize("name", FLIPS)
@pytest.mark.parametrize("spacing", [(1.5, 1.5, 2.0), (0.9, 1.1, 7.0)])
def test_orientations_agree_with_simpleitk_on_smooth_functions(name, spacing):
    sitk = pytest.importorskip("SimpleITK")
    shape_zyx = [int(130 / s) for s in spacing[::-1]]
    affine = affine_of(spacing, directions=FLIPS[name])
    affine[:3, 3] -= affine[:3, :3] @ ((np.array(shape_zyx[::-1]) - 1) / 2)
    values = sampled(affine, shape_zyx)
    target = Grid(12, 6.0).affine((3.3, -2.1, 1.7))
    got = resample_area(values, affine, target, (12,) * 3, volumes.AIR_HU)

    image = sitk.GetImageFromArray(values.astype(np.float32))
    image.SetSpacing([float(s) for s in spacing])
    image.SetDirection(FLIPS[name].ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    to = (sitk.sitkLinear, target[:3, 3].tolist(), [6.0] * 3, np.eye(3).ravel().tolist(), -1024.0)
    want = sitk.GetArrayFromImage(sitk.Resample(image, [12] * 3, sitk.Transform(), *to))
    assert want.min() > -1000  # the grid lies inside the source
    assert np.abs(got - want).max() < 8  # averaging and picking differ by the curvature of the function only
    assert np.abs(got - sampled(target, (12,) * 3)).max() < 8


def test_oblique_keeps_mass_and_centre_of_a_nodule():
    values, straight, volume_mm3 = sphere((0, 0, 0), 3.0)
    affine = np.eye(4)
    affine[:3, :3] = rotation(20) @ rotation(11, (1, 2))
    affine = affine @ straight
    for shift in (0.0, 1.5, 3.0):
        target = Grid(8, 6.0).affine((shift, shift, 0))
        out = resample_area(values, affine, target, (8,) * 3, volumes.AIR_HU)[2:6, 2:6, 2:6] + 850
        assert out.max() > 50
        assert out.sum() * 216 == pytest.approx(890 * volume_mm3, rel=0.08)


def test_tiny_rounding_of_cosines_still_counts_as_parallel():
    values = np.random.default_rng(0).integers(-1000, 1000, (10, 40, 40)).astype(np.int16)
    clean = affine_of((1, 1, 3))
    dirty = clean.copy()
    dirty[:3, :3] = rotation(np.degrees(2e-5)) @ clean[:3, :3]
    grid = Grid(6, 6.0).affine((18, 18, 14))
    difference = np.subtract(*(resample_area(values, to, grid, (6,) * 3, volumes.AIR_HU) for to in (clean, dirty)))
    assert np.abs(difference).max() < 1


# ------------------------------------------------------------------ grid, boxes, masks


@given(
    centre=st.tuples(*[st.floats(-500, 500)] * 3),
    size=st.integers(1, 200),
    spacing=st.floats(0.5, 12),
    corners=st.lists(st.floats(-900, 900), min_size=6, max_size=6),
)
def test_round_trip_between_mm_and_grid(centre, size, spacing, corners):
    affine = Grid(size, spacing).affine(centre)
    assert np.abs(volumes.boxes_to_mm(affine, volumes.boxes_to_grid(affine, [corners])) - corners).max() < 1e-3
    middle = dicom.to_mm(affine, [[(size - 1) / 2] * 3])[0]
    assert np.abs(middle - centre).max() <= spacing / 2 + 1e-6
    edges = affine[:3, 3] / spacing - 0.5
    assert np.allclose(edges, np.rint(edges), atol=1e-6)   # on the lattice that begins at 0 mm


def test_the_whole_cube_is_the_box_from_0_to_size():
    grid = Grid(10, 4.0)
    box = volumes.boxes_to_grid(grid.affine((4, 8, 5)), [[-16, -12, -16, 24, 28, 24]])
    assert np.allclose(box, [[0, 0, 0, 10, 10, 10]])


def test_grid_refuses_nonsense():
    with pytest.raises(runs.InputError, match=r"grid of 0 voxels of 6.0 mm"):
        Grid(0)
    for size, spacing in ((64, -1.0), (2.5, 6), (64, np.inf), (64, np.nan)):
        with pytest.raises(runs.InputError, match="above zero"):
            Grid(size, spacing)
    assert repr(Grid(np.int64(24), np.float32(16))) == "Grid(size=24, spacing_mm=16.0)"


def lesion_tables(rectangles, affine):
    """Boxes and hulls of lesions given as {lesion: {slice: (xmin, ymin, xmax, ymax)}}."""
    boxes, lesions = [], []
    for name, by_slice in rectangles.items():
        for k, (x0, y0, x1, y1) in by_slice.items():
            boxes.append({"lesion_id": name, "slice_index": k, "xmin": x0, "ymin": y0, "xmax": x1, "ymax": y1})
        r = np.array(list(by_slice.values()), float)
        low = [r[:, 0].min() - 0.5, r[:, 1].min() - 0.5, min(by_slice) - 0.5]
        high = [r[:, 2].max() - 0.5, r[:, 3].max() - 0.5, max(by_slice) + 0.5]
        corners = np.array(np.meshgrid(*zip(low, high, strict=True))).reshape(3, -1).T
        mm = corners @ affine[:3, :3].T + affine[:3, 3]
        lesions.append({"lesion_id": name, **dict(zip(volumes.CORNERS_MM, [*mm.min(0), *mm.max(0)], strict=True))})
    columns = ["lesion_id", "slice_index", "xmin", "ymin", "xmax", "ymax"]
    return pd.DataFrame(lesions, columns=["lesion_id", *volumes.CORNERS_MM]), pd.DataFrame(boxes, columns=columns)


SOURCE = affine_of((0.8, 0.8, 5.0), (-102, -102, -100))  # 256 x 256 x 41, about 0 mm


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_lesion_inside_keeps_a_numbered_voxel_inside_its_box(data):
    number = data.draw(st.integers(1, 6))
    rectangles = {}
    for n in range(number):
        x0, y0 = data.draw(st.integers(0, 200)), data.draw(st.integers(0, 200))
        w, h = data.draw(st.integers(1, 55)), data.draw(st.integers(1, 55))
        first, count = data.draw(st.integers(0, 35)), data.draw(st.integers(1, 5))
        rectangles[f"l{n}"] = dict.fromkeys(range(first, first + count), (x0, y0, x0 + w, y0 + h))
    lesions, boxes = lesion_tables(rectangles, SOURCE)
    placed = volumes.place_lesions(lesions, boxes, SOURCE, Grid(40, 6.0).affine((0, 0, 0)), 40)
    assert placed["lesions_outside"] == placed["lesions_cut"] == 0
    assert sorted(np.unique(placed["mask"]))[-number:] == list(range(1, number + 1))
    for n, box in enumerate(placed["boxes_zyx"], 1):
        voxels = np.argwhere(placed["mask"] == n)
        assert (voxels >= np.floor(box[:3]) - 1e-3).all() and (voxels + 1 <= np.ceil(box[3:]) + 1e-3).all()


def test_mask_volume_and_centre_match_the_boxes():
    rectangles = {"l0": dict.fromkeys(range(12, 22), (60, 70, 130, 120))}
    lesions, boxes = lesion_tables(rectangles, SOURCE)
    grid_affine = Grid(40, 6.0).affine((1.1, -2.2, 3.3))
    mask = volumes.place_lesions(lesions, boxes, SOURCE, grid_affine, 40)["mask"]
    assert mask.astype(bool).sum() * 216 == pytest.approx(70 * 50 * 10 * 0.8 * 0.8 * 5, rel=0.25)
    centre = dicom.to_mm(grid_affine, np.argwhere(mask)[:, ::-1]).mean(axis=0)
    assert np.allclose(centre, dicom.to_mm(SOURCE, [[94.5, 94.5, 16.5]])[0], atol=3.0)


@pytest.mark.parametrize("name", FLIPS)
def test_masks_follow_the_direction_of_the_scan(name):
    affine = np.eye(4)
    affine[:3, :3] = FLIPS[name]
    affine = affine @ SOURCE
    lesions, boxes = lesion_tables({"l0": dict.fromkeys(range(12, 22), (60, 70, 130, 120))}, affine)
    grid_affine = Grid(40, 6.0).affine((0, 0, 0))
    placed = volumes.place_lesions(lesions, boxes, affine, grid_affine, 40)
    assert placed["mask"].sum() * 216 == pytest.approx(70 * 50 * 10 * 0.8 * 0.8 * 5, rel=0.15)
    centre = dicom.to_mm(grid_affine, np.argwhere(placed["mask"])[:, ::-1]).mean(axis=0)
    assert np.allclose(centre, dicom.to_mm(affine, [[94.5, 94.5, 16.5]])[0], atol=1.5)


def test_a_lesion_on_one_thin_slice_keeps_its_area():
    lesions, boxes = lesion_tables({"l0": {20: (50, 50, 110, 110)}}, SOURCE)
    grid_affine = Grid(40, 6.0).affine((0, 0, 0))
    mask = volumes.place_lesions(lesions, boxes, SOURCE, grid_affine, 40)["mask"]
    assert mask.any(axis=0).sum() * 36 == pytest.approx(48 * 48, rel=0.3)


@pytest.mark.parametrize("slice_mm", [1.0, 0.625])
@pytest.mark.parametrize("slices", [1, 2])
def test_a_lesion_on_a_slice_between_the_points_is_where_it_was_drawn(slice_mm, slices):
    affine = np.diag([0.75, 0.75, slice_mm, 1.0])
    affine[:3, 3] = -30
    grid_affine = Grid(12, 6.0).affine((0, 0, 0))
    for first in range(30, 42):
        lesions, boxes = lesion_tables({"l0": dict.fromkeys(range(first, first + slices), (20, 25, 50, 55))}, affine)
        mask = volumes.place_lesions(lesions, boxes, affine, grid_affine, 12)["mask"]
        corners = lesions[volumes.CORNERS_MM].to_numpy()[0]
        away = dicom.to_mm(grid_affine, np.argwhere(mask)[:, ::-1]).mean(axis=0) - (corners[:3] + corners[3:]) / 2
        assert mask.any(axis=0).sum() * 36 == pytest.approx(22.5 * 22.5, rel=0.3) and abs(away).max() <= 3.1, first


def test_a_lesion_too_thin_for_any_point_takes_the_voxel_in_its_middle():
    lesions, boxes = lesion_tables({"l0": {20: (50, 50, 51, 110)}}, np.diag([0.05, 0.8, 5.0, 1.0]))
    grid_affine = Grid(20, 6.0).affine((0, 60, 100))
    mask = volumes.place_lesions(lesions, boxes, np.diag([0.05, 0.8, 5.0, 1.0]), grid_affine, 20)["mask"]
    corners = lesions[volumes.CORNERS_MM].to_numpy()[0]
    away = dicom.to_mm(grid_affine, np.argwhere(mask)[:, ::-1])[0] - (corners[:3] + corners[3:]) / 2
    assert mask.sum() == 1 and abs(away).max() <= 6


def test_bridged_slices_are_interpolated():
    drawn = {"slice_index": [4, 6], "xmin": [0, 10], "ymin": [0, 0], "xmax": [20, 40], "ymax": [8, 8]}
    first, outline = volumes._outline(pd.DataFrame(drawn))
    assert first == 4 and outline[:, 0].tolist() == [[0, 0, 20, 8], [5, 0, 30, 8], [10, 0, 40, 8]]


def test_a_mask_has_nothing_between_two_boxes_of_one_slice():
    drawn = pd.DataFrame([(0, 0, 0, 4, 4), (0, 12, 12, 16, 16), (2, 0, 0, 16, 16)],
                         columns=["slice_index", "xmin", "ymin", "xmax", "ymax"])
    low, high = np.zeros(3, int), np.array([3, 16, 16])
    cover = volumes._coverage(volumes._outline(drawn), np.eye(4), low, high)
    assert cover.sum(axis=(1, 2)).tolist() == [32, 256, 256]      # the skipped slice lies between the hulls
    assert cover[0, :4, :4].all() and cover[0, 12:, 12:].all() and not cover[0, 5:11].any()


@settings(max_examples=40, deadline=None)
@given(boxes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9), st.integers(1, 6),
                                st.integers(1, 6)), min_size=1, max_size=8))
def test_coverage_is_the_union_of_the_boxes_drawn(boxes):
    want = np.zeros((4, 16, 16), bool)
    for k, x, y, wide, high in boxes:
        want[k, y:y + high, x:x + wide] = True
    drawn = pd.DataFrame([(k, x, y, x + wide, y + high) for k, x, y, wide, high in boxes],
                         columns=["slice_index", "xmin", "ymin", "xmax", "ymax"])
    cover = volumes._coverage(volumes._outline(drawn), np.eye(4), np.zeros(3, int), np.array([4, 16, 16]))
    drawn_on = sorted(drawn.slice_index.unique())
    assert np.array_equal(cover[drawn_on], want[drawn_on])
    assert not cover[: drawn_on[0]].any() and not cover[drawn_on[-1] + 1:].any()


def test_cut_and_outside_lesions_are_counted():
    rectangles = {"in": {20: (100, 100, 140, 140)}, "cut": {20: (0, 100, 60, 140)}, "out": {20: (0, 0, 10, 10)}}
    lesions, boxes = lesion_tables(rectangles, SOURCE)
    placed = volumes.place_lesions(lesions, boxes, SOURCE, Grid(20, 6.0).affine((0, 0, 0)), 20)
    assert list(placed["lesion_ids"]) == ["in", "cut"]
    assert (placed["lesions_cut"], placed["lesions_outside"]) == (1, 1)
    assert placed["boxes_zyx"].min() >= 0 and placed["boxes_zyx"].max() <= 20
    assert set(np.unique(placed["mask"])) == {0, 1, 2}


def test_two_lesions_in_one_voxel_both_survive():
    lesions, boxes = lesion_tables({"a": {20: (128, 128, 130, 130)}, "b": {20: (128, 128, 130, 130)}}, SOURCE)
    mask = volumes.place_lesions(lesions, boxes, SOURCE, Grid(40, 6.0).affine((0, 0, 0)), 40)["mask"]
    assert {1, 2} <= set(np.unique(mask))


def test_no_lesions_give_empty_arrays_of_the_right_shape():
    lesions, boxes = lesion_tables({}, SOURCE)
    placed = volumes.place_lesions(lesions, boxes, SOURCE, Grid(8, 6.0).affine((0, 0, 0)), 8)
    assert placed["boxes_zyx"].shape == (0, 6) and placed["mask"].sum() == 0 and len(placed["lesion_ids"]) == 0


# ------------------------------------------------------------------ lungs


def thorax(
    lungs=(-1, 1), shape=(36, 80, 90), spacing=(8.0, 5.0, 5.0), arm=False, bowel=False, shift=(0, 0, 0), noise=0
):
    """Body, lungs, hollow table; lungs 80 mm beside the middle, which is at `shift` mm (x, y, z)."""
    places = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    z, y, x = np.meshgrid(*places, indexing="ij")
    x, y, z = x - shift[0], y - shift[1], z - shift[2]
    hu = np.where((x / 190) ** 2 + (y / 120) ** 2 < 1, 40, -1000)
    for side in lungs:
        hu[((x - 80 * side) / 60) ** 2 + (y / 80) ** 2 + (z / 110) ** 2 < 1] = -850
    if arm:
        hu[(x - 230) ** 2 + (y + 20) ** 2 < 35**2] = 40
    if bowel:
        hu[(x / 40) ** 2 + ((y + 60) / 25) ** 2 + ((z + 190) / 25) ** 2 < 1] = -1000
    table = (abs(x) < 200) & (y > 150) & (y < 190)
    hu[table] = -950
    hu[table & ((y < 155) | (y > 185))] = -100
    affine = affine_of(spacing[::-1], [-(n - 1) / 2 * s for n, s in zip(shape[::-1], spacing[::-1], strict=True)])
    hu = hu + np.random.default_rng(0).normal(0, noise, hu.shape) if noise else hu
    return stack_of(hu, affine)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lungs": (-1,)},
        {"lungs": (1,)},
        {"arm": True},
        {"noise": 60},
        {"shift": (30, -12, 0)},
        {"bowel": True, "shape": (70, 80, 90)},
    ],
    ids=str,
)
def test_lungs_are_found(options):
    found = find_lungs(thorax(**options))
    assert found.centred_on == "lungs"
    assert np.allclose(found.centre_mm, options.get("shift", (0, 0, 0)), atol=13)
    assert 1.0 < found.litres < 6.0


@pytest.mark.parametrize("gas", [
    {"caecum": ((-110, 0, -470), (20, 20, 90))},
    {"stomach": ((60, -40, -165), (45, 45, 45))},
    {"colon": ((100, 0, -350), (24, 24, 120)), "transverse": ((0, -60, -240), (80, 24, 24))},
], ids=lambda gas: "+".join(gas))
@pytest.mark.parametrize("lungs", [(-1, 1), (1,)])
@pytest.mark.parametrize("hu", [-1000, -940, -600])
def test_gas_in_the_belly_is_no_lung(gas, lungs, hu):
    plain = thorax(shape=(100, 80, 90), shift=(0, 0, 200), lungs=lungs)
    gassy = plain.hu_zyx.copy()
    z, y, x = np.meshgrid(*[np.arange(n) for n in gassy.shape], indexing="ij")
    x, y, z = dicom.to_mm(plain.affine, np.stack([x, y, z], axis=-1)).transpose(3, 0, 1, 2)
    for (cx, cy, cz), (rx, ry, rz) in gas.values():
        inside = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - 200 - cz) / rz) ** 2 < 1
        assert (plain.hu_zyx[inside] > 0).mean() > 0.8     # in the belly, for the most part
        gassy[inside & (plain.hu_zyx > 0)] = hu
    found = find_lungs(stack_of(gassy, plain.affine))
    assert np.allclose(found.centre_mm, find_lungs(plain).centre_mm, atol=3)
    both_filled = np.where(plain.hu_zyx == -850, 40, gassy)
    assert hu > -1000 or find_lungs(stack_of(both_filled, plain.affine)).centred_on == "body"


@pytest.mark.parametrize("lungs", [(-1, 1), (1,)])
@pytest.mark.parametrize("height", [0.4, 0.6])
def test_a_band_of_tumour_that_cuts_a_lung_in_two_does_not_move_the_cube(lungs, height):
    plain = thorax(shape=(100, 80, 90), shift=(0, 0, 200), lungs=lungs)
    hu = plain.hu_zyx.copy()
    low, high = np.flatnonzero((hu == -850).any(axis=(1, 2)))[[0, -1]]
    middle = round(low + height * (high - low))
    band = hu[middle - 1 : middle + 2]
    band[band == -850] = 40
    whole, cut = find_lungs(plain), find_lungs(stack_of(hu, plain.affine))
    assert np.allclose(cut.centre_mm, whole.centre_mm, atol=7) and cut.litres > 0.8 * whole.litres


def test_the_gap_between_back_and_table_is_no_lung():
    stack = thorax()
    hu = stack.hu_zyx.copy()
    y = dicom.to_mm(stack.affine, [[0, row, 0] for row in range(hu.shape[1])])[:, 1]
    behind = (y > 100) & (y < 150)
    hollow = hu[:, behind] < -900
    hu[:, behind] = np.where(hollow, -915, hu[:, behind])  # foam, with the table below and its sides raised
    hu[:, (y > 60) & (y < 190), 4:8] = hu[:, (y > 60) & (y < 190), -8:-4] = 100
    hu[:, (y > 150) & (y < 190)] = 100
    found = find_lungs(stack_of(hu, stack.affine))
    assert np.allclose(found.centre_mm, find_lungs(stack).centre_mm, atol=3)
    assert found.litres == pytest.approx(find_lungs(stack).litres, rel=0.05)


@pytest.mark.parametrize("hu", [-965, -985])
def test_a_lung_that_is_all_gas_does_not_move_the_middle_of_the_chest(hu):
    plain = thorax()
    x = dicom.to_mm(plain.affine, [[column, 0, 0] for column in range(plain.hu_zyx.shape[2])])[:, 0]
    emptied = stack_of(np.where((plain.hu_zyx == -850) & (x > 0), hu, plain.hu_zyx), plain.affine)
    found, whole = find_lungs(emptied), find_lungs(plain)
    assert found.litres == pytest.approx(whole.litres / 2, rel=0.05)
    assert np.allclose(found.centre_mm, whole.centre_mm, atol=1)


def test_lungs_are_not_looked_for_on_pet():
    pet = dicom.Stack("pet", None, np.eye(4), "PT", (), 0, np.zeros((4, 4, 4), np.float32))
    with pytest.raises(ValueError, match="stack pet is PT"):
        find_lungs(pet)


def test_lungs_in_a_whole_body_scan():
    stack = thorax(shape=(120, 80, 90), shift=(0, 0, 250), bowel=True)
    found = find_lungs(stack)
    assert found.centred_on == "lungs" and abs(found.centre_mm[2] - 250) < 13


def test_lungs_cut_by_a_small_field_of_view():
    stack = thorax()
    narrow = stack_of(stack.hu_zyx[:, 15:65, 18:-18], stack.affine @ affine_of((1, 1, 1), (18, 15, 0)))
    short = stack_of(stack.hu_zyx[12:24], stack.affine @ affine_of((1, 1, 1), (0, 0, 12)))
    for cropped in (narrow, short):
        found = find_lungs(cropped)
        assert found.centred_on == "lungs" and np.allclose(found.centre_mm, 0, atol=13)


@pytest.mark.parametrize("name", ["feet first", "oblique 12", "oblique twice"])
def test_lungs_do_not_depend_on_the_direction_of_the_scan(name):
    stack = thorax()
    turned = np.eye(4)
    turned[:3, :3] = FLIPS[name]
    found = find_lungs(stack_of(stack.hu_zyx, turned @ stack.affine))
    assert found.centred_on == "lungs" and np.allclose(found.centre_mm, 0, atol=13)


def test_no_lungs_falls_back_and_says_so():
    body = find_lungs(thorax(lungs=()))
    assert body.centred_on == "body" and body.litres == 0 and np.allclose(body.centre_mm, 0, atol=13)
    air = thorax(lungs=())
    nothing = find_lungs(stack_of(np.full_like(air.hu_zyx, -1000), air.affine))
    assert nothing.centred_on == "stack" and np.allclose(nothing.centre_mm, 0, atol=1e-6)


# ------------------------------------------------------------------ the store


def write_series(folder, patient, hu_zyx, spacing):
    """A CT series as files that chapter 1 can read, middle at 0 mm."""
    folder.mkdir(parents=True)
    study, series, frame = (generate_uid(entropy_srcs=[patient, name]) for name in ("study", "series", "frame"))
    for k, image in enumerate(hu_zyx):
        uid = generate_uid(entropy_srcs=[patient, str(k)])
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, uid
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, uid
        ds.StudyInstanceUID, ds.SeriesInstanceUID = study, series
        ds.PatientID, ds.Modality, ds.FrameOfReferenceUID = patient, "CT", frame
        ds.InstanceNumber, ds.SeriesNumber = k + 1, 2
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *image.shape, 1, "MONOCHROME2"
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit, ds.PixelRepresentation, ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 15, 1, 1, -1024, "HU"
        ds.PixelSpacing, ds.SliceThickness = [spacing[1], spacing[2]], spacing[0]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [-(n - 1) / 2 * s for n, s in zip(hu_zyx.shape[:0:-1], spacing[:0:-1], strict=True)]
        ds.ImagePositionPatient.append((k - (len(hu_zyx) - 1) / 2) * spacing[0])
        ds.ImageType, ds.StudyDate, ds.PatientPosition = ["ORIGINAL", "PRIMARY", "AXIAL"], "20200101", "HFS"
        ds.PixelData = (image + 1024).astype("<i2").tobytes()
        ds.save_as(folder / f"1-{k + 1:02d}.dcm", enforce_file_format=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Root of six small patients and the tables that chapters 1 and 2 would hand on."""
    root = tmp_path_factory.mktemp("dicom")
    for n in range(6):
        hu = thorax(shape=(16, 40, 50), spacing=(20.0, 10.0, 10.0), shift=(0, 5 * n, 0)).hu_zyx
        write_series(root / f"P{n}", f"P{n}", hu, (20.0, 10.0, 10.0))
    instances, _ = dicom.index_dicom(root, workers=1)
    stacks, instances = dicom.build_stacks(instances)
    assert (stacks.status == "accepted").sum() == 6
    tables = []
    for stack in stacks.sort_values("stack_id").itertuples():
        rectangles = {f"{stack.stack_id}-1": {5: (14, 18, 18, 22), 6: (14, 18, 18, 22)}}
        pair = lesion_tables(rectangles, np.reshape(stack.affine, (4, 4)))
        tables.append([table.assign(stack_id=stack.stack_id) for table in pair])
    lesions, boxes = (pd.concat(parts, ignore_index=True) for parts in zip(*tables, strict=True))
    return root, instances, stacks, lesions, boxes


GRID = Grid(24, 16.0)


def build(source, out, **options):
    outcomes = {}
    options = {"grid": GRID, "workers": 1, **options}
    return build_cohort(*source, out, **options, on_done=outcomes.__setitem__), outcomes


def bytes_of(out):
    return {p.name: p.read_bytes() for p in sorted((out / "volumes").glob("*.npz"))}


def test_build_then_nothing_left_to_do(source, tmp_path):
    cohort, outcomes = build(source, tmp_path)
    assert list(cohort.stack_id) == sorted(cohort.stack_id) and set(outcomes.values()) == {"built"}
    assert (cohort.lesions == 1).all() and (cohort.mask_voxels >= 1).all() and (cohort.lesions_cut == 0).all()
    assert set(cohort.centred_on) == {"lungs"}
    assert not cohort.has_pet.any() and set(cohort.pet) == {"no PET in this study"}
    before = bytes_of(tmp_path)
    again, outcomes = build(source, tmp_path)
    assert set(outcomes.values()) == {"kept"} and bytes_of(tmp_path) == before
    pd.testing.assert_frame_equal(cohort, again)


def test_processes_give_the_same_bytes(source, tmp_path):
    one, _ = build(source, tmp_path / "one")
    two, _ = build(source, tmp_path / "two", workers=2)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    pd.testing.assert_frame_equal(one, two)


def test_volume_holds_what_the_source_holds(source, tmp_path):
    root, instances, _, lesions, _ = source
    cohort, _ = build(source, tmp_path)
    row = cohort.iloc[0]
    volume = load_volume(tmp_path / row.file)
    stack = dicom.read_stack(instances[instances.stack_id == row.stack_id], root)
    assert volume.ct_hu.dtype == np.int16 and volume.mask.dtype == np.uint8 and volume.boxes_zyx.dtype == np.float32
    want = resample_area(stack.hu_zyx, stack.affine, volume.affine, (24,) * 3, volumes.AIR_HU)
    assert np.abs(volume.ct_hu - want).max() <= 0.5
    assert (volume.ct_hu.min(), volume.ct_hu.max()) == (row.hu_min, row.hu_max)
    assert volume.meta["uids"]["patient_id"] == row.patient_id and volume.meta["content_hash"] == row.content_hash
    hull = lesions[lesions.stack_id == row.stack_id][volumes.CORNERS_MM].to_numpy(float)
    assert np.abs(volumes.boxes_to_mm(volume.affine, volume.boxes_zyx) - hull).max() < 1e-3


def test_corrupt_and_missing_entries_are_rebuilt(source, tmp_path):
    cohort, _ = build(source, tmp_path)
    before = bytes_of(tmp_path)
    files = [tmp_path / f for f in cohort.file]
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:1000])
    flipped = bytearray(files[2].read_bytes())
    flipped[2000] ^= 1
    files[2].write_bytes(flipped)
    files[3].write_bytes(b"")
    cohort.to_parquet(tmp_path / "cohort.parquet")
    with pytest.raises(volumes.CorruptVolume, match=r"run chapter 3 to rebuild it"):
        load_cohort(tmp_path, [cohort.stack_id[2]])
    again, outcomes = build(source, tmp_path)
    assert [outcomes[s] for s in cohort.stack_id] == ["built"] * 4 + ["kept"] * 2
    assert bytes_of(tmp_path) == before
    pd.testing.assert_frame_equal(cohort, again)


def test_another_entry_under_the_wrong_name_is_not_taken(source, tmp_path):
    cohort, _ = build(source, tmp_path)
    before = bytes_of(tmp_path)
    (tmp_path / cohort.file[0]).write_bytes((tmp_path / cohort.file[1]).read_bytes())
    _, outcomes = build(source, tmp_path)
    assert outcomes[cohort.stack_id[0]] == "built" and bytes_of(tmp_path) == before


def test_changed_parameters_and_inputs_rebuild_what_they_touch(source, tmp_path, monkeypatch):
    root, instances, stacks, lesions, boxes = source
    cohort, _ = build(source, tmp_path)
    moved = lesions.copy()
    moved.loc[moved.stack_id == cohort.stack_id[0], "x1_mm"] += 5
    _, outcomes = build((root, instances, stacks, moved, boxes), tmp_path)
    assert [s for s, o in outcomes.items() if o == "built"] == [cohort.stack_id[0]]
    build(source, tmp_path)
    _, outcomes = build(source, tmp_path, grid=Grid(20, 16.0))
    assert set(outcomes.values()) == {"built"}
    monkeypatch.setattr(volumes, "CODE_VERSION", "another")
    _, outcomes = build(source, tmp_path, grid=Grid(20, 16.0))
    assert set(outcomes.values()) == {"built"}


def test_mended_pixels_under_the_same_header_are_built_anew(source, tmp_path):
    original, instances, stacks, lesions, boxes = source
    root, store = tmp_path / "images", tmp_path / "store"
    shutil.copytree(original, root)
    copied = root, instances, stacks, lesions, boxes
    cohort, _ = build(copied, store)
    assert set(build(copied, store)[1].values()) == {"kept"}
    stack_id = cohort["stack_id"].iloc[0]
    path = root / instances.loc[instances["stack_id"] == stack_id, "path"].iloc[0]
    data, times = bytearray(path.read_bytes()), path.stat()
    data[-200:] = bytes(200)
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as cp --preserve and rsync leave it
    outcomes = build(copied, store)[1]
    assert [name for name, outcome in outcomes.items() if outcome == "built"] == [stack_id]


def test_another_source_is_another_code_version(tmp_path):
    package = Path(volumes.lungct.__file__).parent
    for name in ("dicom.py", "pixels.py", "loops.py", "volumes.py"):
        shutil.copy(package / name, tmp_path)
    assert volumes._code_version(tmp_path) == volumes.CODE_VERSION
    for name in ("dicom.py", "pixels.py", "loops.py", "volumes.py"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text + "# changed\n", encoding="utf-8")
        assert volumes._code_version(tmp_path) != volumes.CODE_VERSION
        (tmp_path / name).write_text(text, encoding="utf-8")


def test_one_bad_stack_costs_that_stack(source, tmp_path):
    root, instances, stacks, lesions, boxes = source
    victim = sorted(stacks.stack_id)[2]
    instances = instances.copy()
    instances.loc[instances.stack_id == victim, "path"] = "gone/1-01.dcm"
    cohort, outcomes = build((root, instances, stacks, lesions, boxes), tmp_path)
    bad = cohort[cohort.stack_id == victim].iloc[0]
    assert (bad.status, bad.reason) == ("excluded", volumes.BuildProblem.FAILED.value)
    assert "gone" in bad.detail and pd.isna(bad.file)
    assert (cohort.status == "accepted").sum() == 5 and outcomes[victim] == "excluded"
    assert bad.patient_id.startswith("P") and pd.isna(bad.lesions)
    cohort.to_parquet(tmp_path / "cohort.parquet")
    assert len(load_cohort(tmp_path)) == 5
    with pytest.raises(runs.InputError, match=f"1 of 1 stacks have no volume in .*{victim}"):
        load_cohort(tmp_path, [victim])


def test_when_no_stack_can_be_built_it_says_so(source, tmp_path):
    _, instances, stacks, lesions, boxes = source
    with pytest.raises(runs.InputError, match="none of 6 CT stacks could be built; P0"):
        build((tmp_path / "nowhere", instances, stacks, lesions, boxes), tmp_path)


def test_empty_cohort_keeps_columns_and_types(source, tmp_path):
    root, instances, stacks, lesions, boxes = source
    full, _ = build(source, tmp_path / "full")
    empty, _ = build((root, instances[:0], stacks[:0], lesions[:0], boxes[:0]), tmp_path / "empty")
    assert len(empty) == 0 and list(empty.columns) == list(full.columns)
    assert empty.dtypes.equals(full.dtypes)
    runs.save_table(empty, tmp_path / "empty" / "cohort.parquet")
    loaded = load_cohort(tmp_path / "empty")
    assert len(loaded) == 0 and loaded.ct_hu.shape == (0, 0, 0, 0) and loaded.boxes_zyx == []


def test_load_cohort_keeps_the_order_it_is_asked_for(source, tmp_path):
    cohort, _ = build(source, tmp_path)
    runs.save_table(cohort, tmp_path / "cohort.parquet")
    wanted = [cohort.stack_id[4], cohort.stack_id[1]]
    loaded = load_cohort(tmp_path, wanted)
    assert list(loaded.table.stack_id) == wanted and len(loaded) == 2
    assert np.array_equal(loaded.ct_hu[0], load_volume(tmp_path / cohort.file[4]).ct_hu)
    assert np.allclose(loaded.affines[1].ravel(), cohort.affine[1])
    assert loaded.ct_hu.shape == (2, 24, 24, 24) and [len(b) for b in loaded.boxes_zyx] == [1, 1]
    assert list(load_cohort(tmp_path, wanted[0]).table.stack_id) == wanted[:1]      # not a list of letters


def test_an_open_cohort_is_read_when_asked_and_checked(source, tmp_path):
    cohort, _ = build(source, tmp_path)
    runs.save_table(cohort, tmp_path / "cohort.parquet")
    whole, opened = load_cohort(tmp_path), load_cohort(tmp_path, in_memory=False)
    assert len(opened) == len(opened.ct_hu) == 6 and np.array_equal(opened.affines, whole.affines)
    for name in ("ct_hu", "mask", "boxes_zyx", "lesion_ids"):
        assert all(np.array_equal(a, b) for a, b in zip(getattr(opened, name), getattr(whole, name), strict=True))
    assert np.array_equal(opened.ct_hu[-1], whole.ct_hu[-1]) and len(opened.mask[1:3]) == 2
    with pytest.raises(IndexError):
        opened.ct_hu[6]
    damaged = tmp_path / cohort.file[3]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    opened = load_cohort(tmp_path, in_memory=False)        # opening reads no entry
    assert np.array_equal(opened.ct_hu[2], whole.ct_hu[2])
    with pytest.raises(volumes.CorruptVolume, match=damaged.name):
        opened.ct_hu[3]


def test_what_an_open_cohort_gives_is_the_callers_own_and_travels(source, tmp_path):
    cohort, _ = build(source, tmp_path)
    runs.save_table(cohort, tmp_path / "cohort.parquet")
    opened = load_cohort(tmp_path, in_memory=False)
    mine = opened.ct_hu[0]
    before = mine.copy()
    mine += 1000
    assert np.array_equal(opened.ct_hu[0], before)
    assert np.array_equal(pickle.loads(pickle.dumps(opened)).ct_hu[1], opened.ct_hu[1])


@pytest.mark.parametrize("outside", [np.nan, np.inf])
def test_what_lies_outside_is_a_number(outside):
    with pytest.raises(ValueError, match="expected a finite number"):
        resample_area(np.zeros((4, 4, 4), np.int16), np.eye(4), np.eye(4), (4, 4, 4), outside)


def test_a_lesion_without_its_boxes_is_named(source, tmp_path):
    root, instances, stacks, lesions, boxes = source
    with pytest.raises(runs.InputError, match="has no boxes: the table of boxes needs its rectangle on every slice"):
        build_cohort(root, instances, stacks, lesions, boxes.iloc[:0], tmp_path, GRID, workers=1)


def test_a_missing_pet_is_no_number(source, tmp_path):
    cohort, _ = build(source, tmp_path)
    runs.save_table(cohort, tmp_path / "cohort.parquet")
    entry = load_volume(tmp_path / cohort.file[1])
    arrays = {name: getattr(entry, name) for name in ("ct_hu", "mask", "boxes_zyx", "lesion_ids", "affine")}
    meta = {name: value for name, value in entry.meta.items() if name != "content_hash"}
    arrays["pet_suv"] = np.ones(GRID.shape_zyx, np.float32)
    cohort.loc[1, "content_hash"] = volumes._save_volume(tmp_path / cohort.file[1], arrays, meta)
    runs.save_table(cohort, tmp_path / "cohort.parquet")
    loaded = load_cohort(tmp_path, pet=True)
    assert (loaded.pet_suv[1] == 1).all() and np.isnan(loaded.pet_suv[[0, 2, 3, 4, 5]]).all()
    assert load_cohort(tmp_path).pet_suv is None
    opened = load_cohort(tmp_path, pet=True, in_memory=False)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(opened.pet_suv, loaded.pet_suv, strict=True))


def test_a_stack_whose_files_are_gone_costs_that_stack(source, tmp_path):
    root, instances, stacks, lesions, boxes = source
    victim = stacks.stack_id.iloc[0]
    cohort, outcomes = build((root, instances[instances.stack_id != victim], stacks, lesions, boxes), tmp_path)
    row = cohort.set_index("stack_id").loc[victim]
    assert row.reason == volumes.BuildProblem.FAILED.value and "0 slices of 16 are there" in row.detail
    assert sorted(outcomes.values()) == ["built"] * 5 + ["excluded"]


def test_whatever_is_damaged_is_rebuilt(source, tmp_path):
    cohort, _ = build(source, tmp_path)
    path = tmp_path / cohort.file[0]
    whole = path.read_bytes()
    heads = [*range(300), *range(len(whole) - 400, len(whole))]
    for at in heads[::7]:
        damaged = bytearray(whole)
        damaged[at] ^= 0x20
        path.write_bytes(damaged)
        with contextlib.suppress(volumes.CorruptVolume):       # or it was a byte that means nothing
            assert load_volume(path).meta["content_hash"] == cohort.content_hash[0]
    for content in (b"", whole[: len(whole) // 2], b"\x93NUMPY\x01\0v\0{'descr': '<i2', 'shape': (9" + b" " * 99):
        path.write_bytes(content)
        assert build(source, tmp_path)[1][cohort.stack_id[0]] == "built" and path.read_bytes() == whole


def test_a_wrong_root_costs_nothing_that_is_there(source, tmp_path):
    build(source, tmp_path)
    before = bytes_of(tmp_path)
    with pytest.raises(runs.InputError, match="none of 6 CT stacks could be built"):
        build((tmp_path / "not mounted", *source[1:]), tmp_path, grid=Grid(24, 15.0))
    assert bytes_of(tmp_path) == before
    assert set(build(source, tmp_path)[1].values()) == {"kept"}


def test_a_table_of_another_build_is_noticed(source, tmp_path):
    cohort, _ = build(source, tmp_path)
    runs.save_table(cohort, tmp_path / "cohort.parquet")
    one, two = (tmp_path / file for file in cohort.file[:2])
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    with pytest.raises(volumes.CorruptVolume, match="is not the volume that cohort.parquet tells of"):
        load_cohort(tmp_path)
    one.write_bytes(content)
    load_cohort(tmp_path)
    build(source, tmp_path, grid=Grid(24, 12.0))           # and killed before its table was saved
    with pytest.raises(volumes.CorruptVolume, match="run chapter 3 to its end"):
        load_cohort(tmp_path)


def test_a_pet_that_could_not_be_read_is_tried_again(source, tmp_path):
    (tmp_path / "volumes").mkdir()
    job = next(volumes._jobs(*source, tmp_path / "volumes", GRID))
    away = dataclasses.replace(job["ct"], root=str(tmp_path / "away"), modality="PT", suv_factors=np.ones(16))
    job["pets"], job["pet_words"] = [away], ""
    row, outcome = volumes.ensure_volume(job)
    assert outcome == "built" and not row["has_pet"] and row["pet"].startswith("could not be read")
    assert volumes.ensure_volume(job)[1] == "built"        # not kept: the disk may be back
    job["pets"] = [dataclasses.replace(away, root=job["ct"].root)]
    row, outcome = volumes.ensure_volume(job)
    assert outcome == "built" and row["has_pet"] and volumes.ensure_volume(job)[1] == "kept"


def test_the_best_pet_is_tried_again_where_another_stood_in(source, tmp_path):
    (tmp_path / "volumes").mkdir()
    job = next(volumes._jobs(*source, tmp_path / "volumes", GRID))
    best, second = (dataclasses.replace(job["ct"], stack_id=name, modality="PT", suv_factors=np.ones(16))
                    for name in ("best", "second"))
    job["pets"], job["pet_words"] = [dataclasses.replace(best, root=str(tmp_path / "away")), second], ""
    assert volumes.ensure_volume(job)[0]["pet_stack_id"] == "second"
    job["pets"] = [best, second]
    row, outcome = volumes.ensure_volume(job)
    assert (row["pet_stack_id"], outcome) == ("best", "built") and volumes.ensure_volume(job)[1] == "kept"


def test_two_builds_of_one_store_at_once_give_one_store(source, tmp_path):
    root, *frames = source
    for name, frame in zip(("instances", "stacks", "lesions", "boxes"), frames, strict=True):
        runs.save_table(frame, tmp_path / f"{name}.parquet")
    build(source, tmp_path / "alone")
    script = tmp_path / "build.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(tmp_path / "out"), str(root), str(tmp_path)]
    pair = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for _ in "ab"]
    for process in pair:
        process.communicate("1\n", timeout=120)
    assert [process.returncode for process in pair] == [0, 0]
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")
    assert not list((tmp_path / "out" / "volumes").glob(".*"))


KILLED = """
import sys, time
import pandas as pd
from lungct import volumes
if __name__ == "__main__":
    out, root, tables = sys.argv[1:]
    frames = [pd.read_parquet(f"{tables}/{name}.parquet") for name in ("instances", "stacks", "lesions", "boxes")]
    volumes.build_cohort(root, *frames, out, volumes.Grid(24, 16.0), workers=int(sys.stdin.readline()),
                         on_done=lambda stack_id, outcome: (print(stack_id, flush=True), time.sleep(0.2)))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_sigkill_in_the_middle_then_the_next_call_completes(source, tmp_path, workers):
    root, *frames = source
    for name, frame in zip(("instances", "stacks", "lesions", "boxes"), frames, strict=True):
        runs.save_table(frame, tmp_path / f"{name}.parquet")
    build(source, tmp_path / "undisturbed")
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(tmp_path / "out"), str(root), str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdin.write(f"{workers}\n")
    process.stdin.flush()
    assert process.stdout.readline()  # one stack is done, others are on their way
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    left = bytes_of(tmp_path / "out")
    assert left and all(load_volume(tmp_path / "out" / "volumes" / name) for name in left)
    build(source, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "undisturbed")


def test_old_leftovers_are_swept_and_fresh_ones_left_alone(source, tmp_path):
    folder = tmp_path / "volumes"
    folder.mkdir()
    old, fresh = folder / ".a.npz.x.part", folder / ".b.npz.y.part"
    for part in (old, fresh):
        part.write_bytes(b"half")
    os.utime(old, (0, 0))
    build(source, tmp_path)
    assert not old.exists() and fresh.exists()


@pytest.mark.parametrize("seconds", [0, 5], ids=["all jobs given out", "more jobs to come"])
def test_a_worker_that_dies_costs_one_stack(source, tmp_path, seconds):
    """The job of one stack kills its process; the others are built all the same."""
    jobs = list(volumes._jobs(*source, tmp_path / "volumes", GRID))
    (tmp_path / "volumes").mkdir()
    jobs[1]["stack_id"] = Suicide(jobs[1]["stack_id"])

    def made_ready():
        yield from jobs[:3]
        time.sleep(seconds)  # meanwhile the pool breaks
        yield from jobs[3:]

    rows = [row for row, _ in volumes._in_processes(made_ready(), 2)]
    assert sorted(row["status"] for row in rows) == ["accepted"] * 5 + ["excluded"]
    dead = next(row for row in rows if row["status"] == "excluded")
    assert dead["reason"] == volumes.BuildProblem.WORKER_DIED.value


class Suicide(str):
    """A name that kills the process which unpickles it."""

    def __reduce__(self):
        return (_die, ())


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_unreachable_scheduler_is_a_clear_error_within_seconds(source, tmp_path):
    start = time.monotonic()
    with pytest.raises(runs.InputError, match=r"no dask scheduler answers at 'tcp://127.0.0.1:9'"):
        build(source, tmp_path, scheduler="tcp://127.0.0.1:9")
    assert time.monotonic() - start < 20


def test_dask_workers_give_the_same_bytes(source, tmp_path):
    distributed = pytest.importorskip("distributed")
    one, _ = build(source, tmp_path / "one")
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster:
        two, _ = build(source, tmp_path / "two", scheduler=cluster.scheduler_address)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    pd.testing.assert_frame_equal(one, two)


# ------------------------------------------------------------------ PET


def pet_tables(**pets):
    """A CT of 20 slices and one PET, and others that differ from it by what is given."""
    ct = {"stack_id": "ct", "modality": "CT", "status": "accepted", "reason": None, "slices": 20, "rows": 4,
          "columns": 4, "affine": np.eye(4).ravel().tolist(), "patient_id": "p", "study_uid": "s", "series_uid": "1",
          "frame_of_reference_uid": "f", "series_type": "WHOLE BODY\\IMAGE", "suv_refusal": None,
          "first_acquisition_date": "20200101", "first_acquisition_time": "100000"}
    pet = {**ct, "stack_id": "pet", "modality": "PT", "series_uid": "2"}
    others = [{**pet, "stack_id": name, "series_uid": name} | more for name, more in pets.items()]
    return pd.DataFrame([ct, pet, *others])


def raised(mm):
    affine = np.eye(4)
    affine[2, 3] = mm
    return affine.ravel().tolist()


@pytest.mark.parametrize(("changes", "words"), [
    ({"frame_of_reference_uid": "g"}, "PET in another frame of reference"),
    ({"frame_of_reference_uid": None}, "frame of reference not told"),
    ({"study_uid": "t"}, "no PET in this study"),
    ({"patient_id": "q"}, "no PET in this study"),
    ({"status": "excluded", "reason": "gap"}, "PET excluded: gap"),
    ({"series_type": "DYNAMIC\\IMAGE"}, "PET of several frames or gates"),
    ({"series_type": "GATED\\IMAGE"}, "PET of several frames or gates"),
])
def test_pet_is_taken_only_from_the_same_space_and_says_why_not(changes, words):
    stacks = pet_tables()
    assert volumes.choose_pets(stacks.iloc[0], stacks) == (["pet"], "")
    for column, value in changes.items():
        stacks.loc[1, column] = value
    assert volumes.choose_pets(stacks.iloc[0], stacks) == ([], words)
    assert volumes.choose_pets(stacks.iloc[0], stacks[:0]) == ([], "no PET in this study")


def test_patients_without_an_id_are_one_where_the_study_is():
    stacks = pet_tables().assign(patient_id=None)
    assert volumes.choose_pets(stacks.iloc[0], stacks) == (["pet"], "")


def test_a_ct_that_tells_no_frame_of_reference_gets_no_pet():
    stacks = pet_tables()
    stacks.loc[0, "frame_of_reference_uid"] = None
    assert volumes.choose_pets(stacks.iloc[0], stacks) == ([], "frame of reference not told")


def test_pets_are_tried_by_what_they_cover_and_then_by_time():
    stacks = pet_tables(
        head={"slices": 200, "affine": raised(19), "first_acquisition_time": "090000"},
        early={"first_acquisition_time": "095959"}, day_before={"first_acquisition_date": "20191231"},
        half={"slices": 10, "first_acquisition_time": "090000"}, nearly={"slices": 40, "affine": raised(0.4)},
        dynamic={"series_type": "DYNAMIC\\IMAGE", "first_acquisition_time": "080000"})
    shuffled = stacks.sample(frac=1, random_state=0)
    order = volumes.choose_pets(stacks.iloc[0], shuffled)[0]
    assert order == ["day_before", "early", "nearly", "pet", "half", "head"]


@pytest.mark.parametrize("nothing", [None, np.nan, pd.NA])
def test_pets_that_tell_no_type_and_no_time_are_taken(nothing):
    stacks = pet_tables(second={})
    for column in ("series_type", "suv_refusal", "first_acquisition_date", "first_acquisition_time"):
        stacks[column] = nothing
    assert volumes.choose_pets(stacks.iloc[0], stacks)[0] == ["pet", "second"]


def test_stacks_of_one_series_and_place_are_frames_unless_one_has_no_suv():
    frames = pet_tables(second={"series_uid": "2"})
    assert volumes.choose_pets(frames.iloc[0], frames) == ([], "PET of several frames or gates")
    frames.loc[2, "suv_refusal"] = "not corrected for attenuation"
    assert volumes.choose_pets(frames.iloc[0], frames)[0] == ["pet", "second"]
    beds = pet_tables(second={"series_uid": "2", "affine": raised(18)})
    assert volumes.choose_pets(beds.iloc[0], beds)[0] == ["pet", "second"]


def test_what_can_be_opened_is_and_of_the_others_all_reasons_are_told(monkeypatch):
    def open_stack(stack, instances, root):
        if stack.stack_id == "fine":
            return stack.stack_id
        raise dicom.SuvError(f"no SUV in {stack.stack_id}")

    monkeypatch.setattr(dicom, "open_stack", open_stack)
    candidates = [pd.Series({"stack_id": stack_id}) for stack_id in ("one", "fine", "two")]
    files = dict.fromkeys(("one", "fine", "two"))
    assert volumes._open_all(candidates, files, ".") == (["fine"], "no SUV in one; no SUV in two")
    assert volumes._open_all([], files, ".") == ([], "")


def pet_at(stack_id, mm, suv):
    values = np.full((4, 4, 4), suv, np.float32)
    return dicom.Stack(stack_id, None, affine_of((6, 6, 6), (mm, -9, -9)), "PT", (), 0, values)


def test_the_first_pet_that_reaches_the_cube_and_can_be_read_is_laid(monkeypatch):
    grid, lattice = Grid(6, 6.0), volumes.to_lattice

    def to_lattice(stack, spacing_mm):
        if stack.stack_id == "broken":
            raise ValueError("cut off")
        return lattice(stack, spacing_mm)

    monkeypatch.setattr(volumes, "to_lattice", to_lattice)
    far, broken, near, other = (pet_at(*pet) for pet in (("far", 900, 9), ("broken", -9, 9), ("near", -9, 2.5),
                                                         ("other", -9, 7)))
    suv, told = volumes._lay([far, near, other], "", grid.affine((0, 0, 0)), grid)
    assert np.nanmax(suv) == pytest.approx(2.5) and told == {"pet": "same frame of reference", "pet_stack_id": "near"}
    suv, told = volumes._lay([broken, near], "", grid.affine((0, 0, 0)), grid)
    assert told == {"pet": "same frame of reference; could not be read: cut off", "pet_stack_id": "near"}
    suv, told = volumes._lay([far, broken], "left out: no SUV", grid.affine((0, 0, 0)), grid)
    assert suv is None
    assert told == {"pet": "left out: no SUV; PET does not reach this cube; could not be read: cut off"}


def test_suv_lies_on_the_same_voxels_and_outside_it_is_not_known():
    pet = dicom.Stack("pet", None, affine_of((6, 6, 6), (-9, -9, -9)), "PT", (), 0, np.full((4, 4, 4), 2.5, np.float32))
    affine = Grid(6, 6.0).affine((0, 0, 0))
    suv = volumes.cut_cube(volumes.to_lattice(pet, 6.0), affine, 6)
    assert suv.dtype == np.float32 and np.nansum(suv) == pytest.approx(64 * 2.5) and np.isnan(suv[0, 0, 0])


# ------------------------------------------------------------------ the lattice


@pytest.mark.parametrize("name", sorted(FLIPS))
@pytest.mark.parametrize("size, spacing", [(24, 6.0), (40, 3.5), (10, 16.0)])
def test_a_cube_cut_from_the_lattice_is_the_cube_resampled_directly(name, size, spacing):
    turned = np.eye(4)
    turned[:3, :3] = FLIPS[name]
    stack = thorax(shape=(20, 40, 45), spacing=(14.0, 10.0, 9.0), noise=50)
    stack = stack_of(stack.hu_zyx, turned @ stack.affine)
    cube, affine, _ = volumes.to_cube(stack, Grid(size, spacing))
    directly = resample_area(stack.hu_zyx, stack.affine, affine, cube.shape, volumes.AIR_HU)
    edges = np.abs(directly - cube)
    oblique = "oblique" in name
    assert edges.max() <= (60 if oblique else 0.51)        # oblique: the averages before the samples begin elsewhere
    assert edges.mean() < (3 if oblique else 0.5)


def test_a_cube_that_reaches_out_of_the_scan_is_air_there():
    stack = stack_of(np.zeros((4, 4, 4)), affine_of((6, 6, 6), (3, 3, 3)))
    lattice = volumes.to_lattice(stack, 6.0)
    assert np.array_equal(lattice.affine, stack.affine)
    for centre, inside in (((12, 12, 12), 64), ((0, 12, 12), 32), ((300, 0, 0), 0)):
        cube = volumes.cut_cube(lattice, Grid(4, 6.0).affine(centre), 4)
        assert (cube == 0).sum() == inside and (cube[cube != 0] == -1024).all()


@settings(max_examples=40, deadline=None)
@given(spacing=st.tuples(*[st.floats(0.4, 12)] * 3), origin=st.tuples(*[st.floats(-300, 300)] * 3),
       step=st.floats(1, 12), turn=st.floats(0, 90))
def test_the_lattice_holds_the_whole_stack_and_hardly_more(spacing, origin, step, turn):
    affine = affine_of(spacing, origin, rotation(turn))
    values = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7))
    lattice = volumes.to_lattice(stack_of(values, affine), step)
    corners = dicom.to_mm(affine, [[x, y, z] for x in (-0.5, 6.5) for y in (-0.5, 5.5) for z in (-0.5, 4.5)])
    edges = dicom.to_voxel(lattice.affine, corners) + 0.5
    assert edges.min() > -1e-4 and (edges.max(axis=0) < np.array(lattice.hu_zyx.shape[::-1]) + 1e-4).all()
    assert np.abs(edges.max(axis=0) - lattice.hu_zyx.shape[::-1]).max() < 1 + 1e-4


def test_two_reconstructions_of_one_scan_are_sampled_at_the_same_places():
    stack = thorax()
    thick = stack_of(stack.hu_zyx[1::2] // 2 + stack.hu_zyx[::2] // 2,
                     stack.affine @ affine_of((1, 1, 2), (0, 0, 0.5)))
    one, two = (volumes.to_cube(some, Grid()) for some in (stack, thick))
    steps = (one[1][:3, 3] - two[1][:3, 3]) / 6.0
    assert np.allclose(steps, np.rint(steps)) and np.abs(steps).max() <= 1


# ------------------------------------------------------------------ phantoms and real series


def test_no_tumour_of_the_phantoms_is_cut(phantom_dir, tmp_path):
    root = phantom_dir / "Lung-PET-CT-Dx"
    instances, _ = dicom.index_dicom(root, workers=1)
    stacks, instances = dicom.build_stacks(instances)
    empty = [table.assign(stack_id=pd.Series(dtype="str")) for table in lesion_tables({}, SOURCE)]
    cohort = build_cohort(root, instances, stacks, *empty, tmp_path, Grid(), workers=1)
    assert (cohort.status == "accepted").all() and (cohort.centred_on == "lungs").mean() > 0.9
    truth = pd.read_parquet(phantom_dir / "truth" / "lesions.parquet").merge(cohort, on="series_uid")
    assert len(truth) > 8
    for row in truth.itertuples():
        hull = [getattr(row, name) for name in volumes.CORNERS_MM]
        box = volumes.boxes_to_grid(np.reshape(row.affine, (4, 4)), [hull])
        assert box.min() >= 0 and box.max() <= 64, f"{row.stack_id}: {box}"


def test_real_series_build(real_data, tmp_path):
    root = Path(real_data) / "Lung-PET-CT-Dx" / "Lung_Dx-A0006"
    instances, _ = dicom.index_dicom(root, workers=1)
    stacks, instances = dicom.build_stacks(instances)
    lesions, boxes = lesion_tables({}, SOURCE)
    empty = [t.assign(stack_id=pd.Series(dtype="str")) for t in (lesions, boxes)]
    cohort = build_cohort(root, instances, stacks, *empty, tmp_path, Grid(), workers=1)
    assert len(cohort) >= 2 and (cohort.status == "accepted").all() and (cohort.centred_on == "lungs").all()
    assert ((cohort.hu_mean > -950) & (cohort.hu_mean < -200)).all() and (cohort.lung_litres > 0.4).all()


def test_a_grid_of_whole_millimetres_is_the_same_grid_as_with_a_decimal_point():
    whole, decimal = volumes.Grid(64, 6), volumes.Grid(64, 6.0)
    assert repr(whole) == repr(decimal) and hash(whole) == hash(decimal)


# ---------------------------------------------------------------- what a careless change would have turned round


def test_a_lattice_is_kept_only_where_the_stack_lies_on_it():
    affine = np.diag([6.0, 6, 6, 1])
    affine[:3, 3] = 1
    moved = volumes.to_lattice(dicom.Stack("t", np.zeros((3, 3, 3), np.int16), affine, "CT", (), 0), 6.0)
    assert np.allclose(moved.affine[:3, 3] % 6, 3)
    told = dicom.Stack("t", np.zeros((2, 2, 2), np.int16), np.diag([3.0, 3, 3, 1]), "CT", (), 0, None, "1.2")
    assert volumes.to_lattice(told, 6.0).frame_of_reference_uid == "1.2"


def test_lungs_are_looked_for_on_the_fine_lattice(monkeypatch):
    seen = []
    monkeypatch.setattr(volumes, "find_lungs", lambda stack: (
        seen.append(stack.affine[0, 0]), volumes.Lungs((0.0, 0.0, 0.0), "stack", 0.0))[1])
    stack = dicom.Stack("t", np.zeros((4, 4, 4), np.int16), np.diag([16.0, 16, 16, 1]), "CT", (), 0)
    volumes.to_cube(stack, volumes.Grid(2, 16.0))
    assert seen == [volumes.COARSE_MM]


def test_numbers_beyond_16_bits_stay_at_their_end():
    affine = np.diag([6.0, 6, 6, 1])
    affine[:3, 3] = 3
    stack = dicom.Stack("t", np.full((4, 4, 4), 40000.0, np.float32), affine, "CT", (), 0)
    assert volumes.to_cube(stack, volumes.Grid(2, 6.0))[0].max() == 2**15 - 1


def test_a_mask_of_256_lesions_is_refused():
    names, affine = [str(i) for i in range(256)], np.diag([6.0, 6, 6, 1])
    affine[:3, 3] = 3
    lesions = pd.DataFrame({"lesion_id": names, **{c: 0.0 if "0" in c else 6.0 for c in volumes.CORNERS_MM}})
    boxes = pd.DataFrame({"lesion_id": names, "slice_index": 0, "xmin": 0, "ymin": 0, "xmax": 1, "ymax": 1})
    with pytest.raises(ValueError, match="at most 255 lesions, got 256"):
        volumes.place_lesions(lesions, boxes, affine, affine, 2)


def key_of(suv=None, words="", edge=0.1):
    opened = dicom.OpenStack("s", np.eye(4), "CT", "f", ({"path": "x"},), "/r", suv)
    lesions, boxes = pd.DataFrame({"a": [0.1]}), pd.DataFrame({"a": [edge]})
    return volumes._key({"ct": opened, "pets": [], "lesions": lesions, "boxes": boxes, "stack_id": "s",
                         "grid": (2, 6.0), "pet_words": words})


def test_whatever_makes_an_entry_is_in_its_key():
    keys = [key_of(), key_of(edge=0.2), key_of(edge=0.1 + 1e-12), key_of(words="a"), key_of(suv=np.ones(1)),
            key_of(suv=np.full(1, 2.0))]
    assert len(set(keys)) == len(keys) and key_of() == key_of()
    assert volumes._content_hash({"a": np.zeros((2, 3))}, {}) != volumes._content_hash({"a": np.zeros((3, 2))}, {})


def test_facts_by_hand():
    body = np.full((40, 60, 60), -1000, np.int16)
    body[5:35, 10:50, 10:50] = 0
    body[10:30, 20:40, 15:28] = -850
    facts, tissue = volumes.volume_facts(body, 6.0), (30 * 40 * 40 - 20 * 20 * 13) * 216e-6
    assert facts["lung_share"] == pytest.approx(facts["lung_litres"] / (facts["lung_litres"] + tissue), abs=0.01)
    steep = np.zeros((4, 4, 4), np.int16)
    steep[:, :, ::2], steep[:, :, 1::2] = 32700, -300
    assert volumes.volume_facts(steep, 6.0)["roughness_hu"] == 33000       # more than 16 bits can tell
    assert volumes.volume_facts(np.full((4, 4, 4), 40, np.int16), 6.0)["tissue_density"] == 1.04


def test_facts_are_compared_with_both_ends_of_their_range():
    many = [dict.fromkeys(volumes.FACT_FACTORS, float(i)) for i in range(101)]
    assert volumes.facts_range(many) == {key: [1.0, 99.0] for key in volumes.FACT_FACTORS}
    trained, usual = {key: [1.0, 4.0] for key in volumes.FACT_FACTORS}, dict.fromkeys(volumes.FACT_FACTORS, 4.0)
    assert volumes.unlike_training(usual, trained) is None
    assert volumes.unlike_training(usual | {"lung_litres": 13.0}, trained)


def test_half_a_degree_is_not_parallel():
    turned, target = affine_of((0.8, 0.8, 5.0), (-100, -100, -100), rotation(0.5)), Grid(64, 6.0).affine((0, 0, 0))
    assert volumes._aligned_spans((41, 256, 256), turned, np.linalg.inv(turned) @ target, (64,) * 3) is None


def test_a_small_lesion_in_a_large_one_keeps_its_voxels():
    rectangles = {"small": dict.fromkeys(range(19, 22), (116, 116, 140, 140)),
                  "big": dict.fromkeys(range(15, 26), (90, 90, 170, 170))}
    grid, (lesions, boxes) = Grid(40, 6.0).affine((0, 0, 0)), lesion_tables(rectangles, SOURCE)
    both = volumes.place_lesions(lesions, boxes, SOURCE, grid, 40)["mask"]
    alone = volumes.place_lesions(lesions[:1], boxes, SOURCE, grid, 40)["mask"]
    assert np.array_equal(both == 1, alone == 1) and (alone == 1).sum() > 8


def test_a_belly_to_one_side_does_not_move_the_cube():
    plain = thorax(shape=(70, 80, 90))
    hu, low = plain.hu_zyx.copy(), np.flatnonzero((plain.hu_zyx == -850).any(axis=(1, 2)))[0]
    hu[:low - 1] = np.roll(hu[:low - 1], 12, axis=2)
    assert np.allclose(find_lungs(stack_of(hu, plain.affine)).centre_mm, find_lungs(plain).centre_mm, atol=3)


def test_without_lungs_the_middle_is_between_the_ends_of_the_body():
    hu = np.full((30, 40, 60), -1000, np.int16)
    hu[5:25, 5:35, 5:30] = hu[5:25, 15:25, 30:55] = 40
    found = find_lungs(stack_of(hu, affine_of((6, 6, 6), (3, 3, 3))))
    assert found.centred_on == "body" and found.centre_mm[0] == pytest.approx(180, abs=6)


def test_a_lung_at_the_edge_of_the_image_counts():
    plain = thorax()
    cut = stack_of(plain.hu_zyx[:, :, :58], plain.affine)
    assert find_lungs(cut).litres == pytest.approx(np.count_nonzero(cut.hu_zyx == -850) * 200 / 1e6, rel=0.1)


@pytest.mark.parametrize("lies, lung", [((slice(None), slice(4, 7), slice(5, 25)), False),
                                        ((slice(None), slice(5, 25), slice(4, 7)), True)])
def test_depth_is_from_front_to_back(lies, lung):
    piece = np.zeros((10, 30, 30), bool)
    piece[lies] = True
    assert volumes._looks_like_lung(piece, piece, np.full(piece.shape, -915.0)) == lung


def test_gas_is_judged_without_its_rim():
    piece, core = np.zeros((8, 8, 8), bool), np.zeros((8, 8, 8), bool)
    piece[1:7, 1:7, 1:7] = core[2:6, 2:6, 2:6] = True
    assert not volumes._looks_like_lung(piece, core, np.where(core, -995.0, -850.0))


@pytest.mark.parametrize("deep, some", [(31, True), (33, False)])
def test_more_than_ten_litres_are_no_lung(deep, some):
    air = np.zeros((44, 44, 44), bool)
    air[1:1 + deep, 1:39, 1:39] = True
    assert (air.sum() * volumes.VOXEL_LITRES <= 10) == some
    assert volumes._lung_pieces(np.where(air, -850.0, 40.0), air).any() == some


def test_a_mended_pet_is_built_anew(source, tmp_path):
    (tmp_path / "volumes").mkdir()
    shutil.copytree(source[0], tmp_path / "pet")
    job = next(volumes._jobs(*source, tmp_path / "volumes", GRID))
    pet = dataclasses.replace(job["ct"], root=str(tmp_path / "pet"), modality="PT", suv_factors=np.ones(16))
    job["pets"], job["pet_words"] = [pet], ""
    assert [volumes.ensure_volume(job)[1] for _ in range(2)] == ["built", "kept"]
    os.utime(tmp_path / "pet" / pet.slices[0]["path"])
    assert volumes.ensure_volume(job)[1] == "built"


def test_an_image_behind_a_link_that_changes_is_noticed(source, tmp_path):
    (tmp_path / "volumes").mkdir()
    shutil.copytree(source[0], tmp_path / "real")
    for path in (tmp_path / "real").rglob("*.dcm"):
        link = tmp_path / "linked" / path.relative_to(tmp_path / "real")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    job = next(volumes._jobs(tmp_path / "linked", *source[1:], tmp_path / "volumes", GRID))
    assert [volumes.ensure_volume(job)[1] for _ in range(2)] == ["built", "kept"]
    os.utime(tmp_path / "real" / job["ct"].slices[0]["path"])
    assert volumes.ensure_volume(job)[1] == "built"


def test_an_image_that_changes_while_it_is_read_is_read_again(source, tmp_path, monkeypatch):
    (tmp_path / "volumes").mkdir()
    shutil.copytree(source[0], tmp_path / "images")
    job = next(volumes._jobs(tmp_path / "images", *source[1:], tmp_path / "volumes", GRID))
    compute = volumes._compute

    def slow(job):
        answer, path = compute(job), tmp_path / "images" / job["ct"].slices[8]["path"]
        path.write_bytes(path.read_bytes()[:-3000] + bytes(3000))          # read already, and not yet stored
        return answer

    monkeypatch.setattr(volumes, "_compute", slow)
    assert volumes.ensure_volume(job)[1] == "built"
    monkeypatch.undo()
    time.sleep(0.05)                                           # the clock that dates files ticks every few milliseconds
    assert [volumes.ensure_volume(job)[1] for _ in range(2)] == ["built", "kept"]
