"""Several runs side by side, and pages made again: nothing is lost, what differs is told, bad input is one sentence."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from entprune.errors import ArtifactError
from entprune.report import write_report
from entprune.report.comparison import collect_differences, render_comparison
from entprune.report.reading import read_report
from flows import cli
from flows.cli_report import distinct_names
from flows.tables import comparison_table
from tests.reports import make_paths, make_pruned, make_report, make_sweep, without_figures


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit, match=r"^\d+$") as ended:
        cli.main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folders of three runs: plain, fine-tuned, and another network in process."""
    folder = tmp_path_factory.mktemp("runs")
    tuned = make_report(fine_tuned=make_pruned(accuracy_drop=-0.1), seed=1, settings={"confidence": 0.8, "threads": 2})
    for name, report in (("plain", make_report()), ("tuned", tuned), ("other", without_figures())):
        write_report(report, make_paths(), folder / name)
    return folder


@pytest.fixture
def runs(written: Path, tmp_path: Path) -> list[Path]:
    """The same, to be changed at will."""
    return [shutil.copytree(written / name, tmp_path / name) for name in ("plain", "tuned", "other")]


def data_of(page: str, name: str) -> dict[str, Any]:
    (content,) = re.findall(rf"<script type='application/json' id='{name}-data'>(.*?)</script>", page, re.DOTALL)
    return dict(json.loads(content))


# --- one run --------------------------------------------------------------------------------------------------------


def test_page_of_a_run_comes_out_as_it_was(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    page = runs[0] / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert run_cli("report", str(runs[0])) == 0
    assert page.read_bytes() == before
    assert "99.00 %" in capsys.readouterr().out


def test_page_can_be_made_without_paths_and_elsewhere(runs: list[Path], tmp_path: Path) -> None:
    shutil.rmtree(runs[2] / "paths")
    assert run_cli("report", str(runs[2]), "--output", str(tmp_path / "new" / "page.html")) == 0
    page = (tmp_path / "new" / "page.html").read_text()
    assert "data-chart='bars'" in page
    assert "error-000" not in page


def test_page_of_a_sweep_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(make_sweep() | {"schema_version": 1}))
    assert run_cli("report", str(tmp_path)) == 0
    assert "2 settings compared" in (tmp_path / "sweep.html").read_text()


# --- several runs ---------------------------------------------------------------------------------------------------


def test_runs_are_compared(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "both.html"
    assert run_cli("report", *map(str, runs[:2]), "--output", str(output)) == 0
    page = output.read_text()
    points = data_of(page, "parameters")["points"]
    assert [(point["label"], point["kind"], point["y"]) for point in points] == [
        ("#1", "plain", 0.25),
        ("#2", "tuned", -0.1),
    ]
    assert points[0]["x"] == pytest.approx({"parameters": 90, "macs": 80, "latency": 100 * 2 / 3})
    assert "<b>2</b>" in page  # conv1 keeps two channels
    settings = page[page.index("Settings that differ") :]
    rows = re.findall(
        r"<tr><td class='text'>(.*?)</td><td class='code'>(.*?)</td><td class='code'>(.*?)</td>", settings
    )
    assert rows == [("seed", "0", "1"), ("fine-tuned", "no", "yes"), ("threads", "1", "2")]
    printed = capsys.readouterr().out
    assert "plain" in printed
    assert "tuned" in printed


def test_default_output_lies_here(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli("report", *map(str, runs)) == 0
    page = (tmp_path / "comparison.html").read_text()
    assert page.count("<h2>Widths of ") == 2  # of two networks
    assert "None" not in re.sub(r"<(style|script).*?</\1>", "", page, flags=re.DOTALL)


def test_equal_runs_differ_in_nothing() -> None:
    runs = [("a", make_report()), ("b", make_report())]
    assert list(collect_differences(runs)) == []
    assert "all runs were asked for the same" in render_comparison(runs)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": make_report()["model"] | {"spec": "vgg16_cifar"}}, "different networks"),
        ({"data": make_report()["data"] | {"sha256": "ef" * 32}}, "different images"),
        ({"lineage": {"checkpoint_sha256": "12"}}, "different checkpoints"),
        ({"environment": {"cpus": 64}}, "different machines"),
        ({"environment": {"cpu": "another one"}}, "different machines"),
        ({"budget_met": False}, r"#2 \(b\) did not meet its budget"),
        ({"certificate": {"passed": False}}, r"certificate of #2 \(b\) failed"),
    ],
)
def test_what_makes_runs_hard_to_compare_is_told(changes: dict[str, Any], sentence: str) -> None:
    (told,) = collect_differences([("a", make_report()), ("b", make_report(**changes))])
    assert re.search(sentence, told)


def test_names_in_the_comparison_are_escaped() -> None:
    attack = "</script><script>alert(1)</script>"
    page = render_comparison([(attack, make_report()), ("b", make_report())])
    assert attack not in page
    assert page.count("</script") == 4  # data of three charts, and our own
    assert data_of(page, "macs")["points"][0]["lines"][0] == f"#1 {attack}"


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    assert distinct_names([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert distinct_names([tmp_path / "a", tmp_path / "a"]) == ["a", "a"]


def test_comparison_fits_a_narrow_terminal() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(comparison_table([("runs/a-rather-long-name", make_report()), ("b", without_figures())]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("98.75 %", "+0.25", "−90.0%", "−80.0%", "4.00 ms", "passed"):
        assert part in text
    assert max(len(line) for line in text.splitlines()) <= 80


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (
            None,
            ["expected the output folder of `entprune prune` with report.json in it", "a folder without report.json"],
        ),
        ("{ broken", ["expected JSON", "cannot be read", "restore it"]),
        ("[]", ["expected schema_version 1, got no object"]),
        ('{"schema_version": 2}', ["expected schema_version 1, got 2", "the version of entprune that wrote it"]),
        ('{"schema_version": 1}', ["expected a part named 'model'"]),
        (json.dumps(make_report(one_shot={})), ["cannot be shown", "KeyError"]),
        (json.dumps(make_report(groups=3)), ["cannot be shown"]),
    ],
)
@pytest.mark.parametrize("further", [0, 1])
def test_bad_report_is_one_sentence(
    content: str | None, fragments: list[str], further: int, runs: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bad = tmp_path / "bad"
    bad.mkdir()
    if content is not None:
        (bad / "report.json").write_text(content)
    output = tmp_path / "page.html"
    assert run_cli("report", str(bad), *map(str, runs[:further]), "--output", str(output)) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith(f"entprune: error: '{bad if content is None or further == 0 else tmp_path}")
    for fragment in fragments:
        assert fragment in error
    assert not output.exists()


def test_missing_folder_and_file_in_its_place_are_told(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="got nothing; check the path"):
        read_report(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="got a file; check the path"):
        read_report(tmp_path / "file")


def test_no_folder_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("report") == 2
    assert "entprune report --help" in capsys.readouterr().err
