import base64
import io

import numpy as np
from matplotlib.image import imread

from eval.pictures import DECADES, matrix_picture, scale_picture


def pixels(uri: str) -> np.ndarray:
    """(H, W, 4) in 0..255."""
    kind, data = uri.split(",")
    assert kind == "data:image/png;base64"
    return np.rint(255 * imread(io.BytesIO(base64.b64decode(data)))).astype(int)


def matrix(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float16)


def test_the_future_is_transparent_and_nothing_else():
    rgba = pixels(matrix_picture(np.ones((5, 5), np.float16), 1.0))
    np.testing.assert_array_equal(rgba[..., 3], 255 * np.tri(5))


def test_colours_run_from_dark_to_bright_on_a_log_scale():
    step = 10 ** (-DECADES / 4)
    row = [1.0, step, step**2, step**3, step**4, 0.0]
    brightness = pixels(matrix_picture(matrix(*[row] * 6), 1.0))[5, :, :3].sum(-1)
    assert list(brightness) == sorted(brightness, reverse=True)
    assert brightness[4] == brightness[5], "below the scale there is only zero"
    scale = pixels(scale_picture())[0]
    np.testing.assert_allclose(pixels(matrix_picture(matrix(*[row] * 6), 1.0))[5, :5], scale[128:63:-16], atol=6)


def test_taking_away_is_red_and_taking_is_blue():
    rgba = pixels(matrix_picture(matrix([0.1, 0.0], [0.1, -0.1]), 1.0))
    (taken, away) = rgba[1, 0], rgba[1, 1]
    assert taken[2] > taken[0]
    assert away[0] > away[2]


def test_the_scale_is_what_it_is_told():
    values = matrix([0.2, 0.0], [0.02, 0.01])
    np.testing.assert_array_equal(
        pixels(matrix_picture(values, 0.5)), pixels(matrix_picture((4 * values).astype(np.float16), 2.0))
    )
    clipped = pixels(matrix_picture(matrix([1.0, 0.0], [9.0, np.inf]), 1.0))
    np.testing.assert_array_equal(clipped[1, 0], clipped[0, 0])
    np.testing.assert_array_equal(clipped[1, 1], clipped[0, 0])


def test_an_empty_head_is_dark():
    rgba = pixels(matrix_picture(np.zeros((3, 3), np.float16), 0.0))
    assert rgba[..., :3].max() < 40
