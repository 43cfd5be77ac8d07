"""The picture of a load test."""

import re

import numpy as np
from test_bench_figures import failed, request

from moescope.bench import plot


def pictured():
    """A run in which a third of the chunks arrive with the one before."""
    gaps = np.tile([0.02, 0.03, 1e-5], 20)
    return plot.make_figure(
        [request(0.1 * i, 0.1 + np.cumsum(gaps) + 0.01 * i, 61) for i in range(40)], 5.0, "a load"
    )


def test_the_picture_reads_plainly():
    figure = pictured()
    figure.canvas.draw()
    for axes in figure.axes:
        labels = [one.get_text() for one in (*axes.get_xticklabels(), *axes.get_yticklabels())]
        assert [label for label in labels if re.search(r"[$^e{]", label)] == []
        legend = axes.get_legend()
        assert legend is None or not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_chunks_that_arrive_together_do_not_take_the_axis():
    axes = pictured().axes[0]
    low, high = axes.get_xlim()
    tpot_ms = (1e3 * (0.02 + 0.03 + 1e-5)) / 3
    assert tpot_ms / 3 < low < tpot_ms
    assert high > 1e3 * (0.1 + 1.0)


def test_a_picture_of_no_response_is_drawn(tmp_path):
    plot.draw(tmp_path / "none", [failed(chunks=(0.1,))], 1.0, "model$^: a load")
    assert (tmp_path / "none").read_bytes().startswith(b"\x89PNG")
