import numpy as np
import pytest

from stas.results.sheets import PREDICTION, TRUTH, Box, Case, draw_overview, draw_sheet, pick_cases, region_of_interest


def disc(shape, row, column, radius):
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def case(shape=(200, 300), members=2, image=True):
    truth = disc(shape, 80, 100, 20)
    masks = {f"member{number}": disc(shape, 80, 100 + 15 * number, 20) for number in range(members)}
    pixels = np.full((*shape, 3), (230, 180, 210), np.uint8) if image else None
    return Case("a: worst case", pixels, truth, masks)


def count(picture, color):
    return int((np.asarray(picture) == color).all(axis=-1).sum())


def test_pick_cases_takes_a_third_each():
    picked = pick_cases([0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.8], 6)
    assert [(item.group, item.number, item.case) for item in picked] == [
        ("worst", 1, 1),
        ("worst", 2, 5),
        ("middle", 1, 3),
        ("middle", 2, 2),
        ("best", 1, 0),
        ("best", 2, 6),
    ]


@pytest.mark.parametrize(("total", "groups"), [(0, ""), (1, "w"), (2, "wb"), (3, "wmb"), (4, "wwmb"), (5, "wwmbb")])
def test_pick_cases_gives_the_rest_to_the_worst_then_the_best(total, groups):
    assert "".join(item.group[0] for item in pick_cases(np.linspace(0, 1, 20).tolist(), total)) == groups


@pytest.mark.parametrize("cases", range(1, 12))
def test_pick_cases_takes_none_twice_and_all_of_a_few(cases):
    picked = [item.case for item in pick_cases([0.5] * cases, 9)]
    assert len(picked) == len(set(picked)) == min(cases, 9)


def test_region_holds_all_foreground_with_a_margin_in_the_images_proportions():
    truth, mask = np.zeros((200, 400), bool), np.zeros((200, 400), bool)
    truth[50:70, 100:140] = True
    mask[60:90, 120:150] = True
    region = region_of_interest(truth, [mask])
    assert region is not None
    assert region.left < 100 and region.top < 50 and region.right > 150 and region.bottom > 90
    assert (region.right - region.left) == 2 * (region.bottom - region.top)
    assert region.bottom - region.top <= 60


def test_region_of_a_tiny_cluster_is_an_eighth_and_stays_inside():
    truth = np.zeros((160, 240), bool)
    truth[159, 239] = True
    assert region_of_interest(truth, []) == Box(210, 140, 240, 160)


def test_region_of_scattered_foreground_goes_to_the_last_masks_errors():
    truth = np.zeros((200, 200), bool)
    truth[5:30, 5:30] = True  # larger, but found
    truth[175:195, 175:195] = True
    missing = truth.copy()
    missing[100:, 100:] = False
    region = region_of_interest(truth, [truth, missing])
    assert region is not None
    assert (region.right - region.left, region.bottom - region.top) == (100, 100)
    assert region.left <= 175 and region.right >= 195 and region.top <= 175 and region.bottom >= 195


def test_nothing_to_enlarge_without_foreground():
    empty = np.zeros((20, 20), bool)
    assert region_of_interest(empty, [empty]) is None


def test_a_sheet_outlines_truth_and_prediction():
    sheet = draw_sheet(case())
    assert count(sheet, TRUTH) > 200
    assert count(sheet, PREDICTION) > 200


def test_truth_hides_under_an_equal_prediction():
    same = case(members=1)  # member0 is the truth; only the truth's own panels and the legend are cyan
    without = Case(same.title, same.image, same.truth, {})
    assert count(draw_sheet(same, wrap=False), TRUTH) == count(draw_sheet(without, wrap=False), TRUTH)


def test_a_cluster_of_one_pixel_is_not_lost_when_shrunk():
    truth = np.zeros((2000, 3000), bool)
    truth[1000, 1500] = True
    empty = np.zeros_like(truth)
    picture = np.full((2000, 3000, 3), 255, np.uint8)
    whole_row = (0, 0, 10_000, 450)  # without the enlarged row
    drawn = count(draw_sheet(Case("", picture, truth, {}), wrap=False).crop(whole_row), TRUTH)
    legend = count(draw_sheet(Case("", picture, empty, {}), wrap=False).crop(whole_row), TRUTH)
    assert drawn > legend


def test_columns_wrap_to_the_proportions_of_a_screen():
    wide, wrapped = draw_sheet(case(members=4), wrap=False), draw_sheet(case(members=4))
    assert wide.width / wide.height > 3
    assert 0.8 < wrapped.width / wrapped.height < 1.6


@pytest.mark.parametrize("shape", [(40, 30), (30, 900), (900, 30), (1, 8), (2, 1)])
def test_any_shape_can_be_drawn(shape):
    mask = np.ones(shape, bool)
    draw_sheet(Case("title " * 50, None, mask, {"long name " * 20: mask, "empty": ~mask}))


def test_overview_stacks_sheets():
    sheets = [draw_sheet(case()), draw_sheet(case(image=False))]
    overview = draw_overview(sheets)
    assert overview.width == max(sheet.width for sheet in sheets)
    assert overview.height > sum(sheet.height for sheet in sheets)
