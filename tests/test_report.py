"""The evidence: complete files, a page that stands alone, words that fit the figures."""

from __future__ import annotations

import base64
import copy
import getpass
import hashlib
import json
import platform
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import matplotlib as mpl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entprune.errors import OutputError
from entprune.report import collect_warnings, environment, render_html, write_report
from entprune.report.page import render_page
from entprune.report.style import LIGHT
from entprune.report.wording import UNKNOWN, format_count, format_fraction, format_seconds
from entprune.storage import load_path
from tests.reports import (
    GROUPS,
    make_candidate,
    make_figures,
    make_path,
    make_paths,
    make_pruned,
    make_report,
    without_figures,
)

EMPTY_TAGS = {"meta", "br", "hr", "img", "link", "input"}


class Checker(HTMLParser):
    """Raises where tags do not close; collects identifiers, text and the addresses of what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.identifiers: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in EMPTY_TAGS:
            self.open.append(tag)
        self.handle_attributes(tag, dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_attributes(tag, dict(attrs))

    def handle_attributes(self, tag: str, attributes: dict[str, str | None]) -> None:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        if tag == "script":
            assert set(attributes) <= {"type", "id"}
            self.scripts.append(str(attributes.get("id", "")))
        if attributes.get("id"):
            self.identifiers.append(str(attributes["id"]))
        self.fetched += [str(attributes[key]) for key in ("src", "href", "xlink:href", "srcset") if key in attributes]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check_page(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def drawn_text(svg: str) -> str:
    return " ".join("".join(element.itertext()) for element in ET.fromstring(svg).iter() if element.text)  # noqa: S314 -- drawn above


# --- files ----------------------------------------------------------------------------------------------------------


def test_all_files_are_written(tmp_path: Path) -> None:
    report, paths = make_report(), make_paths()
    write_report(report, paths, tmp_path / "run")
    names = sorted(str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert names == [
        "paths/000-conv1.safetensors", "paths/001-layer1.0.conv2.safetensors", "plan.json",
        "plots/error-000.svg", "plots/error-001.svg", "plots/probability-000.svg", "plots/probability-001.svg",
        "plots/search.svg", "plots/widths.svg", "report.html", "report.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == report["plan"]
    assert load_path(tmp_path / "run" / names[0]).kept(2) == paths["conv1"].kept(2)


def test_second_report_replaces_the_first_and_nothing_else(tmp_path: Path) -> None:
    write_report(make_report(), make_paths(), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    write_report(make_report(groups=[], candidates=[]), {}, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert list((tmp_path / "plots").iterdir()) == list((tmp_path / "paths").iterdir()) == []


def test_group_names_make_safe_and_distinct_file_names(tmp_path: Path) -> None:
    names = ["../../escape", "a/b", "a:b", "x" * 300]
    write_report(make_report(groups=[], candidates=[]), {name: make_path(name, 6) for name in names}, tmp_path / "run")
    assert len(list((tmp_path / "run" / "paths").iterdir())) == len(names)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_number_that_json_cannot_hold_is_named(tmp_path: Path) -> None:
    report = make_report(candidates=[make_candidate(0.5, float("nan"))])
    with pytest.raises(OutputError, match=r"candidates\.0\.validation_accuracy"):
        write_report(report, {}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_same_report_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    first = render_html(make_report(), make_paths())
    monkeypatch.setitem(mpl.rcParams, "lines.linewidth", 9.0)
    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "path")
    assert render_html(make_report(), make_paths()) == first
    assert mpl.rcParams["lines.linewidth"] == 9.0


def test_report_is_not_changed() -> None:
    report = make_report()
    before = copy.deepcopy(report)
    render_html(report, make_paths())
    collect_warnings(report)
    assert report == before


# --- page -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("report", [make_report(), make_report(fine_tuned=make_pruned()), without_figures()])
def test_page_stands_alone(report: dict[str, Any]) -> None:
    page = render_html(report, make_paths())
    checker = check_page(page)
    assert set(re.findall(r"https?://[^'\"\s]+", page)) <= {  # names of formats, no addresses
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert all(address.startswith("#") for address in checker.fetched)
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_rounds_are_told_where_there_were_any() -> None:
    rounds = [
        {
            "round": number, "parameters": parameters, "macs": 1_000_000, "validation_accuracy": 99.0,
            "validation_drop": drop, "drop_upper_bound": drop + 0.1, "latency_kept": None, "networks_tried": 7,
            "budgets_missed": missed, "widths": {"conv1": 2}, "chosen": not missed,
        }
        for number, parameters, drop, missed in ((1, 100_000, 0.2, []), (2, 10_000, 1.5, ["max_accuracy_drop"]))
    ]  # fmt: skip
    page = render_page(make_report(rounds=rounds), {})
    text = " ".join(check_page(page).text)
    assert "Rounds of pruning and tuning" in text
    for fragment in ("75.0\xa0%", "97.5\xa0%", "−1.50", "within the budget, chosen", "not within the budget"):
        assert fragment in text
    assert "Rounds" not in render_page(make_report(rounds=[]), {})


def test_references_inside_the_page_resolve() -> None:
    page = render_html(make_report(), make_paths())
    checker = check_page(page)
    assert len(checker.identifiers) == len(set(checker.identifiers))
    references = {address[1:] for address in checker.fetched} | set(re.findall(r"url\(#([^)]*)\)", page))
    assert references
    assert references - {"hatch"} <= set(checker.identifiers)  # the script makes that one


def test_each_plot_is_in_the_page_and_takes_its_colours() -> None:
    page = render_html(make_report(), make_paths())
    plots = re.findall(r"<figure[^>]*data-plot='(error[^']*)'[^>]*>.*?(<svg.*?</svg>)", page, flags=re.DOTALL)
    assert [name for name, _ in plots] == ["error-000", "error-001"]
    assert [re.search(f"data-chart='{kind}'", page) is not None for kind in ("scatter", "bars")] == [True, True]
    for _, svg in plots:
        assert re.match(r'<svg role="img" aria-label="[^"]+"', svg)
        assert re.findall(r"#[0-9a-fA-F]{6}\b", svg) == []  # a fixed colour would vanish in dark mode
        used = set(re.findall(r"var\(--(\w+)\)", svg))
        assert {"ink", "surface"} <= used <= set(LIGHT)


def test_plots_say_what_was_chosen(tmp_path: Path) -> None:
    write_report(make_report(), make_paths(), tmp_path)
    text = {path.stem: drawn_text(path.read_text()) for path in (tmp_path / "plots").iterdir()}
    assert "6 → 2" in text["widths"]
    assert "layer1.0.conv2" in text["widths"]
    assert "budget: 0.5 points" in text["search"]
    assert "↑ 40" in text["search"]
    assert "conv1: 2 of 6 kept" in text["error-000"]
    assert "entropy weight 0.3" in text["error-000"]
    assert "1.9 effective channels" in text["probability-000"]  # exp H of (2/3, 1/3) is 1.89


def test_figures_lie_in_separate_columns() -> None:
    page = render_page(make_report(fine_tuned=make_pruned(accuracy=98.96, accuracy_drop=0.04)), {})
    rows = (re.findall(r">([^<>]+)<", row) for row in re.findall(r"<tr.*?</tr>", page)[:4])
    head, accuracy, change, interval = rows
    assert head == ["unpruned", "one shot", "fine-tuned"]
    assert accuracy == ["accuracy", "99.00&nbsp;%", "98.75&nbsp;%", "98.96&nbsp;%"]
    assert change == ["change, points", UNKNOWN, "−0.25", "−0.04"]
    assert interval == ["… on new images", UNKNOWN, "−0.44 to −0.06", "−0.44 to −0.06"]


def test_page_says_whether_images_to_choose_by_are_perturbed() -> None:
    assert "to choose (25% of them perturbed), " in render_page(make_report(settings={"perturbed_share": 0.25}), {})
    for settings in ({"perturbed_share": 0.0}, {"confidence": 0.8}):  # and of an older report
        assert "of them perturbed" not in render_page(make_report(settings=settings), {})


def test_baselines_get_columns_of_their_own() -> None:
    page = render_page(make_report(baselines=[make_pruned(name="random channels", accuracy=61.5)]), {})
    assert "<th scope='col' class='number'>random channels</th>" in page
    assert "61.50&nbsp;%" in page


def test_unknown_figures_are_dashes() -> None:
    text = " ".join(check_page(render_page(without_figures(), {})).text)
    assert "None" not in text
    assert "nan" not in text
    assert text.count(UNKNOWN) >= 8
    assert "images passed in process" in text


def test_strings_are_escaped() -> None:
    attack = "<script>alert('x')</script>\"&"
    report = make_report(
        model={"spec": attack, "input_shape": [1, 28, 28], "num_classes": 10},
        groups=[make_report()["groups"][0] | {"name": attack, "note": attack, "setting": attack}],
        plan={"groups": [{"name": attack, "num_channels": 6, "kept_channels": [0, 1]}]},
        unprunable=[{"layer": attack, "reason": attack}],
        warnings=[attack],
        settings={attack: attack},
        lineage={attack: attack},
    )
    page = render_html(report, {attack: make_path(attack, 6)})
    checker = check_page(page)
    assert sum(attack in text for text in checker.text) >= 9
    assert checker.scripts == ["candidates-data", "probability-data", ""]  # two of data, and our own
    assert page.count("</script") == 3
    assert data_of(page, "probability")["groups"][0]["name"] == attack
    assert data_of(page, "candidates")["points"][0]["kind"] == "accepted"


def data_of(page: str, name: str) -> dict[str, Any]:
    """What the page holds for one of its charts."""
    (content,) = re.findall(rf"<script type='application/json' id='{name}-data'>(.*?)</script>", page, re.DOTALL)
    return dict(json.loads(content))


def test_browser_is_told_to_run_our_script_alone() -> None:
    page = render_html(make_report(), make_paths())
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}';"


def test_charts_hold_every_network_and_the_channels_that_matter() -> None:
    page = render_html(make_report(), make_paths())
    points = data_of(page, "candidates")["points"]
    assert [point["kind"] for point in points] == ["accepted", "chosen", "rejected", "dense"]
    assert [point["y"] for point in points] == [0.02, 0.25, 40.0, 0.0]
    assert data_of(page, "candidates")["top"] < 40.0  # the last but one is drawn at the edge
    first = data_of(page, "probability")["groups"][0]
    assert first["bars"] == [[0, 0.5, 1], [1, 0.5, 1], [2, 0.0, 0], [3, 0.0, 0], [4, 0.0, 0], [5, 0.0, 0]]


def test_long_tail_of_removed_channels_is_told_and_not_drawn() -> None:
    entry = make_report()["groups"][0] | {"channels": 300, "kept": 2, "channel_probability": [0.5, 0.5] + [0.0] * 298}
    plan = {"groups": [{"name": "conv1", "num_channels": 300, "kept_channels": [0, 9]}]}
    (group,) = data_of(render_html(make_report(groups=[entry], plan=plan), {}), "probability")["groups"]
    assert [channel for channel, _, kept in group["bars"] if kept] == [0, 9]
    assert f"The other {300 - len(group['bars'])} channels have w = 0" in group["text"]


def test_network_is_drawn_with_every_group_and_the_rest() -> None:
    page = render_page(make_report(), {})
    assert page.count("data-layer>") == len(GROUPS) + 1
    text = " ".join(check_page(page).text)
    for fragment in ("6 → 2", "10 → 10", "25.0\xa0% → 2.5\xa0%", "50.0\xa0% → 5.0\xa0%", "all other layers"):
        assert fragment in text


def test_older_report_without_costs_and_probabilities_gets_a_page() -> None:
    report = make_report()
    del report["other_layers"], report["plan"]
    for entry in report["groups"]:
        del entry["channel_probability"], entry["parameters"], entry["macs"]
    page = render_html(report, {})
    check_page(page)
    assert page.count("data-layer>") == len(GROUPS)
    assert "data-chart='bars'" not in page


def test_bars_are_as_long_as_what_they_stand_for() -> None:
    page = render_page(make_report(fine_tuned=make_pruned()), {})
    measures = re.findall(r"<div class='card measure'><h3>(.*?)</h3>(.*?)</div></div>", page)
    lengths = {name: re.findall(r"<i class='[\w ]+' style='width:([\d.]+)%'>", body) for name, body in measures}
    assert len(lengths) == 5
    assert lengths["Parameters"] == ["100.00", "10.00", "10.00"]
    assert lengths["Accuracy on the test images"] == ["99.00", "98.75", "98.75"]
    assert lengths["Time for 64 images"] == ["100.00", "33.33", "33.33"]


def test_network_without_groups_gets_a_page() -> None:
    page = render_html(make_report(groups=[], candidates=[]), {})
    check_page(page)
    assert "<svg" not in page


@pytest.mark.parametrize("budget", [{"parameters_removed": 0.9}, {"macs_removed": 0.8}])
def test_size_budgets_are_drawn(budget: dict[str, float], tmp_path: Path) -> None:
    write_report(make_report(budget=budget), {}, tmp_path)
    text = drawn_text((tmp_path / "plots" / "search.svg").read_text())
    assert f"budget: {100 * next(iter(budget.values())):g} % removed" in text
    assert ("multiply-accumulates left" in text) == ("macs_removed" in budget)


def test_wide_layer_and_extreme_widths_are_drawn() -> None:
    entry = make_report()["groups"][0]
    for kept in (1, 300):
        page = render_html(
            make_report(groups=[entry | {"channels": 300, "kept": kept}]), {"conv1": make_path("conv1", 300)}
        )
        assert page.count("<svg") == 1


# --- words ----------------------------------------------------------------------------------------------------------


def test_report_without_faults_has_no_warnings() -> None:
    assert collect_warnings(make_report()) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"budget_met": False}, "The budget was not met: asked was the smallest network that loses at most 0.5 points"),
        (
            {
                "budget_met": False,
                "budget": {"max_accuracy_drop": 0.5, "latency_removed": 0.4, "latency_batch": 8},
                "budgets_missed": ["latency_removed"],
            },
            "and is without at least 40.0 % of its latency at batch size 8. What failed is the budget of latency.",
        ),
        (
            {"certificate": {"max_abs_difference": 0.3, "tolerance": 1e-4, "num_images": 32, "passed": False}},
            "The certificate failed.*Do not use this network",
        ),
        ({"groups": []}, "Nothing could be pruned"),
        ({"groups": [make_report()["groups"][1]]}, "Nothing was removed"),
        (
            {"groups": [make_report()["groups"][0] | {"channels": 100, "kept": 4}]},
            r"One group was reduced to less than 5% of the channels: conv1 \(4 of 100\)",
        ),
        (
            {"groups": [make_report()["groups"][0] | {"reconstruction_error": 0.61}]},
            r"more than half of what the next layers need: conv1 \(61\.0 %\)",
        ),
        ({"dense": make_figures(accuracy=None)}, "No test images were given"),
        (
            {"validation": {"dense_accuracy": 99.9, "images": 5000}},
            "seen the validation images in training.*optimistic",
        ),
        ({"validation": {"dense_accuracy": 99.0, "images": 100}}, "one image is worth 1 points"),
        (
            {"one_shot": make_pruned(accuracy_drop=0.7, accuracy_drop_interval={"low": 0.42, "high": 0.98})},
            r"fell by 0\.70 points, more than the 0\.5.*between 0\.42 and 0\.98 points.*too few to say",
        ),
        (
            {"one_shot": make_pruned(accuracy_drop=0.9, accuracy_drop_interval={"low": 0.62, "high": 1.18})},
            r"between 0\.62 and 1\.18 points.*exceeded there, too",
        ),
        ({"one_shot": make_pruned(accuracy_drop=0.7, accuracy_drop_interval=None)}, r"fell by 0\.70 .* allowed\.$"),
        ({"one_shot": make_pruned(latency_ms={"1": 0.7})}, "At batch size 1 the smaller network is not faster"),
    ],
)
def test_each_fault_is_told(changes: dict[str, Any], sentence: str) -> None:
    warnings = collect_warnings(make_report(**changes))
    assert any(re.search(sentence, warning) for warning in warnings), warnings
    report = make_report(**changes, warnings=warnings)
    assert "Know before you use it" in render_page(report, {})


def test_group_at_the_limit_is_not_told() -> None:
    groups = [make_report()["groups"][0] | {"channels": 100, "kept": 5, "reconstruction_error": 0.5}]
    assert collect_warnings(make_report(groups=groups)) == []


def test_failed_verdicts_are_told_in_words() -> None:
    certificate = {"max_abs_difference": 0.3, "tolerance": 1e-4, "num_images": 32, "passed": False}
    text = " ".join(check_page(render_page(make_report(certificate=certificate, budget_met=False), {})).text)
    assert "do not use it" in text
    assert "No network that was tried met this" in text
    assert text.count("✗") == 2


@given(st.floats(0.0, 1.0))
def test_fractions_never_claim_everything_or_nothing(fraction: float) -> None:
    shown = float(format_fraction(fraction).removesuffix(" %"))
    assert shown == pytest.approx(100 * fraction, abs=0.06)
    if 1e-12 < fraction < 1.0 - 1e-12:
        assert shown != 0.0
    assert (shown == 100.0) <= (fraction > 1.0 - 1e-5)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, UNKNOWN), (0, "0"), (9871, "9,871"), (431_080, "431.1 k"), (14_728_266, "14.73 M"),
        (1_250_000, "1.25 M"), (999_960, "1 M"), (4.1e9, "4.1 G"),
    ],
)  # fmt: skip
def test_counts_are_short(number: float | None, text: str) -> None:
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, UNKNOWN), (2.5, "2.5 s"), (75, "1 min 15 s"), (7300, "2 h 1 min")]
)
def test_durations_are_readable(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


def test_environment_names_versions_and_nobody() -> None:
    content = environment()
    text = json.dumps(content)
    assert content["python"] == platform.python_version()
    assert content["torch"]
    assert content["threads"] >= 1
    assert content["cpu"].endswith(torch.backends.cpu.get_cpu_capability())
    for secret in (str(Path.home()), platform.node(), str(Path.cwd())):
        assert secret not in text
    assert getpass.getuser() not in {str(value) for value in content.values()}
