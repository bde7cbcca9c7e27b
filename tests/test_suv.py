"""SUV factors computed by hand, by properties, and by a library we did not write; every refusal names its element."""

import math
import re

import numpy as np
import pandas as pd
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from lungct import dicom, headers, suv
from lungct.suv import SuvError, suv_factor, suv_factors

HALF_LIFE_S = 6586.2
PET = {"units": "BQML", "decay_correction": "START", "corrected_image": "DECY\\ATTN", "weight_kg": 70.0,
       "radionuclide_dose_bq": 350e6, "half_life_s": HALF_LIFE_S, "injection_time": "100000",
       "series_time": "114946.2", "acquisition_time": "114946.2"}
ONE_HALF_LIFE, FRESH = 70_000 / 175e6, 70_000 / 350e6
UNCORRECTED = {"decay_correction": "NONE", "corrected_image": "ATTN\\SCAT", "frame_duration_ms": 180_000.0}
LATER = {"series_date": "20100102", "acquisition_date": "20100102", "injection_datetime": "20100101230000",
         "injection_time": None}


def clock(seconds):
    seconds = round(seconds, 1) % 86400
    return f"{int(seconds // 3600):02}{int(seconds % 3600 // 60):02}{seconds % 60:04.1f}"


def test_chapter_one_hands_it_on():
    assert dicom.suv_factor is suv_factor and dicom.SuvError is SuvError


# ---- by hand ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, factor", [
    ({}, ONE_HALF_LIFE),
    ({"injection_time": "114946.2"}, FRESH),
    ({"injection_time": "10:00:00"}, ONE_HALF_LIFE),
    ({"weight_kg": 35.0}, ONE_HALF_LIFE / 2),
    ({"decay_correction": "ADMIN"}, FRESH),
    ({"decay_correction": "ADMIN", "half_life_s": None, "injection_time": None, "series_time": None}, FRESH),
    ({"injection_datetime": "20090101100000.00", "injection_time": None}, ONE_HALF_LIFE),
    ({"injection_datetime": "20090101100000.00+0800"}, ONE_HALF_LIFE),          # an offset that the bare time confirms
    ({"injection_datetime": "20090101+0800"}, ONE_HALF_LIFE),
    ({"decay_correction": "ADMIN", "injection_datetime": "20090101020000+0000", "injection_time": None}, FRESH),
    ({"injection_datetime": "20090101100030", "injection_time": "100100"}, FRESH * 2 ** (6556.2 / HALF_LIFE_S)),
    ({"injection_datetime": "20090101"}, ONE_HALF_LIFE),                        # a date alone: the bare time counts
])
def test_by_hand(changes, factor):
    assert suv_factor(PET | changes) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("changes, uptake_s", [
    ({"acquisition_time": "120500"}, 6586.2),                           # a later bed: the series time counts
    ({"acquisition_time": None}, 6586.2),
    ({"series_time": "150000"}, 6586.2),                                # rewritten: the acquisition counts
    ({"series_time": None}, 6586.2),
    ({"series_time": "150000", "ge_scan_datetime": "20100101114900"}, 6540),
    ({"series_time": "114900", "ge_scan_datetime": "20100101110000"}, 6540),     # GE's note only where it is needed
    ({"series_date": "20100103", "acquisition_date": "20100101", "series_time": "090000"}, 6586.2),
    ({"series_time": "150000", "ge_scan_datetime": "20100101114946.9"}, 6586.9),    # AcquisitionTime cut to a second
    ({"series_time": "114900", "ge_scan_datetime": "20100101034900+0000"}, 6540),   # a bad note that is not needed
    ({"series_time": "114000", "acquisition_time": "134000"}, 6000),            # two hours before its first image
    ({"series_time": "235500", "acquisition_time": "000500", "injection_time": "220500"}, 6600),
])
def test_start_of_the_scan(changes, uptake_s):
    assert suv_factor(PET | changes) == pytest.approx(FRESH * 2 ** (uptake_s / HALF_LIFE_S), rel=1e-12)


@pytest.mark.parametrize("changes", [
    {"injection_time": "230000", "series_time": "004946.2", "acquisition_time": "004946.2"},
    LATER | {"series_time": "004946.2", "acquisition_time": "004946.2"},
    LATER | {"series_time": "004946.2", "acquisition_time": "004946.2", "series_date": "20190509",
             "acquisition_date": "20190509"},                           # dates of two calendars: times of day
])
def test_past_midnight(changes):
    assert suv_factor(PET | changes) == pytest.approx(ONE_HALF_LIFE, rel=1e-12)


def test_a_tracer_that_lives_for_days_needs_dates():
    iodine = PET | {"half_life_s": 360806.4, "injection_datetime": "20100101114946.2", "injection_time": None}
    assert suv_factor(iodine | {"series_date": "20100103", "acquisition_date": "20100103"}) == pytest.approx(
        FRESH * 2 ** (2 * 86400 / 360806.4), rel=1e-12)
    with pytest.raises(SuvError, match=r"RadiopharmaceuticalStartDateTime \(0018,1078\) tells no day .* 100 h"):
        suv_factor(iodine)


def test_stack_starts_with_its_earliest_image_in_any_order():
    beds = [PET | {"series_time": "160000", "acquisition_time": t} for t in ("120100", "114946.2", "115500")]
    assert suv_factors(beds) == pytest.approx([ONE_HALF_LIFE] * 3) == suv_factors(beds[::-1])
    over_midnight = [PET | {"injection_time": "221013.8", "series_time": "030000", "acquisition_time": t}
                     for t in ("000500", "000000", "000300")]
    over_midnight += [PET | {"injection_time": "221013.8", "series_time": "030000", "acquisition_time": "235959"}]
    assert suv_factors(over_midnight) == pytest.approx([FRESH * 2 ** (6585.2 / HALF_LIFE_S)] * 4)


def test_without_correction_each_slice_has_its_own_factor():
    beds = [PET | UNCORRECTED | {"acquisition_time": clock(36000 + n * HALF_LIFE_S)} for n in (0, 1, 2)]
    mean = 1.0095017                # x = ln 2 * 180 / 6586.2 = 0.0189436; x / (1 - exp(-x)) = 1 + x/2 + x^2/12
    assert suv_factors(beds) == pytest.approx(FRESH * np.array([1, 2, 4]) * mean, rel=1e-7)


@pytest.mark.parametrize("duration_ms, told", [
    (None, "missing"), (math.nan, "missing"), (0.0, "0,"), (-180_000.0, "-180000,"), (21_600_001.0, "2.16e"),
    (math.inf, "inf,")])
def test_without_correction_a_frame_has_a_length(duration_ms, told):
    with pytest.raises(SuvError, match=rf"ActualFrameDuration \(0018,1242\) is {told}"):
        suv_factor(PET | UNCORRECTED | {"frame_duration_ms": duration_ms})
    assert suv_factor(PET | {"frame_duration_ms": duration_ms}) == pytest.approx(ONE_HALF_LIFE)     # START needs none
    assert suv_factor(PET | UNCORRECTED | {"frame_duration_ms": 21_600_000.0}) > ONE_HALF_LIFE


DATED = {"series_date": "20100101", "acquisition_date": "20100101", "injection_time": None}


@pytest.mark.parametrize("half_life_s, start, uptake_s", [
    (6586.2, "110000", 3600), (6586.2, "113000", 5400), (6586.2, "130000", 10_800),     # F-18, one to three hours
    (6586.2, "171905", 26_345),                                         # 4 half-lives are 26344.8 s: refused below
    (1221.0, "100000", 0), (1221.0, "102000", 1200), (1221.0, "113000", 5400),          # C-11, 4.4 half-lives
    (76.4, "100130", 90), (76.4, "100600", 360),                        # Rb-82, 4.7 half-lives
    (4062.6, "150000", 18_000),                                         # Ga-68, 4.4 half-lives
    (6586.2, "220000", 43_200),                                         # F-18, noon for midnight, or so it looks
])
def test_the_wait_without_dates(half_life_s, start, uptake_s):
    image = PET | {"half_life_s": half_life_s, "series_time": start, "acquisition_time": start}
    factor = pytest.approx(FRESH * 2 ** (uptake_s / half_life_s), rel=1e-12)
    assert suv_factor(image | DATED | {"injection_datetime": "20100101100000"}) == factor
    if half_life_s == HALF_LIFE_S and uptake_s > 26_344.8:
        with pytest.raises(SuvError, match=r"StartTime \(0018,1072\) lies .* without dates at most 4 half-lives"):
            suv_factor(image)
    else:
        assert suv_factor(image) == factor


@pytest.mark.parametrize("duration_s", [1.0, 180.0, 3600.0])
def test_a_frame_stands_for_its_mean_activity(duration_s):
    times = (np.arange(200_000) + 0.5) / 200_000 * duration_s                   # the mean by numerical integration
    mean = np.mean(2 ** (-times / HALF_LIFE_S))
    image = PET | UNCORRECTED | {"frame_duration_ms": duration_s * 1000}
    assert suv_factor(image) == pytest.approx(ONE_HALF_LIFE / mean, rel=1e-9)
    assert suv_factor(image | {"decay_correction": "START", "corrected_image": "DECY\\ATTN"}) == \
        pytest.approx(ONE_HALF_LIFE)


@pytest.mark.parametrize("changes, factor", [
    ({"philips_suv_factor": 0.00031}, 0.00031),
    ({"philips_suv_factor": 0.00031, "philips_activity_factor": 2.5, "weight_kg": None}, 0.00031),
    ({"philips_activity_factor": 2.5}, 2.5 * ONE_HALF_LIFE),
    ({"philips_suv_factor": 0.0, "philips_activity_factor": 2.5}, 2.5 * ONE_HALF_LIFE),
    ({"philips_suv_factor": math.nan, "philips_activity_factor": 2.5, "decay_correction": "ADMIN"}, 2.5 * FRESH),
])
def test_counts_of_philips(changes, factor):
    assert suv_factor(PET | {"units": "CNTS"} | changes) == pytest.approx(factor, rel=1e-12)


def test_philips_factors_may_differ_from_slice_to_slice():
    images = [PET | {"units": "CNTS", "philips_suv_factor": f} for f in (0.1, 0.2)]
    assert suv_factors(images).tolist() == [0.1, 0.2]


@pytest.mark.parametrize("suv_type", [None, "BW", math.nan, ""])
def test_suv_already(suv_type):
    image = {"units": "GML", "suv_type": suv_type, "corrected_image": "ATTN"}
    assert suv_factors([image, image]).tolist() == [1, 1]


def test_one_injection_is_the_rule():
    for items in (1, 1.0, None, math.nan):
        assert suv_factor(PET | {"tracer_items": items}) == pytest.approx(ONE_HALF_LIFE)


@pytest.mark.parametrize("changes", [{}, {"units": "GML"}, {"units": "CNTS", "philips_suv_factor": 0.3},
                                     {"decay_correction": "ADMIN"}])
def test_two_injections_are_refused(changes):
    words = r"RadiopharmaceuticalInformationSequence \(0054,0016\) has 2 items, expected one injection: no SUV"
    with pytest.raises(SuvError, match=words):
        suv_factors([PET | changes | {"tracer_items": 2}] * 2)
    with pytest.raises(SuvError, match=r"InformationSequence \(0054,0016\) differs within the stack, 1 and 2"):
        suv_factors([PET | changes | {"tracer_items": 1 + k} for k in range(2)])


# ---- refused ---------------------------------------------------------------------------------------------------------

MISSING = {"weight_kg": r"PatientWeight \(0010,1030\)", "radionuclide_dose_bq": r"RadionuclideTotalDose \(0018,1074\)",
           "half_life_s": r"RadionuclideHalfLife \(0018,1075\)", "units": r"Units \(0054,1001\)",
           "decay_correction": r"DecayCorrection \(0054,1102\)", "corrected_image": r"CorrectedImage \(0028,0051\)",
           "injection_time": r"RadiopharmaceuticalStartTime \(0018,1072\)"}


@pytest.mark.parametrize("column", MISSING)
@pytest.mark.parametrize("nothing", [None, math.nan, "", "absent"])
def test_missing(column, nothing):
    header = {k: v for k, v in PET.items() if k != column} | ({} if nothing == "absent" else {column: nothing})
    with pytest.raises(SuvError, match=MISSING[column] + " is missing"):
        suv_factor(header)


@pytest.mark.parametrize("changes, words", [
    ({"weight_kg": 0.0}, "PatientWeight .* is 0, expected 1 to 500 kg"),
    ({"weight_kg": -70.0}, "PatientWeight .* is -70"), ({"weight_kg": 70_000.0}, "PatientWeight .* is 70000"),
    ({"weight_kg": math.inf}, "PatientWeight .* is inf"),
    ({"radionuclide_dose_bq": 350.0}, "RadionuclideTotalDose .* is 350, expected"),
    ({"radionuclide_dose_bq": 0.0}, "RadionuclideTotalDose .* is 0"),
    ({"radionuclide_dose_bq": 3.5e11}, r"RadionuclideTotalDose .* is 3.5e\+11"),
    ({"half_life_s": 0.0}, "RadionuclideHalfLife .* is 0"),
    ({"half_life_s": 6586200.0}, "RadionuclideHalfLife .* is 6"),
    ({"half_life_s": 109.77}, r"lies 1.8 h before the scan, RadionuclideHalfLife \(0018,1075\) is 109.77 s"),
    ({"injection_time": "120000"}, r"RadiopharmaceuticalStartTime \(0018,1072\) lies 23.8 h before the scan"),
    ({"injection_time": "991000"}, r"RadiopharmaceuticalStartTime \(0018,1072\) is 991000, expected a time"),
    ({"injection_time": "25:00", "injection_datetime": "2010"}, "is 25:00, expected a time and Radio.* is 2010, ex"),
    ({"series_time": "noon", "acquisition_time": None}, r"SeriesTime \(0008,0031\) is noon, expected a time"),
    (UNCORRECTED | {"acquisition_time": "2500"}, r"AcquisitionTime \(0008,0032\) is 2500, expected a time"),
    ({"series_time": None, "acquisition_time": None}, r"SeriesTime \(0008,0031\) is missing"),
    (UNCORRECTED | {"acquisition_time": None}, r"AcquisitionTime \(0008,0032\) is missing"),
    ({"injection_datetime": "20200101020000.00+0000", "injection_time": None, "series_time": "110000",
      "acquisition_time": "110000"}, r"RadiopharmaceuticalStartDateTime \(0018,1078\) is .*\+0000.* UTC"),
    ({"injection_datetime": "20200101100000-0500", "injection_time": None}, "StartDateTime .*-0500.* UTC"),
    ({"injection_datetime": "20200101020000+0000"}, r"StartDateTime .* is 20200101020000\+0000 and .* is 100000"),
    ({"series_time": "150000", "ge_scan_datetime": "20100101034900+0000"}, r"GE scan .*\(0009,xx0D\) .*\+0000.* UTC"),
    ({"series_time": "150000", "ge_scan_datetime": "20100101115100"},
     r"GE scan date and time \(0009,xx0D\) is 20100101115100, 0.02 h after .* AcquisitionTime \(0008,0032\)"),
    ({"series_time": "150000", "ge_scan_datetime": "20100101094900"}, "GE scan .* 2.01 h before .*AcquisitionTime"),
    ({"series_time": "114000", "acquisition_time": "134001"},
     r"SeriesTime \(0008,0031\) is 114000, 2.00 h before the first AcquisitionTime \(0008,0032\)"),
    ({"series_date": "20100101", "acquisition_date": "20100102"}, "SeriesTime .*24.00 h before .*AcquisitionTime"),
    (LATER | {"series_time": "220000", "acquisition_time": "220000"}, r"StartDateTime \(0018,1078\) lies 23.0 h"),
    (LATER | {"series_date": "20100101", "acquisition_date": "20100101"}, "DateTime .* lies 11.2 h after the scan"),
    ({"injection_datetime": "20100101103000"}, "StartDateTime .* is 20100101103000 and .*StartTime .* is 100000"),
    ({"units": "PROPCNTS"}, r"Units \(0054,1001\) is PROPCNTS, expected BQML or CNTS or GML"),
    ({"units": "CNTS"}, r"Philips SUV factor \(7053,xx00\) nor Philips activity factor \(7053,xx09\)"),
    ({"units": "CNTS", "philips_suv_factor": -1.0}, "Philips SUV factor"),
    ({"units": "CNTS", "philips_suv_factor": 0.1} | UNCORRECTED, "DecayCorrection .* is NONE, expected START or ADMIN"),
    ({"units": "GML", "suv_type": "LBM"}, r"SUVType \(0054,1006\) is LBM, expected BW"),
    ({"units": "GML", "suv_type": "BSA"}, "SUVType .* is BSA"), ({"units": "GML", "suv_type": "IBW"}, "is IBW"),
    ({"units": "GML", "corrected_image": "DECY"}, "CorrectedImage .* is DECY, without ATTN"),
    ({"decay_correction": "OTHER"}, "DecayCorrection .* is OTHER, expected START or ADMIN or NONE"),
    ({"corrected_image": "DECY\\SCAT"}, "CorrectedImage .*without ATTN"),
    ({"corrected_image": "ATTN"}, "CorrectedImage .* is ATTN and DecayCorrection .* is START"),
    ({"decay_correction": "NONE"}, "CorrectedImage .* and DecayCorrection .* is NONE"),
])
def test_refused_with_the_tag(changes, words):
    with pytest.raises(SuvError, match=words):
        suv_factor(PET | changes)


@pytest.mark.parametrize("column, other", [("weight_kg", 71.0), ("radionuclide_dose_bq", 351e6), ("units", "GML"),
                                           ("injection_time", "100100"), ("series_time", None),
                                           ("half_life_s", 6500.0), ("injection_datetime", "20090101100030"),
                                           ("decay_correction", "ADMIN"), ("corrected_image", "DECY\\ATTN\\SCAT")])
def test_a_stack_tells_one_story(column, other):
    with pytest.raises(SuvError, match=re.escape(headers.tag_name(column)) + ".* differs within the stack"):
        suv_factors([PET, PET | {column: other}])


def test_no_images():
    with pytest.raises(SuvError, match="without images"):
        suv_factors([])


@pytest.mark.parametrize(("headers", "kind"), [
    (PET, "dict"), (pd.DataFrame([PET]), "DataFrame"), (None, "NoneType"), ("BQML", "str"), ({}, "dict"), (3, "int"),
    ([PET, None], "a list with NoneType in it"), ([Dataset()], "a list with Dataset in it"),
    ([pd.Series(PET)], "a list with Series in it"), ((PET, "BQML"), "a tuple with str in it"),
    (iter([PET]), "iterator")])
def test_what_are_no_mappings_is_an_error_that_says_so(headers, kind):
    with pytest.raises(TypeError, match=rf"suv_factors expects a list of mappings, one an image.*, got .*{kind}"):
        suv_factors(headers)


@pytest.mark.parametrize("changes", [
    {"weight_kg": "70"}, {"weight_kg": " 70.0 "}, {"weight_kg": [70.0]}, {"half_life_s": np.array(["6586.2"])},
    {"corrected_image": ["DECY", "ATTN"]}, {"corrected_image": np.array(["DECY", "ATTN"])}, {"tracer_items": "1"},
    {"corrected_image": pydicom.multival.MultiValue(str, ["DECY", "ATTN"])}, {"units": ["BQML"]},
    {"tracer_items": ""}, {"tracer_items": []}])
def test_numbers_as_text_and_several_values_as_a_list_are_taken(changes):
    assert suv_factor(PET | changes) == pytest.approx(ONE_HALF_LIFE, rel=1e-12)


def test_a_factor_as_text_is_taken():
    assert suv_factor(PET | {"units": "CNTS", "philips_suv_factor": "0.3"}) == 0.3


@pytest.mark.parametrize(("changes", "words"), [
    ({"weight_kg": "heavy"}, r"PatientWeight \(0010,1030\) is heavy, expected a number"),
    ({"weight_kg": [70, 80]}, r"PatientWeight \(0010,1030\) is 70\\80, expected a number"),
    ({"weight_kg": {"kg": 70}}, r"PatientWeight \(0010,1030\) is {'kg': 70}, expected a number"),
    ({"weight_kg": []}, r"PatientWeight \(0010,1030\) is missing"), ({"weight_kg": " "}, "PatientWeight .* is missing"),
    ({"weight_kg": "nan"}, r"PatientWeight \(0010,1030\) is nan, expected 1 to 500 kg"),
    ({"weight_kg": 70j}, r"PatientWeight \(0010,1030\) is 70j, expected a number"),
    ({"tracer_items": "two"}, r"RadiopharmaceuticalInformationSequence \(0054,0016\) is two, expected a number"),
    ({"units": "CNTS", "philips_suv_factor": "much"}, r"Philips SUV factor \(7053,xx00\) is much, expected a number"),
    ({"corrected_image": []}, r"CorrectedImage \(0028,0051\) is missing"),
    ({"units": 5}, "Units .* is 5, expected BQML")])
def test_a_value_of_another_type_is_refused_with_its_tag(changes, words):
    with pytest.raises(SuvError, match=words):
        suv_factor(PET | changes)


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_text_is_a_time_or_none(time, day):
    moment = suv._moment({"t": time, "d": day, "x_datetime": day + time}, "t", "d")
    assert moment is None or 0 <= moment.second < 86400
    suv._moment({"x_datetime": day + time}, "x_datetime")


# ---- properties ------------------------------------------------------------------------------------------------------

START_S = st.integers(1, 86399)                # midnight sharp is a blank
UPTAKE_S = st.floats(0, 3.99 * HALF_LIFE_S).map(lambda s: round(s, 1))


def header(start_s, uptake_s, dose=350e6, weight=70.0):
    scan = clock(start_s + uptake_s)
    return PET | {"injection_time": clock(start_s), "series_time": scan, "acquisition_time": scan,
                  "radionuclide_dose_bq": dose, "weight_kg": weight}


@given(START_S, UPTAKE_S, st.floats(2e6, 5e9), st.floats(1, 250))
def test_definition(start_s, uptake_s, dose, weight):
    factor = suv_factor(header(start_s, uptake_s, dose, weight))
    assert factor == pytest.approx(weight * 1000 / dose * math.exp(math.log(2) * uptake_s / HALF_LIFE_S), rel=1e-9)
    assert suv_factor(header(start_s, uptake_s, 2 * dose, weight)) == pytest.approx(factor / 2)
    assert suv_factor(header(start_s, uptake_s, dose, 2 * weight)) == pytest.approx(factor * 2)


@given(START_S, st.floats(0, 2.99 * HALF_LIFE_S).map(lambda s: round(s, 1)))
def test_a_half_life_more_halves_what_is_left(start_s, uptake_s):
    once, again = suv_factor(header(start_s, uptake_s)), suv_factor(header(start_s, uptake_s + HALF_LIFE_S))
    assert again == pytest.approx(2 * once, rel=1e-9)


@given(START_S, UPTAKE_S)
def test_dates_change_nothing_when_they_are_right(start_s, uptake_s):
    plain = header(start_s, uptake_s)
    day = f"201001{1 + int((start_s + uptake_s) // 86400):02}"
    dated = plain | {"injection_datetime": "20100101" + plain["injection_time"], "series_date": day,
                     "acquisition_date": day}
    assert suv_factor(dated) == pytest.approx(suv_factor(plain), rel=1e-13)


# ---- a library we did not write --------------------------------------------------------------------------------------

def dataset(row, manufacturer):
    image, item = Dataset(), Dataset()
    image.Modality, image.Manufacturer, image.PatientWeight = "PT", manufacturer, row["weight_kg"]
    image.Units, image.DecayCorrection = row["units"], row["decay_correction"]
    image.CorrectedImage = row["corrected_image"].split("\\")
    image.SeriesTime, image.AcquisitionTime = row["series_time"], row["acquisition_time"]
    image.SeriesDate = image.AcquisitionDate = "20100101"
    image.RescaleSlope, image.RescaleIntercept = 1.5, 0
    item.RadiopharmaceuticalStartTime, item.RadionuclideTotalDose = row["injection_time"], row["radionuclide_dose_bq"]
    item.RadionuclideHalfLife = row["half_life_s"]
    image.RadiopharmaceuticalInformationSequence = pydicom.Sequence([item])
    return image


@pytest.mark.parametrize("uptake_s", [0, 1800, 3600, 5400.5])
def test_equal_to_pysuv(uptake_s):
    pysuv = pytest.importorskip("pysuv", reason="pysuv, the other implementation, is not installed")
    row = header(9 * 3600, uptake_s)
    found = pysuv.get_suv_factor(dataset(row, "SIEMENS"))
    assert suv_factor(row) == pytest.approx(found.suv_factor, rel=1e-6)


def test_equal_to_the_factor_pysuv_takes_from_philips():
    pysuv = pytest.importorskip("pysuv", reason="pysuv, the other implementation, is not installed")
    row = PET | {"units": "CNTS", "philips_suv_factor": 0.00047}
    image = dataset(row, "Philips Medical Systems")
    image.add_new(0x70530010, "LO", "Philips PET Private Group")
    image.add_new(0x70531000, "DS", "0.00047")
    assert suv_factor(row) == pytest.approx(pysuv.get_suv_factor(image).suv_factor)


# ---- what a careless change would have turned round ------------------------------------------------------------------


def test_each_slice_has_its_own_factor_of_philips():
    one, two = suv.suv_factors([PET | {"units": "CNTS", "philips_activity_factor": factor} for factor in (1.0, 2.0)])
    assert two == pytest.approx(2 * one)


@pytest.mark.parametrize("changes", [
    {"corrected_image": "DECAY\\ATTN"},                                                     # as some write DECY
    {"half_life_s": 900.0, "series_time": "114500", "acquisition_time": "114500"},          # seven half-lives
    {"injection_datetime": "20200101100100"}])                                              # a minute from the time
def test_what_is_just_allowed(changes):
    assert suv.suv_factor(PET | changes) > 0


@pytest.mark.parametrize("changes", [
    {"corrected_image": "DECY\\XATTN"}, {"radionuclide_dose_bq": 350e3}, {"half_life_s": 8 * 3600.0},
    {"series_time": None, "acquisition_time": "114945", "ge_scan_datetime": "20200101114946"}])    # a second late
def test_what_is_just_refused(changes):
    with pytest.raises(suv.SuvError):
        suv.suv_factor(PET | changes)


def test_a_month_apart_is_one_calendar_and_a_minute_has_sixty_seconds():
    first = suv._Moment(0, 0.0)
    assert suv._dated(first, suv._Moment(31, 0.0)) and not suv._dated(first, suv._Moment(32, 0.0))
    assert suv._clock_s("101559") is not None and suv._clock_s("101560") is None and suv._clock_s("101561") is None


# ---- what the header itself contradicts ------------------------------------------------------------------------------

CONFIRMED = {"frame_duration_ms": 180_000.0, "acquisition_time": "114946.2"}


@pytest.mark.parametrize("lead_s", [0, 290, 1200, 3300, 6300])
@pytest.mark.parametrize("factor, reference", [(True, True), (True, False), (False, True), (False, False)])
def test_a_start_that_the_decay_contradicts_twice_is_refused(lead_s, factor, reference):
    """Each of the two tells the lead, or that there is none."""
    began = {"series_time": clock(42586.2 - lead_s), "injection_time": "093000"}
    told = {"decay_factor": 2 ** (((lead_s if factor else 0) + 90) / HALF_LIFE_S),
            "frame_reference_time_ms": 1000.0 * ((lead_s if reference else 0) + 90)}
    header = PET | CONFIRMED | began | told
    if factor or reference or lead_s <= 300:
        assert suv_factor(header) == suv_factor(PET | CONFIRMED | began)
    else:
        with pytest.raises(SuvError, match=rf"SeriesTime .* {lead_s // 60} min before .*DecayFactor \(0054,1321\)"):
            suv_factor(header)
    for one in told:                                       # a single one may be written by another rule
        assert suv_factor(header | {one: None}) == suv_factor(PET | CONFIRMED | began)


@pytest.mark.parametrize("name, half_life_s, fits", [
    ("FDG -- fluorodeoxyglucose", 6586.2, True), ("FDG", 6588.0, True), ("F-18 FDG", 6580.0, True),
    ("FDG", 597.9, False), ("Fluorodeoxyglucose F^18^", 1224.0, False), ("18F-NaF", 4062.6, False),
    ("Ga-68 PSMA", 4057.7, True), ("68Ga-DOTATATE", 6586.2, False), ("11C-choline", 1221.8, True),
    ("Ammonia N-13", 597.0, True), ("Rb-82 chloride", 75.0, True), ("choline", 1221.8, True), (None, 1224.0, True),
    ("C-11 or F-18", 5000.0, True), ("Solution", 1221.8, True),
    ("Copper Cu 64 dotatate", 45720.0, True), ("124I-fluoro-something", 360806.0, True)])
def test_a_half_life_is_that_of_the_tracer_where_its_name_tells(name, half_life_s, fits):
    header = PET | {"radiopharmaceutical": name, "half_life_s": half_life_s, "series_time": "100100",
                    "acquisition_time": "100100", "series_date": "20200101", "acquisition_date": "20200101",
                    "injection_datetime": "20200101100000"}
    if fits:
        assert suv_factor(header) == pytest.approx(FRESH * 2 ** (60 / half_life_s))
    else:
        with pytest.raises(SuvError, match=r"RadionuclideHalfLife .* and Radiopharmaceutical \(0018,0031\) is "):
            suv_factor(header)


@pytest.mark.parametrize("dated", [{}, {"series_date": "20200101", "acquisition_date": "20200101",
                                        "injection_datetime": "20200101100000", "injection_time": None}])
def test_a_dynamic_scan_may_begin_before_its_injection(dated):
    before = {"series_time": "095950", "acquisition_time": "095950"}
    assert suv_factor(PET | dated | before) == pytest.approx(FRESH * 2 ** (-10 / HALF_LIFE_S))
    with pytest.raises(SuvError, match="lies .* the scan"):
        suv_factor(PET | dated | {"series_time": "095459", "acquisition_time": "095459"})


def test_a_date_time_whose_clock_was_blanked_tells_the_day():
    dates = {"series_date": "20200102", "acquisition_date": "20200102"}
    assert suv_factor(PET | dates | {"injection_datetime": "20200102000000.00"}) == pytest.approx(ONE_HALF_LIFE)
    with pytest.raises(SuvError, match="lies 25.8 h before"):
        suv_factor(PET | dates | {"injection_datetime": "20200101000000.00"})
    blank = {"injection_datetime": "20200102100000", "injection_time": "000000"}
    assert suv_factor(PET | dates | blank) == pytest.approx(ONE_HALF_LIFE)


@pytest.mark.parametrize("changes", [{"injection_datetime": "20200101000000", "injection_time": None},
                                     {"injection_time": "000000.00"},
                                     {"injection_datetime": "20200101000000", "injection_time": "0000"}])
def test_midnight_sharp_is_no_injection(changes):
    with pytest.raises(SuvError, match="midnight, as where a clock was blanked"):
        suv_factor(PET | {"series_time": "060000", "acquisition_time": "060000"} | changes)


def test_a_weight_that_is_no_number_is_not_called_missing_alone():
    with pytest.raises(SuvError, match=r"PatientWeight \(0010,1030\) is missing or no number"):
        suv_factor(PET | {"weight_kg": None})


def test_a_philips_factor_that_one_slice_lacks_is_refused():
    images = [PET | {"units": "CNTS", "philips_suv_factor": factor} for factor in (0.1, None)]
    with pytest.raises(SuvError, match="positive number in all images"):
        suv_factors(images)


def test_a_start_of_ge_is_checked_against_the_decay():
    began = {"series_time": "150000", "ge_scan_datetime": "20100101105446", "injection_time": "093000",
             "decay_factor": 2 ** (90 / HALF_LIFE_S), "frame_reference_time_ms": 90_000.0}
    with pytest.raises(SuvError, match=r"GE scan .* 55 min before .*DecayFactor"):
        suv_factor(PET | CONFIRMED | began)


def test_dates_before_that_of_the_injection_are_no_reason_to_refuse():
    dates = {"series_date": "20000102", "acquisition_date": "20000102"}
    times = {"series_time": "004946.2", "acquisition_time": "004946.2"}
    assert suv_factor(PET | LATER | times | dates) == pytest.approx(ONE_HALF_LIFE)


def test_a_long_frame_leaves_room():
    told = {"series_time": clock(42586.2 - 1200), "injection_time": "093000",
            "decay_factor": 2 ** (1450 / HALF_LIFE_S), "frame_reference_time_ms": 1_450_000.0}
    assert suv_factor(PET | CONFIRMED | told) > 0


def test_a_start_within_the_first_second_has_no_lead():
    began = {"series_time": "150000", "ge_scan_datetime": "20100101114946.9", "decay_factor": 1.0,
             "frame_reference_time_ms": 0.0}
    assert suv_factor(PET | CONFIRMED | began) == pytest.approx(FRESH * 2 ** (6586.9 / HALF_LIFE_S))
