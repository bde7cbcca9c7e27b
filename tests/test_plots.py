"""Pictures keep millimetres, colours and sides, and say when there is nothing to show."""

import io
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient

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
    plots.show_planes(volume, three, (5, 1, 2), at_zyx=(2, 3, 4), boxes_zyx=[(2, 0, 0, 3, 5, 6)], mask=volume)
    extents = [list(ax.images[0].get_extent()) for ax in three]
    assert extents == [[0, 40, 10, 0], [0, 40, 0, 20], [0, 10, 0, 20]]
    assert [letters(ax) for ax in three] == [set("RLAP"), set("RLSI"), set("APSI")]
    assert [len(ax.patches) for ax in three] == [1, 1, 1]
    box = three[1].patches[0]
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (0, 10, 12, 5)


def test_slice_marks_sides_only_when_told(ax):
    plots.show_slice(np.zeros((10, 20)), ax)
    assert not letters(ax)
    plots.show_slice(np.zeros((10, 20)), ax, lps=True)
    at = {text.get_text(): text.get_position() for text in ax.texts}
    assert at == {"R": (0.03, 0.5), "L": (0.97, 0.5), "A": (0.5, 0.95), "P": (0.5, 0.05)}


@pytest.mark.parametrize(("turn", "slice_is", "stack_is"), [
    (np.eye(3), True, True), (np.diag([1, 1, -1]), True, False), (np.diag([-1, 1, 1]), False, False),
    (np.diag([1, -1, 1]), False, False), (np.eye(3)[[1, 0, 2]], False, False), (np.eye(3)[[0, 2, 1]], False, False)])
def test_marks_are_right_where_columns_run_left_and_rows_back(turn, slice_is, stack_is):
    affine = np.eye(4)
    affine[:3, :3] = turn * (0.7, 0.7, 5)
    assert plots.is_lps(affine) is slice_is
    assert plots.is_lps(affine, axes=3) is stack_is
    lean = np.deg2rad(20)                                    # a head that is turned a little
    affine[:3, :3] = np.array([[np.cos(lean), -np.sin(lean), 0], [np.sin(lean), np.cos(lean), 0], [0, 0, 1]]) @ turn
    assert plots.is_lps(affine) is slice_is
    assert plots.is_lps(affine, axes=3) is stack_is


def test_planes_mark_sides_where_they_are(three):
    plots.show_planes(np.zeros((4, 10, 20)), three, (5, 1, 2))
    places = [{t.get_text(): t.get_position() for t in ax.texts} for ax in three]
    assert places[0]["R"][0] < 0.5 < places[0]["L"][0] and places[0]["P"][1] < 0.5 < places[0]["A"][1]
    assert places[1]["I"][1] < 0.5 < places[1]["S"][1] and places[2]["A"][0] < 0.5 < places[2]["P"][0]


def test_planes_leave_out_letters_and_boxes_elsewhere(three):
    elsewhere = [(2, 2, 2, 3, 3, 3)]
    plots.show_planes(np.zeros((4, 10, 20)), three, (5, 1, 2), (0, 0, 0), boxes_zyx=elsewhere, lps=False)
    assert not any(letters(ax) for ax in three) and not any(len(ax.patches) for ax in three)


def test_planes_refuse(three):
    with pytest.raises(ValueError, match=r"3D volume and 3 axes, got \(3, 4\) and 3 axes"):
        plots.show_planes(np.zeros((3, 4)), three, (1, 1, 1))


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
    assert [line.get_label() for line in ax.lines] == ["loss", "loss, validation"]
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


# ---- one scan over another -------------------------------------------------------------------------------------------

def test_heat_lies_on_the_planes_and_cold_is_transparent(three):
    heat = np.zeros((4, 10, 20))
    heat[2, 5, 10] = 8
    plots.show_planes(np.zeros(heat.shape), three, (5, 1, 2), heat_zyx=heat, heat_limits=(0, 8))
    for ax in three:
        below, above = ax.images
        assert above.get_extent() == below.get_extent() and above.origin == below.origin
        assert above.get_clim() == (0, 8) and above.get_array().max() == 8
        colours = above.to_rgba(above.get_array())
        assert colours[..., 3].min() == 0 and colours[..., 3].max() == pytest.approx(0.85)


def test_heat_grows_brighter_and_never_more_transparent():
    red, green, blue, alpha = plots.HEAT(np.linspace(0, 1, 256)).T
    brightness = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert (np.diff(brightness) >= 0).all() and (np.diff(alpha) >= 0).all() and alpha[0] == 0


def test_heat_bar(ax):
    assert plots.heat_bar(ax, (0, 6), "SUV") is ax
    bar = ax.child_axes[0]
    assert bar.get_xlabel() == "SUV" and bar.get_xlim() == (0, 6)


def test_plane_figure_keeps_proportions():
    fig, axes, corner = plots.plane_figure((60, 100, 150), (5, 2, 2))
    plots.show_planes(np.zeros((60, 100, 150)), axes, (5, 2, 2))
    fig.canvas.draw()
    wide, tall, deep = (ax.get_position() for ax in axes)
    width, height = fig.get_size_inches()
    assert wide.width == pytest.approx(tall.width, rel=0.02) and tall.height == pytest.approx(deep.height, rel=0.02)
    assert tall.height * height / (tall.width * width) == pytest.approx(300 / 300, rel=0.02)
    assert not corner.axison
    plt.close(fig)


# ---- spreads and positions -------------------------------------------------------------------------------------------

def test_spread(ax):
    groups = {"CT": [1, 10, 100, 0, np.nan], "PT": pd.Series([10])}
    plots.show_spread(groups, ax, "images", "series", "t", {"PT": "red"})
    bars = [(patch.get_y(), patch.get_height()) for patch in ax.patches if patch.get_height()]
    assert ax.get_xscale() == "log" and bars == [(0, 1), (0, 1), (0, 1), (1, 1)]        # PT stands on CT
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["CT", "PT"]


@pytest.mark.parametrize("groups", [{}, {"CT": []}, {"CT": [0]}])
def test_spread_of_nothing(ax, groups):
    assert letters(plots.show_spread(groups, ax)) == {"none"}


def test_spread_of_one_value(ax):
    assert sum(patch.get_height() for patch in plots.show_spread({"CT": [7, 7]}, ax).patches) == 2


def test_positions_shade_gaps(ax):
    numbers, depths = np.arange(9), np.array([0, 5, 10, 15, 30, 35, 40, 45, 50.0])
    plots.show_positions({"a": (numbers, depths[::-1]), "b": (numbers, np.arange(9) * 5.0)}, ax, title="t")
    assert letters(ax) == {"gap of 15 mm"} and len(ax.lines) == 2 and len(ax.patches) == 1
    assert (ax.patches[0].get_y(), ax.patches[0].get_height()) == (15, 15)
    assert "mm" in ax.get_ylabel() and ax.get_xlabel() == "instance number"


@pytest.mark.parametrize("stacks, words", [({}, {"none"}), ({"a": ([], [])}, set()), ({"a": ([1], [2.0])}, set())])
def test_positions_of_little(ax, stacks, words):
    assert letters(plots.show_positions(stacks, ax)) == words


# ---- the browser -----------------------------------------------------------------------------------------------------

VOLUME = np.random.default_rng(0).normal(-500, 400, (9, 12, 10)).astype(np.int16)


def parts(widget):
    return widget.children[1].children[0], widget.children[1].children[1], widget.children[2]


def test_browser_redraws_the_slice_and_window_chosen():
    slider, choice, picture = parts(plots.browse(VOLUME, (5, 1, 1), headless=False, title="one"))
    assert (slider.min, slider.value, slider.max) == (0, 4, 8)
    assert picture.value == plots.slice_png(VOLUME, 4, (5, 1, 1), "lung")
    slider.value = 7
    assert picture.value == plots.slice_png(VOLUME, 7, (5, 1, 1), "lung")
    choice.value = "bone"
    assert picture.value == plots.slice_png(VOLUME, 7, (5, 1, 1), "bone") != plots.slice_png(VOLUME, 7, (5, 1, 1))


def test_browser_takes_windows_by_number():
    _, choice, picture = parts(plots.browse(VOLUME, (5, 1, 1), headless=False, windows=[(2.5, 5)]))
    assert [label for label, _ in choice.options] == ["2.5, width 5"]
    assert picture.value == plots.slice_png(VOLUME, 4, (5, 1, 1), (2.5, 5))


@pytest.mark.parametrize("slices, shown", [(1, [0]), (9, list(range(9))), (60, None)])
def test_browser_falls_back_to_a_montage(slices, shown):
    before = plt.get_fignums()
    fig = plots.browse(np.zeros((slices, 12, 10)), (5, 1, 1), headless=True, title="t")
    fig.savefig(io.BytesIO())
    labels = [int(text.get_text()) for text in fig.axes[0].texts]
    assert labels == (shown or sorted(set(labels))) and len(labels) <= 12 and labels[-1] < slices
    assert plt.get_fignums() == before, "nothing is left open"


def test_browser_refuses_what_is_no_volume():
    with pytest.raises(ValueError, match=r"3D volume, got shape \(3, 4\)"):
        plots.browse(np.zeros((3, 4)), (1, 1, 1))


BOX = [[2, 3, 1, 5, 9, 6]]
HEAT = np.zeros((3, 4, 5))
HEAT[1, 1, 1] = 1                                          # voxels z 3 to 6, y 3 to 6, x 2 to 4


def pixels_of(picture):
    return plt.imread(io.BytesIO(picture.value))[..., :3]


def viewer(**changes):
    widget = plots.browse(VOLUME, (5, 1, 1), headless=False, **{"boxes_zyx": BOX, "heat_zyx": HEAT} | changes)
    _, sliders, controls, picture = widget.children
    return sliders.children, *controls.children, picture


def test_viewer_opens_at_the_first_box_and_follows_every_control():
    sliders, choice, boxes, heat, picture = viewer()
    assert [slider.value for slider in sliders] == [3, 6, 3] and [slider.max for slider in sliders] == [8, 11, 9]
    assert [label for label, _ in choice.options] == ["lung", "mediastinum", "bone"]
    changes = [*((slider, slider.value + 1) for slider in sliders), (choice, "bone"), (boxes, False), (heat, True)]
    for control, value in changes:
        before = picture.value
        control.value = value
        assert picture.value != before, control.description


def test_viewer_draws_boxes_and_heat_in_colour_and_only_when_switched_on():
    _, _, boxes, heat, picture = viewer()

    def coloured():
        return (np.ptp(pixels_of(picture), axis=2) > 0.3).sum()

    with_box = coloured()
    boxes.value = False
    assert coloured() == 0 < with_box
    heat.value = True
    assert coloured() > 0


@pytest.mark.parametrize("given, boxes_off, heat_off", [
    ({"heat_zyx": None}, False, True), ({"boxes_zyx": []}, True, False)])
def test_viewer_disables_the_switch_of_what_is_not_there(given, boxes_off, heat_off):
    _, _, boxes, heat, _ = viewer(**given)
    assert (boxes.disabled, heat.disabled) == (boxes_off, heat_off)


def test_heat_is_laid_over_the_voxels_that_its_cells_speak_for():
    large = plots._as_large(HEAT, VOLUME.shape)
    assert large.shape == VOLUME.shape and np.argwhere(large).tolist() == [
        [z, y, x] for z in (3, 4, 5) for y in (3, 4, 5) for x in (2, 3)]
    with pytest.raises(ValueError, match=r"a heat map of \(4, 4, 5\) does not divide a volume of \(9, 12, 10\)"):
        viewer(heat_zyx=np.zeros((4, 4, 5)))


def test_viewer_without_anybody_shows_both_states_side_by_side():
    before = plt.get_fignums()
    fig = plots.browse(VOLUME, (5, 1, 1), headless=True, boxes_zyx=BOX, heat_zyx=HEAT, title="t")
    left, right = fig.subfigs
    assert [sum(len(ax.patches) for ax in part.axes[:4]) for part in (left, right)] == [3, 0]
    assert [sum(len(ax.images) for ax in part.axes[:4]) for part in (left, right)] == [3, 6]
    assert plt.get_fignums() == before, "nothing is left open"


def test_headless_without_a_kernel_and_by_wish(monkeypatch):
    monkeypatch.delenv("LUNGCT_HEADLESS", raising=False)
    assert plots.is_headless() is True
    monkeypatch.setenv("LUNGCT_HEADLESS", "0")
    assert plots.is_headless() is False
    monkeypatch.setenv("LUNGCT_HEADLESS", "1")
    assert plots.is_headless() is True


@pytest.mark.parametrize("answers, headless", [(True, False), (False, True), (None, True)])
def test_headless_is_asked_of_the_message_that_runs_the_cell(monkeypatch, answers, headless):
    content = {} if answers is None else {"allow_stdin": answers}
    kernel = SimpleNamespace(get_parent=lambda channel: {"content": content} if channel == "shell" else {})
    monkeypatch.delenv("LUNGCT_HEADLESS", raising=False)
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=kernel))
    assert plots.is_headless() is headless


@pytest.mark.slow
@pytest.mark.parametrize("answers, kind", [(False, "Figure"), (True, "VBox")])
def test_headless_in_a_real_kernel(monkeypatch, answers, kind):
    monkeypatch.delenv("LUNGCT_HEADLESS", raising=False)
    code = ("import numpy as np\nfrom lungct import plots\n"
            "print(type(plots.browse(np.zeros((3, 4, 4)), (1, 1, 1))).__name__)")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    client = NotebookClient(notebook, timeout=60, kernel_name="python3")
    with client.setup_kernel():
        client.kc.allow_stdin = answers                    # a runner says False, a front end with a person says True
        client.execute_cell(notebook.cells[0], 0)
    assert notebook.cells[0].outputs[0]["text"].strip() == kind


def test_what_lies_over_an_image_has_its_shape(ax, three):
    with pytest.raises(ValueError, match=r"mask has shape \(5, 5\)"):
        plots.show_slice(np.zeros((20, 30)), ax, mask=np.ones((5, 5)))
    with pytest.raises(ValueError, match="heat_zyx has shape"):
        plots.show_planes(np.zeros((4, 5, 6)), three, (1, 1, 1), heat_zyx=np.zeros((4, 5, 5)))
