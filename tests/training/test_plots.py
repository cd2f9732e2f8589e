"""Plots: what is drawn is read back from the figure; the files are whole PNGs, replaced atomically."""

import math
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from wrinklefree.training import plots
from wrinklefree.training.plots import Bar, Curve, Panel, draw_bars, draw_curves


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Figures that were saved."""
    seen: list[Figure] = []
    save = plots.save_figure

    def remember(figure, path):
        seen.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "save_figure", remember)
    return seen


def test_curves_keep_their_values_gaps_and_axes(tmp_path, figures):
    panels = [
        Panel("loss", [Curve("ce", [1, 2, 3], [3.0, math.nan, 1.0]), Curve("kl", [1, 3], [0.1, 0.2])], log=True),
        Panel("validation", [Curve("bits", [3], [1.5])], markers=True),
    ]
    draw_curves(tmp_path / "new" / "loss.png", panels, title="stage2")
    upper, lower = figures[0].axes
    assert upper.get_yscale() == "log"
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["ce", "kl"]
    np.testing.assert_array_equal(upper.lines[0].get_ydata(), [3.0, math.nan, 1.0])
    assert lower.lines[0].get_marker() == "o"
    assert (lower.get_ylabel(), lower.get_xlabel()) == ("validation", "step")
    picture = matplotlib.image.imread(tmp_path / "new" / "loss.png")
    assert picture.shape == (round((0.8 + 2.4 * 2) * 120), 8 * 120, 4)
    assert picture[..., :3].std() > 0.01  # not a blank page


def test_bars_start_at_zero_and_carry_their_intervals(tmp_path, figures):
    draw_bars(tmp_path / "bars.png", [Bar("base", 2.0), Bar("student", 2.5, 2.25, 3.0)], y_label="bits", title="t")
    (axes,) = figures[0].axes
    assert [bar.get_height() for bar in axes.patches] == [2.0, 2.5]
    assert axes.get_ylim()[0] == 0
    (interval,) = axes.collections
    np.testing.assert_allclose(interval.get_segments()[0], [[1, 2.25], [1, 3.0]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["base", "student"]


def test_a_new_plot_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    for value in (1.0, 2.0):
        draw_bars(tmp_path / "bars.png", [Bar("a", value)], y_label="y", title="t")
    assert [path.name for path in tmp_path.iterdir()] == ["bars.png"]


def test_matplotlib_is_not_imported_before_something_is_drawn():
    code = "import sys; import wrinklefree.training.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
