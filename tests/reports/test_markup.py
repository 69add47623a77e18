"""What comes from outside as HTML: escaped, printable, and short enough."""

import base64

import cv2
import numpy as np
import pytest

from samft.reports.page import picture_uri, score, short, signed, table, text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a < b & 'c' \"d\"", "a &lt; b &amp; &#x27;c&#x27; &quot;d&quot;"),
        ("\x1b[2J\u202e\ud800", "\\x1b[2J\\u202e\\ud800"),
        (None, "None"),
        (1.5, "1.5"),
    ],
)
def test_text_is_text(value: object, expected: str) -> None:
    assert text(value) == expected
    assert table([("<i>", value)]).count("<") == 10 and expected in table([("<i>", value)])


@pytest.mark.parametrize(
    ("value", "expected"), [(0.5, ">+0.500<"), (-0.25, ">\u22120.250<"), (-0.0004, ">\xb10<")]
)
def test_a_change_has_its_sign(value: float, expected: str) -> None:
    assert expected in signed(value)


def test_a_score_may_be_none() -> None:
    assert score(0.12345) == "0.123" and score(None) == "none"


def test_a_long_name_loses_its_middle_but_not_its_title() -> None:
    name = "a" * 30 + "<" + "b" * 30
    assert ">" + "a" * 16 + "\N{HORIZONTAL ELLIPSIS}" + "b" * 20 + "<" in short(name)
    assert f'title="{"a" * 30}&lt;{"b" * 30}"' in short(name)
    assert ">a&lt;b<" in short("a<b")


def test_a_picture_keeps_its_colours() -> None:
    address = picture_uri(np.full((8, 8, 3), (250, 20, 20), np.uint8))
    encoded = base64.b64decode(address.removeprefix("data:image/jpeg;base64,"))
    blue, green, red = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)[4, 4]
    assert red > 240 and green < 30 and blue < 30
