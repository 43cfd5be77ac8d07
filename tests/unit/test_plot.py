import numpy as np
import pytest
from client_fakes import make_trace
from matplotlib import rc_context, rcdefaults, rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba

from moescope import CommandError, analysis, formats, plot
from moescope.run_dir import RunDir

HIGHLIGHT = "#e4572e"
COUNTS = np.array([[4, 2, 0, 2], [1, 1, 9, 1]])


def drawn(figure):
    figure.dpi = 50
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas


def texts(figure):
    found = [text.get_text() for text in figure.texts]
    return found + [text.get_text() for axes in figure.axes for text in axes.texts]


def test_the_bars_are_the_selections_of_the_layer_with_the_highest_violation():
    figure = plot.expert_histogram(COUNTS, [0, 5], "some model")
    bars = figure.axes[0]
    assert [patch.get_height() for patch in bars.patches] == [1, 1, 9, 1]
    assert [line.get_ydata()[0] for line in bars.lines] == [3.0]
    assert "some model" in texts(figure)
    assert "Selections per expert, layer 5: the highest MaxVio of 2 layers" in texts(figure)


def test_the_sorted_load_of_every_layer_is_drawn_and_the_worst_stands_out():
    loads = plot.expert_histogram(COUNTS, [0, 5]).axes[1]
    (lines,) = loads.collections
    drawn_loads = [path.vertices[:, 1].tolist() for path in lines.get_paths()]
    assert drawn_loads == [[2, 1, 1, 0], pytest.approx([3, 1 / 3, 1 / 3, 1 / 3])]
    worst = next(line for line in loads.lines if line.get_color() == HIGHLIGHT)
    assert worst.get_ydata().tolist() == drawn_loads[1]
    assert "layer 5 is red" in loads.get_title(loc="left")


def test_the_table_tells_mean_and_worst_layer_and_the_top_3_of_that_layer():
    found = texts(plot.expert_histogram(COUNTS, [0, 5]))
    lowest = (9 * np.log2(12 / 9) + 3 * np.log2(12)) / 12
    start = found.index("entropy in bits, of 2.00")
    assert found[start : start + 12] == [
        *("entropy in bits, of 2.00", f"{(1.5 + lowest) / 2:.2f}", f"{lowest:.2f}", "(5)"),
        *("normalized entropy", f"{(1.5 + lowest) / 4:.3f}", f"{lowest / 2:.3f}", "(5)"),
        *("MaxVio", "1.50", "2.00", "(5)"),
    ]
    start = found.index("active experts, of 4")
    assert found[start : start + 4] == ["active experts, of 4", "3.5", "3", "(0)"]
    assert "busiest experts of layer 5" in found
    start = found.index("75.0%")
    assert found[start - 2 : start + 7] == ["2", "9", "75.0%", "0", "1", "8.3%", "1", "1", "8.3%"]


def test_the_top_3_bars_stand_out():
    bars, _, table = plot.expert_histogram(COUNTS, [0, 5]).axes
    marker = to_rgba(table.lines[-1].get_color())
    assert [bar.get_facecolor() == marker for bar in bars.patches] == [
        True, True, True, False,
    ]  # fmt: skip


def test_one_layer_is_called_by_its_number_and_has_no_worst():
    figure = plot.expert_histogram(COUNTS[:1], [7])
    assert len(figure.axes) == 2
    found = texts(figure)
    assert "Selections per expert, layer 7" in found
    start = found.index("entropy in bits, of 2.00")
    assert found[start : start + 3] == ["entropy in bits, of 2.00", "1.50", "normalized entropy"]
    assert not any("worst" in text for text in found)


def test_the_heatmap_is_the_load_and_every_layer_has_its_entropy_and_violation():
    figure = plot.layer_heatmap(COUNTS, [0, 5])
    heat, _, entropy, violation = figure.axes
    assert np.allclose(heat.images[0].get_array(), [[2, 1, 0, 1], [1 / 3, 1 / 3, 3, 1 / 3]])
    assert [label.get_text() for label in heat.get_yticklabels()] == ["0", "5"]
    bits = analysis.entropy_bits(COUNTS).tolist()
    assert [patch.get_width() for patch in entropy.patches] == pytest.approx(bits)
    assert [text.get_text() for text in entropy.texts] == [
        f"{one:.2f} ({one / 2:.3f})" for one in bits
    ]
    assert entropy.get_title(loc="left").startswith("entropy in bits, of 2.00")
    assert entropy.get_xticks()[1] == 2.0
    assert [patch.get_width() for patch in violation.patches] == pytest.approx([1.0, 2.0])
    assert [text.get_text() for text in violation.texts] == ["1.00", "2.00"]
    assert [patch.get_facecolor() == to_rgba(HIGHLIGHT) for patch in violation.patches] == [
        False,
        True,
    ]


def test_of_many_layers_the_worst_alone_has_its_value():
    counts = np.tile([3, 3, 3, 3], (60, 1))
    counts[41] = [6, 2, 2, 2]
    _, _, entropy, violation = plot.layer_heatmap(counts, list(range(60))).axes
    assert [text.get_text() for text in violation.texts] == ["1.00"]
    assert [text.get_position()[1] for text in entropy.texts] == [41]


@pytest.mark.parametrize(
    ("shape", "scale"), [((1, 1), 5), ((6, 60), 200_000), ((94, 512), 10_000_000)]
)
def test_everything_fits_into_the_picture_whatever_the_models_size(shape, scale):
    counts = np.random.default_rng(0).integers(0, scale, shape) + 1
    for draw in (plot.expert_histogram, plot.layer_heatmap):
        figure = draw(counts, list(range(shape[0])))
        width_in, height_in = figure.get_size_inches()
        box = figure.get_tightbbox(drawn(figure).get_renderer())
        assert box.x0 >= 0 <= box.y0
        assert box.x1 <= width_in
        assert box.y1 <= height_in


def test_a_layer_without_selections_does_not_spoil_the_others():
    counts = np.array([[1, 2, 9], [0, 0, 0]])
    figure = plot.layer_heatmap(counts, [0, 1])
    drawn(figure)
    assert figure.axes[3].get_xticks()[1] == analysis.max_violation(counts)[0] > 1
    drawn(plot.expert_histogram(counts, [0, 1]))


def test_nothing_to_draw_is_told():
    for draw in (plot.expert_histogram, plot.layer_heatmap):
        with pytest.raises(CommandError, match="no expert was selected"):
            draw(np.zeros((2, 4), np.int64), [0, 1])


def test_a_runs_pictures_are_png_files(tmp_path):
    run_dir = RunDir(tmp_path)
    trace = make_trace()
    meta = formats.meta_line(
        model="m", versions={}, device="cpu", seed=0, layers=[0, 1, 3], top_k=4, num_experts=60
    )
    run_dir.routes.write_bytes(meta + b"".join(formats.route_lines(trace)))
    plot.draw_run(run_dir)
    for path in (run_dir.histogram, run_dir.layers):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_drawing_leaves_matplotlibs_own_settings_alone():
    with rc_context():
        rcdefaults()
        before = dict(rcParams)
        plot.expert_histogram(COUNTS, [0, 1])
        plot.layer_heatmap(COUNTS, [0, 1])
        assert dict(rcParams) == before
