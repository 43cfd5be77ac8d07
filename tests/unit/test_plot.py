import numpy as np
import pytest
from client_fakes import make_trace
from matplotlib import rc_context, rcdefaults, rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba

from moescope import CommandError, analysis, formats, plot
from moescope.run_dir import RunDir

COUNTS = np.array([[4, 2, 0, 2], [1, 1, 9, 1]])


def drawn(figure):
    figure.dpi = 50
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas


def texts(figure):
    found = [text.get_text() for text in figure.texts]
    return found + [text.get_text() for axes in figure.axes for text in axes.texts]


def test_the_bars_are_the_selections_of_all_layers():
    figure = plot.expert_histogram(COUNTS, [0, 5], "some model")
    bars, _ = figure.axes
    assert [patch.get_height() for patch in bars.patches] == [5, 3, 9, 3]
    assert [line.get_ydata()[0] for line in bars.lines] == [5.0]
    assert "some model" in texts(figure)
    assert "Selections per expert, all 2 logged layers" in texts(figure)


def test_the_table_tells_entropy_active_experts_and_the_top_3():
    found = texts(plot.expert_histogram(COUNTS, [0, 5]))
    total = COUNTS.sum(axis=0)
    assert f"{analysis.entropy(total):.3f} of {np.log(4):.3f} nats" in found
    assert f"{analysis.normalized_entropy(total):.3f}" in found
    assert f"{analysis.normalized_entropy(COUNTS).mean():.3f}" in found
    assert "4 of 4" in found
    assert "45.0%" in found
    start = found.index("45.0%")
    assert found[start - 2 : start + 7] == ["2", "9", "45.0%", "0", "5", "25.0%", "1", "3", "15.0%"]


def test_the_top_3_bars_stand_out():
    axes, table = plot.expert_histogram(COUNTS, [0, 5]).axes
    marker = to_rgba(table.lines[-1].get_color())
    assert [bar.get_facecolor() == marker for bar in axes.patches] == [
        True, True, True, False,
    ]  # fmt: skip


def test_one_layer_is_called_by_its_number():
    found = texts(plot.expert_histogram(COUNTS[:1], [7]))
    assert "Selections per expert, layer 7" in found
    assert "mean within layers" not in found


def test_the_heatmap_is_the_load_and_every_layer_has_its_entropy_and_violation():
    figure = plot.layer_heatmap(COUNTS, [0, 5])
    heat, _, entropy, violation = figure.axes
    assert np.allclose(heat.images[0].get_array(), [[2, 1, 0, 1], [1 / 3, 1 / 3, 3, 1 / 3]])
    assert [label.get_text() for label in heat.get_yticklabels()] == ["0", "5"]
    widths = [patch.get_width() for patch in entropy.patches]
    assert widths == pytest.approx(analysis.normalized_entropy(COUNTS).tolist())
    assert [patch.get_width() for patch in violation.patches] == pytest.approx([1.0, 2.0])
    assert [text.get_text() for text in violation.texts] == ["1.00", "2.00"]


@pytest.mark.parametrize(
    ("shape", "scale"), [((1, 1), 5), ((4, 60), 200_000), ((58, 256), 10_000_000)]
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
