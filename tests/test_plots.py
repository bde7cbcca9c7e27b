"""Pictures keep millimetres, colours and sides, and say when there is nothing to show."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lungct import plots


@pytest.fixture()
def ax():
    fig, ax = plt.subplots()
    yield ax
    fig.canvas.draw()                                      # everything drawn must also render
    plt.close(fig)


@pytest.fixture()
def three():
    fig, axes = plt.subplots(1, 3)
    yield axes
    fig.canvas.draw()
    plt.close(fig)


def letters(ax):
    return {text.get_text() for text in ax.texts}


def test_windows():
    assert plots.window_limits("lung") == (-1350, 150)
    assert plots.window_limits((40, 400)) == (-160, 240)
    with pytest.raises(ValueError, match="window 'lungs' is unknown: expected one of lung, soft tissue"):
        plots.window_limits("lungs")
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        plots.window_limits((40, 0))


def test_subtype_colours_are_fixed_and_distinct():
    assert list(plots.SUBTYPE_COLOURS) == ["A", "B", "E", "G"]
    assert len(set(plots.SUBTYPE_COLOURS.values())) == 4


def test_slice_is_in_millimetres(ax):
    image = np.zeros((10, 20))
    assert plots.show_slice(image, ax, (2.0, 0.5), boxes=[(4, 1, 8, 3)], mask=image > 1, title="t") is ax
    assert list(ax.images[0].get_extent()) == [0, 10, 20, 0]
    assert ax.get_aspect() == 1 and "mm" in ax.get_xlabel() and "mm" in ax.get_ylabel()
    box = ax.patches[0]
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (2, 2, 2, 4)
    assert ax.images[0].get_clim() == (-1350, 150)


def test_slice_refuses_what_is_not_2d(ax):
    with pytest.raises(ValueError, match=r"2D image, got shape \(2, 3, 4\)"):
        plots.show_slice(np.zeros((2, 3, 4)), ax)


def test_boxes_need_as_many_colours(ax):
    with pytest.raises(ValueError, match="shorter"):
        plots.show_slice(np.zeros((4, 4)), ax, boxes=[(0, 0, 1, 1), (1, 1, 2, 2)], colours=["red"])


def test_planes(three):
    volume = np.zeros((4, 10, 20), np.int16)
    plots.show_planes(volume, (5, 1, 2), three, at_zyx=(2, 3, 4), boxes_zyx=[(2, 0, 0, 3, 5, 6)], mask=volume)
    extents = [list(ax.images[0].get_extent()) for ax in three]
    assert extents == [[0, 40, 10, 0], [0, 40, 0, 20], [0, 10, 0, 20]]
    assert [letters(ax) for ax in three] == [set("RLAP"), set("RLSI"), set("APSI")]
    assert [len(ax.patches) for ax in three] == [1, 1, 1]
    box = three[1].patches[0]
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (0, 10, 12, 5)


def test_planes_mark_sides_where_they_are(three):
    plots.show_planes(np.zeros((4, 10, 20)), (5, 1, 2), three)
    places = [{t.get_text(): t.get_position() for t in ax.texts} for ax in three]
    assert places[0]["R"][0] < 0.5 < places[0]["L"][0] and places[0]["P"][1] < 0.5 < places[0]["A"][1]
    assert places[1]["I"][1] < 0.5 < places[1]["S"][1] and places[2]["A"][0] < 0.5 < places[2]["P"][0]


def test_planes_leave_out_letters_and_boxes_elsewhere(three):
    elsewhere = [(2, 2, 2, 3, 3, 3)]
    plots.show_planes(np.zeros((4, 10, 20)), (5, 1, 2), three, (0, 0, 0), boxes_zyx=elsewhere, lps=False)
    assert not any(letters(ax) for ax in three) and not any(len(ax.patches) for ax in three)


def test_planes_refuse(three):
    with pytest.raises(ValueError, match=r"3D volume and 3 axes, got \(3, 4\) and 3 axes"):
        plots.show_planes(np.zeros((3, 4)), (1, 1, 1), three)


def test_montage(ax):
    images = np.arange(5)[:, None, None] * np.ones((5, 4, 6))
    plots.montage(images, ax, (2, 1), window=(2, 4), columns=3, labels=list("abcde"))
    sheet = ax.images[0].get_array()
    assert sheet.shape == (8, 18) and sheet[0, 0] == 0 and sheet[0, 17] == 2 and sheet[4, 6] == 4
    assert np.ma.getmaskarray(sheet)[7, 17] and list(ax.images[0].get_extent()) == [0, 18, 16, 0]
    assert letters(ax) == set("abcde")


def test_montage_of_nothing_and_of_mixed_shapes(ax):
    assert letters(plots.montage([], ax)) == {"nothing to show"}
    with pytest.raises(ValueError, match=r"one shape, got \[\(2, 2\), \(3, 3\)\]"):
        plots.montage([np.zeros((2, 2)), np.zeros((3, 3))], ax)


@pytest.mark.parametrize("counts", [{"A": 251, "B": 1000}, pd.Series({"A": 251, "B": 1000})])
def test_counts(ax, counts):
    plots.show_counts(counts, ax, "title", "patients", plots.SUBTYPE_COLOURS)
    assert letters(ax) == {"251", "1,000"} and ax.get_xlabel() == "patients"
    assert matplotlib.colors.to_hex(ax.patches[0].get_facecolor()).upper() == plots.SUBTYPE_COLOURS["A"]


@pytest.mark.parametrize("counts, words", [({}, "none"), (pd.Series(dtype=int), "none"), ({"A": 0}, "0")])
def test_counts_of_nothing(ax, counts, words):
    assert letters(plots.show_counts(counts, ax)) == {words}


def test_histogram(ax):
    values = np.array([-2000, -1000, 40, 40, 5000], np.int16)
    plots.show_histogram_hu(values, ax, label="one")
    plots.show_histogram_hu(values, ax, label="two", colour="red")
    assert ax.get_yscale() == "log" and ax.get_xlabel() == "HU" and set(plots.TISSUE_BANDS_HU) == letters(ax)
    assert sum(patch.get_data().values.sum() for patch in ax.patches if hasattr(patch, "get_data")) == 2 * len(values)
    assert plots.show_histogram_hu(np.zeros(0), ax) is ax


def test_curves(ax):
    frame = pd.DataFrame({"epoch": [1, 2], "loss": [2.0, 1.0], "val_loss": [2.5, 2.0], "note": ["a", "b"]})
    plots.show_curves(frame, ax, ylabel="loss")
    assert [line.get_label() for line in ax.lines] == ["loss", "val_loss"]
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--"]
    with pytest.raises(ValueError, match="no column accuracy; the table has epoch, loss, val_loss, note"):
        plots.show_curves(frame, ax, columns=["accuracy"])


def test_curves_of_an_empty_table(ax):
    assert plots.show_curves(pd.DataFrame({"epoch": [], "loss": []}), ax) is ax


def test_intervals(ax):
    plots.show_intervals(["a", "b"], [0.5, None], [0.4, None], [0.6, None], ax, reference=0.5, xlabel="AUC")
    assert letters(ax) == {"not estimable"} and len(ax.lines) == 3
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]


def test_intervals_of_nothing(ax):
    assert plots.show_intervals([], [], [], [], ax) is ax


def test_no_global_settings(ax):
    before = dict(matplotlib.rcParams)
    plots.show_counts({"a": 1}, ax)
    plots.show_slice(np.zeros((4, 4)), ax)
    assert dict(matplotlib.rcParams) == before
