import pytest

pytest.importorskip("matplotlib")

from hintjax.experiments.pictures.style import color_of, line_style


def test_colors_and_styles_tell_ten_arms_apart():
    looks = {(color_of(i), str(line_style(i))) for i in range(10)}
    assert len({color for color, _ in looks}) == 10
    assert len({(color_of(i), str(line_style(i))) for i in range(15)}) == 15
