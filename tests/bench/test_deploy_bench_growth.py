import io

import numpy as np
import pytest
from PIL import Image

from xcit.bench import deploy, plots, results
from xcit.bench.linear_cost import fit_growth, patch_of, series_of
from xcit.errors import DataError

SIZES = (512, 640, 768, 1024, 1280, 1536, 1792, 2048)


def tokens(size, patch=16):
    return (size // patch) ** 2


@pytest.mark.parametrize(
    ("intercept", "factor", "exponent"), [(40.0, 0.02, 1.0), (0.0, 0.5, 1.0), (3.0, 2e-5, 2.0), (15.0, 0.003, 1.35)]
)
def test_a_known_growth_is_found(intercept, factor, exponent):
    n = [tokens(size) for size in SIZES]
    growth = fit_growth(n, [intercept + factor * x**exponent for x in n])
    assert growth.exponent == pytest.approx(exponent, abs=1e-9)  # it is on the grid
    assert growth.intercept == pytest.approx(intercept, rel=1e-6, abs=1e-6)
    assert growth.factor == pytest.approx(factor, rel=1e-6)
    assert growth.worst < 1e-9
    assert growth.at(5000) == pytest.approx(intercept + factor * 5000**exponent)


def test_noise_of_two_percent_moves_the_exponent_little():
    n = np.array([tokens(size, 8) for size in SIZES])
    draw = np.random.default_rng(0)
    for _ in range(20):
        y = (30 + 0.05 * n) * (1 + 0.02 * draw.uniform(-1, 1, len(n)))
        assert 0.9 < fit_growth(n, y).exponent < 1.1


def test_without_the_intercept_the_slope_would_be_another():
    n = np.array([tokens(size) for size in SIZES])
    y = 200 + 0.05 * n
    slope = np.polyfit(np.log(n), np.log(y), 1)[0]
    assert slope < 0.8
    assert fit_growth(n, y).exponent == pytest.approx(1)


def test_an_intercept_is_never_negative():
    n = [tokens(size) for size in SIZES]
    growth = fit_growth(n, [x**2 * (1 if x > 2000 else 0.9) for x in n])
    assert growth.intercept >= 0


@pytest.mark.parametrize(
    ("n", "y", "words"),
    [
        ((1, 2, 3), (1, 2, 3), "there are 3"),
        ((1, 1, 2, 3), (1, 1, 2, 3), "there are 3"),
        ((1, 2, 3, 4), (1, 2, 0, 4), "positive"),
    ],
)
def test_what_cannot_be_fitted(n, y, words):
    with pytest.raises(DataError, match=words):
        fit_growth(n, y)


def test_the_patch_is_in_the_name():
    assert patch_of("xcit_small_12_p8") == 8
    assert patch_of("xcit_small_12_p16") == 16
    assert patch_of("vit_small_patch16_224") == 16
    with pytest.raises(DataError, match="resnet50"):
        patch_of("resnet50")


def linear_rows(
    model="xcit_small_12_p16", source="folded", exponent=1.0, sizes=SIZES, date="2026-01-01T00:00:00Z", **others
):
    rows = []
    for size in sizes:
        n = tokens(size, patch_of(model))
        rows.append(
            dict.fromkeys(deploy.COLUMNS, "1")
            | {"date": date, "case": f"linear/{model}/{size}/1", "model": model, "source": source, "runtime": "eager"}
            | {"dtype": "float32", "image_size": str(size), "hardware": "Some CPU", "device": "cpu", "threads": "2"}
            | {"median_ms": f"{20 + 0.01 * n**exponent:.6f}", "peak_mib": f"{5 + 0.002 * n:.6f}"}
            | others
        )
    return rows


def test_series_take_the_last_run_and_leave_out_what_is_not_linear():
    old = linear_rows(median_ms="1")
    new = linear_rows(date="2026-02-01T00:00:00Z")
    foreign = [row | {"case": row["case"].replace("linear", "xcit")} for row in linear_rows(source="timm")]
    short = linear_rows(source="ours", sizes=SIZES[:3])
    (series,) = series_of([*new, *old, *foreign, *short], "median_ms")
    assert series.num_tokens == tuple(tokens(size) for size in SIZES)
    assert series.costs == tuple(float(row["median_ms"]) for row in new)
    assert series.name == "xcit_small_12_p16, folded"
    assert fit_growth(series.num_tokens, series.costs).exponent == pytest.approx(1, abs=2e-3)


def test_sizes_without_a_figure_are_left_out():
    rows = linear_rows()
    rows[0]["peak_mib"] = ""
    (series,) = series_of(rows, "peak_mib")
    assert series.image_sizes == SIZES[1:]


def test_the_picture(tmp_path):
    csv, png = tmp_path / "deploy.csv", tmp_path / "linear.png"
    rows = [
        *linear_rows(),
        *linear_rows(source="timm", exponent=1.02),
        *linear_rows(model="xcit_small_12_p8"),
        *linear_rows(model="vit_small_patch16_224", source="timm", exponent=1.6),
    ]
    other = linear_rows(source="elsewhere", hardware="Old CPU", date="2025-01-01T00:00:00Z")
    results.append(csv, [*other, *rows], deploy.COLUMNS)
    plots.write_linear(csv, png)
    with Image.open(io.BytesIO(png.read_bytes())) as image:
        assert image.size[0] > image.size[1] > 400
        assert np.asarray(image.convert("L")).std() > 5  # something is drawn
    figure = plots.linear_figure(rows)
    (left, right) = figure.axes
    assert (left.get_xscale(), left.get_yscale()) == ("log", "log")
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels[0] == "xcit_small_12_p16, folded: p = 1.00"
    assert labels[-1].startswith("vit_small_patch16_224: p = 1.6")
    assert len(right.get_legend().get_texts()) == 4


def test_without_memory_the_picture_has_one_half():
    (axes,) = plots.linear_figure(linear_rows(peak_mib="")).axes
    assert axes.get_title(loc="left") == "time of one image, ms"


def test_what_cannot_be_drawn(tmp_path):
    with pytest.raises(DataError, match="not there"):
        plots.write_linear(tmp_path / "no.csv", tmp_path / "a.png")
    with pytest.raises(DataError, match="four sizes or more"):
        plots.linear_figure(linear_rows(sizes=SIZES[:3]))
    with pytest.raises(DataError, match="openvino in float32"):
        plots.linear_figure(linear_rows(), runtime="openvino")
