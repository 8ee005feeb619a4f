import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hintjax.experiments import pictures


@pytest.mark.parametrize("shape", [(1, 1), (4, 20), (60, 30)])
def test_a_heat_map_shows_every_layer_once_and_frames_the_pairs(shape):
    rows, columns = ([f"group{i}/${i}_b" for i in range(n)] for n in shape)
    values = np.linspace(-0.1, 1, shape[0] * shape[1]).reshape(shape)
    marked = [(shape[0] - 1, 0)]
    figure = pictures.heat_map(values, rows, columns, marked=marked, title="CKA")
    assert isinstance(figure, Figure)
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == rows and len(axes.get_xticks()) == len(columns)
    np.testing.assert_array_equal(axes.images[0].get_array(), values)
    (frame,) = axes.lines
    assert frame.get_ydata().mean() > shape[0] - 1.6
    # All names are inside of the figure.
    box = figure.bbox
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        extent = text.get_window_extent()
        assert extent.x0 >= 0 and extent.y0 >= 0 and extent.y1 <= box.y1


def test_a_heat_map_of_another_shape_is_refused(unchecked):
    with pytest.raises(ValueError, match="values of 1 rows and 2 columns, got shape"):
        pictures.heat_map(np.zeros((2, 1)), ["a"], ["b", "c"])
