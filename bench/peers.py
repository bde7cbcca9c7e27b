"""Other ways from the files of one stack to a stored 64^3 cube, each as its users write it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

SIZE, SPACING_MM, AIR_HU = 64, 6.0, -1024.0
PYDICOM, SIMPLEITK = "pydicom + area average", "SimpleITK series reader + area average"
LAZY, DEFAULT = "MONAI lazy (Spacing 1 mm and Resize in one resampling)", "MONAI default (Spacing 1 mm, Resize)"
TORCHIO, EARLIER = "TorchIO (ToCanonical, Resample 1 mm, Resize)", "B-spline to 1 mm, centre crop, resize (SimpleITK)"


@dataclass(frozen=True)
class Source:
    """A folder with the files of one stack, named along z, its affine, and that of the cube wanted of it."""

    folder: str
    affine: list
    target: list

    @property
    def names(self) -> list[str]:
        return sorted(map(str, Path(self.folder).glob("*.dcm")))


def save(cube_zyx: np.ndarray, out: Path) -> None:
    np.save(out, np.rint(cube_zyx).astype(np.int16))


def area(values_zyx: np.ndarray, source: Source) -> np.ndarray:
    from lungct import volumes

    affines = np.reshape(source.affine, (4, 4)), np.reshape(source.target, (4, 4))
    return volumes.resample_area(values_zyx, *affines, (SIZE,) * 3, AIR_HU)


def by_pydicom(source: Source, out: Path) -> None:
    pydicom = importlib.import_module("pydicom")

    def hu(name):
        image = pydicom.dcmread(name)
        return image.pixel_array * np.float32(image.RescaleSlope) + np.float32(image.RescaleIntercept)

    save(area(np.stack([hu(name) for name in source.names]), source), out)


def by_simpleitk(source: Source, out: Path) -> None:
    sitk = importlib.import_module("SimpleITK")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(source.names)
    image = reader.Execute()  # in HU already; its view lives as long as this name
    save(area(sitk.GetArrayViewFromImage(image), source), out)


@cache
def _monai(lazy: bool):
    t = importlib.import_module("monai.transforms")
    steps = [t.LoadImage(reader="ITKReader", image_only=True), t.EnsureChannelFirst(), t.Spacing((1.0, 1.0, 1.0)),
             t.Resize((SIZE,) * 3)]
    return t.Compose(steps, lazy=lazy)


def by_monai(source: Source, out: Path, lazy: bool = False) -> None:
    save(_monai(lazy)(source.folder)[0].numpy(), out)


def by_monai_lazy(source: Source, out: Path) -> None:
    by_monai(source, out, lazy=True)


def by_torchio(source: Source, out: Path) -> None:
    tio = importlib.import_module("torchio")
    steps = tio.Compose([tio.ToCanonical(), tio.Resample(1), tio.Resize(SIZE)])
    save(steps(tio.ScalarImage(source.folder)).data[0].numpy(), out)


def by_bspline(source: Source, out: Path) -> None:
    """As earlier work on this collection did it: each file read by GDCM, B-splines to 1 mm, a crop, a resize."""
    from scipy import ndimage

    sitk = importlib.import_module("SimpleITK")
    slices = [sitk.ReadImage(name, imageIO="GDCMImageIO") for name in source.names]
    places = [image.GetOrigin() for image in slices]
    volume = sitk.JoinSeries([image[:, :, 0] for image in slices], places[0][2], abs(places[1][2] - places[0][2]))
    size = [round(n * mm) for n, mm in zip(volume.GetSize(), volume.GetSpacing(), strict=True)]
    fine = sitk.Resample(volume, size, sitk.Transform(), sitk.sitkBSpline, volume.GetOrigin(), (1, 1, 1),
                         volume.GetDirection(), AIR_HU, sitk.sitkFloat32)
    hu, side = sitk.GetArrayViewFromImage(fine), int(SIZE * SPACING_MM)
    low = [max(0, (n - side) // 2) for n in hu.shape]
    crop = hu[tuple(slice(a, a + side) for a in low)]
    save(ndimage.zoom(crop, [SIZE / n for n in crop.shape], order=1), out)


PEERS: dict[str, tuple[str, Callable[[Source, Path], None]]] = {
    PYDICOM: ("pydicom", by_pydicom), SIMPLEITK: ("SimpleITK", by_simpleitk), LAZY: ("monai itk", by_monai_lazy),
    DEFAULT: ("monai itk", by_monai), TORCHIO: ("torchio", by_torchio), EARLIER: ("SimpleITK", by_bspline)}
