"""Which objects are too small for the decoder's masks, and the image size that suits them."""

from dataclasses import replace

import numpy as np
import pytest

from samft.annotations.boxes import (
    CELL,
    MIN_CELLS,
    SmallObjects,
    advise_on_small_objects,
    find_small_objects,
    shorter_sides,
    suggest_image_size,
)

SMALLEST = MIN_CELLS * CELL  # px of the model's input


def boxes_of(*widths_heights: tuple[float, float]) -> np.ndarray:
    return np.array([[5, 7, 5 + width, 7 + height] for width, height in widths_heights], float)


@pytest.mark.parametrize(
    ("resize_mode", "expected"),
    [
        ("pad", [20 / 400, 10 / 400]),  # both axes by the longer side
        ("squash", [20 / 400, 10 / 200]),  # each axis by its own
    ],
)
def test_sides_follow_the_resize_mode(resize_mode: str, expected: list[float]) -> None:
    sizes = np.array([[200, 400], [200, 400]])
    sides = shorter_sides(boxes_of((20, 30), (40, 10)), sizes, resize_mode=resize_mode)
    assert sides == pytest.approx(expected)


def test_no_objects_have_no_sides() -> None:
    none = find_small_objects(boxes_of().reshape(0, 4), np.zeros((0, 2), int), image_size=256)
    assert (none.num_objects, none.num_small, none.share) == (0, 0, 0)
    assert none.suggested_image_size == 256 and not none.are_many


def test_an_object_is_too_small_below_two_cells() -> None:
    sizes = np.full((3, 2), 512)
    sides = [(2 * SMALLEST - 0.1, 99), (99, 2 * SMALLEST), (99, 2 * SMALLEST + 0.1)]
    at_256 = find_small_objects(boxes_of(*sides), sizes, image_size=256)
    assert (at_256.num_objects, at_256.num_small) == (3, 1)
    assert find_small_objects(boxes_of(*sides), sizes, image_size=512).num_small == 0


@pytest.mark.parametrize(
    ("sides", "at_least", "longest_side", "expected"),
    [
        ([], 1024, 640, 1024),
        ([0.1], 256, 640, 256),
        ([SMALLEST / 512], 256, 640, 512),  # just large enough
        ([SMALLEST / 500], 256, 640, 512),
        ([SMALLEST / 500] + [0.1] * 3, 256, 640, 256),  # a quarter may be too small
        ([SMALLEST / 500] * 2 + [0.1] * 5, 256, 640, 512),
        ([SMALLEST / 512], 272, 640, 512),  # from a size that is no multiple of 64 on
        ([SMALLEST / 1024], 256, 640, 1024),  # SAM enlarges images to 1024
        ([SMALLEST / 1025], 256, 640, 1024),  # and no further
        ([SMALLEST / 1025], 256, 1100, 1088),  # unless they are larger
        ([SMALLEST / 1500], 256, 1100, 1088),  # never
        ([SMALLEST / 9000], 256, 9000, 2048),
        ([SMALLEST / 9000], 4096, 9000, 4096),
    ],
)
def test_suggested_image_size(
    sides: list[float], at_least: int, longest_side: int, expected: int
) -> None:
    size = suggest_image_size(np.array(sides), at_least=at_least, longest_side=longest_side)
    assert size == expected


def test_advice_names_the_size_and_its_price() -> None:
    sizes = np.full((8, 2), 640)
    boxes = boxes_of(*[(10, 10)] * 6, (5, 5), (100, 100))  # 10 px: 8 at 512; 5 px: 8 at 1024
    advice = find_small_objects(boxes, sizes, image_size=256).advise("val objects")
    assert advice.startswith("7 of 8 val objects (87.5%) are too small for image_size 256: ")
    assert f"under {SMALLEST} px there, {MIN_CELLS} cells" in advice
    assert advice.endswith(
        "; windows of 256 px of the images (--view objects) leave 1 of them, each at the time and "
        "memory of an image; or --image_size 512 leaves 1 of them, at 4.0 times the time and "
        "memory of an image"
    )


@pytest.mark.parametrize(("image_size", "helps"), [(256, True), ("256x256", True), ("256x192", 0)])
def test_windows_are_advised_where_they_show_half_of_the_small_objects(image_size, helps) -> None:
    sizes = np.full((4, 2), 2560)
    for small, named in ((2, helps), (3, False)):  # of 4 objects, in windows of 256 px
        boxes = boxes_of(*[(5, 50)] * small, *[(SMALLEST, 50)] * (4 - small))
        advice = find_small_objects(boxes, sizes, image_size=image_size).advise("objects")
        assert (f"--view objects) leave {small} of them" in advice) == named


def test_where_no_size_suffices_objects_are_to_be_enlarged() -> None:
    sizes = np.full((2, 2), 4000)
    tiny = find_small_objects(boxes_of((4, 4), (4, 4)), sizes, image_size=1024)
    assert tiny.suggested_image_size == 2048
    assert tiny.advise("objects").endswith(
        "; or enlarge them: --view objects with a --tile_size below image_size"
    )
    assert "--image_size 2048 leaves 2 of them, at 4.0 times" in tiny.advise("objects")
    largest = find_small_objects(boxes_of((4, 4)), sizes[:1], image_size=2048)
    assert largest.are_many and "--image_size" not in largest.advise("objects")


def test_in_windows_a_smaller_window_enlarges() -> None:
    sizes = np.full((2, 2), 256)
    tiny = find_small_objects(boxes_of((4, 4), (4, 4)), sizes, image_size=256)
    advice = replace(tiny, in_windows=True).advise("objects")
    assert advice.endswith("; a smaller --tile_size enlarges them")
    assert "--image_size" not in advice


def test_the_split_that_needs_most_is_named() -> None:
    good = SmallObjects(256, 8, 2, 256, 2, 2)
    bad = SmallObjects(256, 8, 3, 320, 2, 3)
    worse = SmallObjects(256, 4, 2, 512, 1, 2)
    assert advise_on_small_objects({}) is None
    assert advise_on_small_objects({"train": good, "val": good}) is None
    for splits in ({"train": bad, "val": worse}, {"val": worse, "train": good}):
        assert str(advise_on_small_objects(splits)).startswith("2 of 4 val objects (50.0%)")
    assert str(advise_on_small_objects({"train": bad, "val": good})).startswith("3 of 8 train")


def test_rectangle_scales_objects_as_it_fits_images() -> None:
    # 4:3 in 4:3 as in the square of the longer side; portrait in landscape at 3/4 of that.
    boxes = boxes_of((10, 30), (10, 30), (30, 10))
    sizes = np.array([[480, 640], [640, 480], [480, 640]])
    shares = shorter_sides(boxes, sizes, resize_mode="pad", frame_size=(96, 128))
    np.testing.assert_allclose(shares, [10 / 640, 7.5 / 640, 10 / 640])
    squashed = shorter_sides(boxes[:1], sizes[:1], resize_mode="squash", frame_size=(64, 128))
    np.testing.assert_allclose(squashed, min(10 / 640, 30 / 480 / 2))
    square = shorter_sides(boxes, sizes, resize_mode="pad", frame_size=(128, 128))
    np.testing.assert_array_equal(square, shorter_sides(boxes, sizes, resize_mode="pad"))


def test_suggested_rectangle_keeps_its_shape() -> None:
    sizes = np.array([[480, 640]] * 4)
    small = find_small_objects(boxes_of(*[(5, 50)] * 4), sizes, image_size="256x192")
    # 8 px are 5 of 640 at 1024 px.
    assert (small.suggested_image_size, small.suggested_side) == ("1024x768", 1024)
    assert "--image_size 1024x768 leaves 0 of them, at 16.0 times" in small.advise("objects")
    flat = find_small_objects(boxes_of(*[(5, 50)] * 4), sizes, image_size="256x48")
    assert flat.suggested_image_size == "1024x192"  # at most 1024, as the images have 640
