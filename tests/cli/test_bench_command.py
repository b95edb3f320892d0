import csv

import pytest

from xcit.bench import deploy
from xcit.bench.deploy_cases import CASES, QUICK_CASES
from xcit.cli.main import main


@pytest.fixture
def asked(monkeypatch):
    """What the command asks the bench for, without measuring."""
    calls = []

    def run(cases, options, **others):
        calls.append((cases, options, others))
        return []

    monkeypatch.setattr(deploy, "run", run)
    return calls


def test_the_list(capsys):
    assert main(["bench", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(str(case) in shown for case in CASES)
    assert "xcit: our XCiT" in shown


def test_a_small_case_from_command_to_file(tmp_path, capsys):
    out = tmp_path / "mine.csv"
    arguments = ["xcit/xcit_nano_12_p16/64/1", "--quick", "--runtimes", "eager", "--budget-s", "0.1", "--no-memory"]
    assert main(["bench", *arguments, "--threads", "1", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "xcit_nano_12_p16, 64 px, batch 1, inference, float32 (" in shown
    lines = [line.split() for line in shown.splitlines() if line.startswith(("timm", "ours", "folded"))]
    assert [line[:2] for line in lines] == [["timm", "eager"], ["ours", "eager"], ["folded", "eager"]]
    assert lines[0][5:7] == ["1.00x", "-"]  # no memory was measured
    with out.open(newline="") as file:
        assert [row["source"] for row in csv.DictReader(file)] == ["timm", "ours", "folded"]


def test_options_arrive(asked, tmp_path):
    out = tmp_path / "a.csv"
    what = ["xcit/*p8/512/1", "--runtimes", "eager, openvino", "--dtypes", "float32,bfloat16"]
    assert main(["bench", *what, "--threads", "3", "--budget-s", "4", "--out", str(out)]) == 0
    ((cases, options, others),) = asked
    assert [str(case) for case in cases] == ["xcit/xcit_small_12_p8/512/1"]
    assert (options.runtimes, options.dtypes) == (("eager", "openvino"), ("float32", "bfloat16"))
    assert (options.threads, options.plan.budget_s, options.memory, others["out"]) == (3, 4.0, True, out)


def test_quick_takes_a_small_case_and_a_second(asked):
    assert main(["bench", "--quick"]) == 0
    ((cases, options, _),) = asked
    assert cases == [*QUICK_CASES]
    assert options.plan.budget_s == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name a case"),
        (["--plot", "a.png"], "Name a case"),
        (["xcit/xcit_smal_12_p8/224/1"], "Did you mean 'xcit_small_12_p8'"),
        (["--quick", "--runtimes", "eagre"], "Did you mean 'eager'"),
        (["--quick", "--dtypes", "int4"], "There are float32"),
        (["--quick", "--device", "tpu"], "There are cpu, cuda"),
        (["--quick", "--threads", "0"], "--threads is 0"),
        (["--quick", "--budget-s", "0"], "--budget-s is 0"),
        (["--quick", "--plot", "a.pdf"], "PNG"),
        (["--quick", "--dtypes", "bfloat16", "--runtimes", "onnxruntime"], "no matrix product in bfloat16"),
        (["--quick", "--dtypes", "float16"], "float16 is for CUDA"),
        (["--plot", "a.png", "--out", "missing.csv"], "missing.csv is not there"),
    ],
)
def test_mistakes(capsys, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert [*tmp_path.iterdir()] == []


def linear_rows():
    return [
        dict.fromkeys(deploy.COLUMNS, "1")
        | {"date": "2026-01-01T00:00:00Z", "case": f"linear/xcit_small_12_p16/{size}/1", "model": "xcit_small_12_p16"}
        | {"source": "folded", "runtime": "eager", "dtype": "float32", "image_size": str(size), "device": "cpu"}
        | {"median_ms": f"{10 + 0.02 * (size // 16) ** 2:.4f}", "peak_mib": ""}
        for size in (512, 1024, 1536, 2048)
    ]


def test_growth_is_printed_and_drawn(capsys, monkeypatch, tmp_path):
    rows = linear_rows()
    monkeypatch.setattr(deploy, "run", lambda cases, options, **others: rows)
    png = tmp_path / "linear.png"
    assert main(["bench", "linear/xcit_small_12_p16/*", "--plot", str(png)]) == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("xcit_small_12_p16, folded")]
    assert line.split()[2:] == [
        "eager",
        "float32",
        "time",
        "512",
        "to",
        "2048",
        "1.000",
        "10.0",
        "ms",
        "20",
        "ms",
        "0.0",
        "%",
    ]
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_file_is_drawn_without_measuring(tmp_path, monkeypatch, capsys):
    from xcit.bench import results

    monkeypatch.setattr(deploy, "run", lambda *args, **kwargs: pytest.fail("something was measured"))
    out, png = tmp_path / "a.csv", tmp_path / "a.png"
    results.append(out, linear_rows(), deploy.COLUMNS)
    assert main(["bench", "--out", str(out), "--plot", str(png)]) == 0
    assert png.exists()
    assert f"{png}: written" in capsys.readouterr().out


def test_the_help_names_every_group(capsys):
    from xcit.bench.deploy_cases import GROUPS

    assert main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(group in shown for group in GROUPS)
