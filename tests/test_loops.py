"""The compiled sums against matrices in double precision, and where their machine code may not be kept."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungct import loops
from lungct.volumes import axis_spans

KINDS = [np.int16, np.uint16, np.int32, np.int64, np.uint8, np.float32, np.float64]


def numbers(random, kind, shape):
    if np.dtype(kind).kind == "f":
        return random.normal(0, 1000, shape).astype(kind)
    ends = np.iinfo(kind)
    return random.integers(max(ends.min, -(2**20)), min(ends.max, 2**20), shape, endpoint=True).astype(kind)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), n=st.integers(1, 40), wide=st.integers(1, 9), step=st.floats(0.3, 50),
       first=st.floats(-30, 40), targets=st.integers(1, 9), floor=st.sampled_from([-np.inf, -1000, 24, 23.5, 70000]),
       shift=st.sampled_from([0, -1024, 32767, 0.5]), seed=st.integers(0, 2**32 - 1))
def test_sums_of_rows_are_those_of_the_matrix(kind, n, wide, step, first, targets, floor, shift, seed):
    plane, spans = numbers(np.random.default_rng(seed), kind, (n, wide)), axis_spans(n, first, step, targets)
    before, out = plane.copy(), np.full((targets, wide), np.nan, np.float32)
    loops.sum_rows(plane, *spans, out, floor, shift)
    want = spans.matrix(n).astype(float) @ (np.maximum(plane.astype(float), floor) + shift)
    assert np.array_equal(plane, before)
    assert abs(out - want).max() <= 1e-6 * (abs(plane.astype(float)).max() + abs(shift) + max(floor, 0))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 60), high=st.integers(1, 11), step=st.floats(0.3, 50), first=st.floats(-30, 70),
       backwards=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_sums_of_columns_are_those_of_the_matrix(n, high, step, first, backwards, seed):
    rows = np.random.default_rng(seed).normal(0, 1000, (high, n)).astype(np.float32)
    spans = axis_spans(n, first, -step if backwards else step, 7)
    out = np.full((high, 7), np.nan, np.float32)
    loops.sum_columns(rows, *spans, out)
    assert abs(out - rows @ spans.matrix(n).T.astype(float)).max() <= 1e-6 * abs(rows).max() + 1e-6


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), high=st.integers(1, 90), wide=st.integers(1, 30), step=st.floats(0.3, 9),
       first=st.floats(-9, 20), shape=st.tuples(st.integers(1, 40), st.integers(1, 9)), backwards=st.booleans(),
       floor=st.sampled_from([-np.inf, -1000, 23.5]), seed=st.integers(0, 2**32 - 1))
def test_a_slice_in_one_go_has_the_bits_of_rows_then_columns(kind, high, wide, step, first, shape, backwards, floor,
                                                             seed):
    plane = numbers(np.random.default_rng(seed), kind, (high, wide))
    rows = axis_spans(high, first, -step if backwards else step, shape[0])
    columns = axis_spans(wide, first, step, shape[1])
    half, want, out = (np.full(size, np.nan, np.float32) for size in ((shape[0], wide), shape, shape))
    loops.sum_rows(plane, *rows, half, floor, -7)
    loops.sum_columns(half, *columns, want)
    loops.sum_plane(plane, rows, columns, out, floor, -7)
    assert np.array_equal(out, want)


@pytest.mark.parametrize("rows", [2**14, 2**15, 2**16])
@pytest.mark.parametrize("kind, value", [(np.uint16, 2**16 - 1), (np.int16, -(2**15))])
@pytest.mark.parametrize("shift", [0, 2**15 - 1, -(2**15) + 1])
def test_sums_of_sixteen_bits_do_not_overflow(rows, kind, value, shift):
    out, span = np.empty((1, 1), np.float32), (np.array([0]), np.array([rows - 1]), np.ones((1, 3), np.float32))
    loops.sum_rows(np.full((rows, 1), value, kind), *span, out, shift=shift)
    assert out.item() == pytest.approx(rows * (value + shift), rel=1e-4, abs=1)


@pytest.mark.parametrize("first, last, wide, told", [
    (-1, 1, 4, "span leaves"), (0, 8, 4, "span leaves"), (7, 8, 4, "span leaves"), (0, 10**10, 4, "span leaves"),
    (0, 1, 5, "another shape"), (0, 1, 3, "another shape")])
def test_what_lies_outside_is_refused_before_it_is_read(first, last, wide, told):
    span = np.array([first]), np.array([last]), np.ones((1, 3), np.float32)
    with pytest.raises(ValueError, match=told):
        loops.sum_rows(np.ones((8, 4), np.int16), *span, np.empty((1, wide), np.float32))
    with pytest.raises(ValueError, match=told):
        loops.sum_columns(np.ones((4, 8), np.float32), *span, np.empty((wide, 1), np.float32))


@pytest.mark.parametrize("first, last", [(2, 1), (10**10, 0), (0, -(10**10))])
def test_a_span_of_nothing_is_nothing_wherever_it_lies(first, last):
    span = np.array([first]), np.array([last]), np.ones((1, 3), np.float32)
    across, down = np.full((1, 4), np.nan, np.float32), np.full((4, 1), np.nan, np.float32)
    loops.sum_rows(np.ones((8, 4), np.int16), *span, across)
    loops.sum_columns(np.ones((4, 8), np.float32), *span, down)
    assert not across.any() and not down.any()


@pytest.mark.parametrize("short", ["last", "shares"])
def test_spans_of_different_lengths_are_refused(short):
    span = {"first": np.array([0, 1]), "last": np.array([1, 2]), "shares": np.ones((2, 3), np.float32)}
    span[short] = span[short][:1]
    with pytest.raises(ValueError, match="not of one length"):
        loops.sum_rows(np.ones((8, 4), np.int16), *span.values(), np.empty((2, 4), np.float32))
    with pytest.raises(ValueError, match="not of one length"):
        loops.sum_columns(np.ones((4, 8), np.float32), *span.values(), np.empty((4, 2), np.float32))


def test_a_moved_volume_is_the_product_of_its_matrices():
    random = np.random.default_rng(0)
    volume, along_z = random.normal(0, 1, (5, 12)).astype(np.float32), random.random((5, 5)).astype(np.float32)
    corners, weights = random.integers(0, 12, (12, 4), dtype=np.int32), random.random((12, 4)).astype(np.float32)
    along_z[2] = 0                                             # a slice of air
    out = np.full_like(volume, np.nan)
    loops.move(volume, along_z, corners, weights, out)
    in_plane = np.zeros((12, 12))
    np.add.at(in_plane, (np.arange(12)[:, None], corners), weights)
    assert np.allclose(out, along_z.astype(float) @ volume @ in_plane.T, atol=1e-5) and not out[2].any()
    for wrong in (12, -1, -(2**31)):
        corners[3, 1] = wrong
        with pytest.raises(ValueError, match="corner leaves"):
            loops.move(volume, along_z, corners, weights, out)
    for odd in ((along_z[:1, :1], weights), (along_z, weights[:3])):
        with pytest.raises(ValueError, match="another shape"):
            loops.move(volume, odd[0], np.zeros((12, 4), np.int32), odd[1], out)


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_in_its_own_span(strange):
    plane, spans = np.ones((8, 4), np.float32), axis_spans(8, 0, 2, 4)
    plane[3, 1] = strange
    out, narrow = np.empty((4, 4), np.float32), np.empty((4, 2), np.float32)
    loops.sum_rows(plane, *spans, out)
    loops.sum_columns(out, *axis_spans(4, 0, 2, 2), narrow)
    assert np.argwhere(~np.isfinite(out)).tolist() == [[1, 1]]
    assert np.array_equal(narrow[1, 0], np.float32(strange), equal_nan=True)
    assert np.isfinite(narrow).sum() == 7


def test_slices_in_any_layout():
    plane, spans = np.arange(80, dtype=np.int16).reshape(8, 10), axis_spans(4, 0, 2, 2)
    out = np.empty((2, 5), np.float32)
    loops.sum_rows(plane[::2, ::2], *spans, out)
    assert np.array_equal(out, plane[::2, ::2].reshape(2, 2, 5).mean(axis=1))


def test_code_that_cannot_be_kept_is_compiled_all_the_same(monkeypatch):
    real = loops.numba.njit

    def nowhere(cache=False, **ways):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(**ways)

    monkeypatch.setattr(loops.numba, "njit", nowhere)
    assert loops._compiled(lambda a, b: a + b)(2, 3) == 5


@pytest.mark.parametrize("oddity", ["raise OSError(28, 'No space left on device')", "out[:] = 0"])
def test_kept_code_that_is_not_what_was_asked_for_is_left_alone(oddity):
    """The first calls notice, and this process compiles for itself."""
    code = f"""
import numba
real = numba.njit

def njit(cache=False, **ways):
    def kept(function):
        def odd(*given):
            out = given[-1]
            {oddity}
        odd.py_func = function
        return odd
    return kept if cache else real(**ways)

numba.njit = njit
import numpy as np
from lungct import loops
out = np.empty((1, 1), np.float32)
loops.sum_rows(np.array([[2], [3]], np.int16), np.array([0]), np.array([1]), np.ones((1, 3), np.float32), out)
print(out.item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["5.0"], done.stderr


@pytest.mark.parametrize("high", [1, 3])
def test_a_slice_goes_into_its_own_shape_alone(high):
    rows, columns = axis_spans(8, 0, 4, 2), axis_spans(4, 0, 2, 2)
    with pytest.raises(ValueError, match="another shape"):
        loops.sum_plane(np.ones((8, 4), np.int16), rows, columns, np.empty((high, 2), np.float32))
