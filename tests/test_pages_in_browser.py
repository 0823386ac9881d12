"""The pages as a reader sees them: everything is drawn, nothing is fetched, nothing is complained about."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from entprune.report import render_html
from entprune.report.comparison import render_comparison
from entprune.report.sweep_page import render_sweep
from tests.browser import Page, find_chromium, open_page
from tests.reports import GROUPS, make_candidate, make_paths, make_pruned, make_report, make_sweep

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
ATTACK = "</script><img src=http://127.0.0.1:9/x onerror=alert(1)>"


def make_tuned() -> dict[str, Any]:
    return make_report(fine_tuned=make_pruned(accuracy_drop=0.1), budget={"parameters_removed": 0.9})


def render_attacked() -> str:
    """Every name that a user may choose is an attack."""
    report = make_report(model=make_report()["model"] | {"spec": ATTACK}, warnings=[ATTACK], settings={ATTACK: ATTACK})
    for entry, planned in zip(report["groups"], report["plan"]["groups"], strict=True):
        entry["note"] = ATTACK
        entry["name"] = planned["name"] = f"{ATTACK} {entry['name']}"
    return render_html(report, {})


PAGES = {
    "report": lambda: render_html(make_report(), make_paths()),
    "tuned": lambda: render_html(make_tuned(), make_paths()),
    "comparison": lambda: render_comparison([("plain", make_report()), ("tuned", make_tuned())]),
    "sweep": lambda: render_sweep(make_sweep()),
    "attacked": render_attacked,
}


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    assert CHROMIUM is not None
    with open_page(CHROMIUM) as opened:
        yield opened


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    written = {name: folder / f"{name}.html" for name in PAGES}
    for name, path in written.items():
        path.write_text(PAGES[name](), encoding="utf-8")
    return {name: path.as_uri() for name, path in written.items()}


def marks(page: Page, name: str, selector: str = ".mark") -> int:
    return int(page.evaluate(f"document.querySelectorAll('[data-plot={name}] .plot {selector}').length"))


def texts(page: Page, selector: str) -> list[str]:
    found = page.evaluate(f"JSON.stringify([...document.querySelectorAll({selector!r})].map(e => e.textContent))")
    return list(json.loads(found))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 520, 1280])  # a phone, the frame in MLflow, a screen
@pytest.mark.parametrize("name", PAGES)
def test_page_fits_fetches_nothing_and_has_no_fault(
    name: str, width: int, dark: bool, page: Page, addresses: dict[str, str]
) -> None:
    page.visit(addresses[name], width=width, dark=dark)
    assert page.requests == [addresses[name]]
    assert page.complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    assert page.evaluate("[...document.querySelectorAll('dd, .row b')].every(e => e.scrollWidth <= e.clientWidth)")
    ink, paper = (page.evaluate(f"getComputedStyle(document.body).{kind}") for kind in ("color", "backgroundColor"))
    assert (brightness(ink) > brightness(paper)) is dark
    assert contrast(ink, paper) > 7
    assert contrast(page.evaluate("getComputedStyle(document.querySelector('.quiet')).color"), paper) > 4.5
    figures = page.evaluate("document.querySelectorAll('figure[data-chart]').length")
    assert page.evaluate("document.querySelectorAll('figure[data-chart] .plot > svg').length") == figures > 0
    assert "nothing is known here" not in " ".join(texts(page, ".plot"))


def brightness(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)" as WCAG defines it."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((brightness(first), brightness(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("width", [360, 1280])
def test_every_candidate_is_a_mark_on_both_axes(width: int, page: Page, addresses: dict[str, str]) -> None:
    page.visit(addresses["report"], width=width)
    candidates = len(make_report()["candidates"])
    assert marks(page, "candidates") == candidates + 1  # and the unpruned network
    assert marks(page, "candidates", ".mark.chosen") == 1
    assert marks(page, "candidates", ".bound") == candidates - 1  # one lies beyond the edge
    assert "↑ 40" in texts(page, "[data-plot=candidates] text")
    page.evaluate("document.querySelector('[data-plot=candidates] input[value=macs]').click()")
    assert marks(page, "candidates") == candidates + 1
    assert "multiply-accumulates left" in texts(page, "[data-plot=candidates] text")
    shown = page.evaluate(
        "[...document.querySelectorAll('[data-plot=candidates] .mark')].every(mark => {"
        " const box = mark.getBoundingClientRect(), frame = mark.closest('.plot').getBoundingClientRect();"
        " return box.left >= frame.left && box.right <= frame.right"
        "   && box.top >= frame.top && box.bottom <= frame.bottom;"
        "})"
    )
    assert shown
    assert texts(page, "[data-plot=candidates] .legend span") == [
        "not within the budget", "within the budget", "unpruned", "chosen"
    ]  # fmt: skip


def test_chosen_group_is_shown_bar_by_bar(page: Page, addresses: dict[str, str]) -> None:
    page.visit(addresses["report"])
    for number, (name, channels, kept) in enumerate(GROUPS):
        page.evaluate(
            f"const chooser{number} = document.querySelector('select'); chooser{number}.value = {number};"
            f"chooser{number}.dispatchEvent(new Event('change'))"
        )
        assert marks(page, "probability", ".bar") == channels
        assert marks(page, "probability", ".is-kept") == kept
        assert f"{kept} of {channels} channels kept" in texts(page, ".said")[0]
        visible = page.evaluate(
            "JSON.stringify([...document.querySelectorAll('[data-group]')]"
            ".filter(figure => figure.offsetParent).map(figure => figure.dataset.plot))"
        )
        assert json.loads(visible) == [f"error-{number:03d}"]
        assert name in texts(page, "option:checked")[0]


def test_mark_tells_its_figures_to_the_keyboard(page: Page, addresses: dict[str, str]) -> None:
    page.visit(addresses["report"])
    page.evaluate("document.querySelector('[data-plot=candidates] .mark.chosen').focus()")
    told = texts(page, "[data-plot=candidates] .tip")[0]
    assert "chosen" in told
    assert "90.0 % removed" in told
    assert page.evaluate("document.querySelector('[data-plot=candidates] .tip').style.visibility") == "visible"


def test_sweep_and_comparison_show_every_network(page: Page, addresses: dict[str, str]) -> None:
    page.visit(addresses["sweep"])
    assert marks(page, "settings") == 4  # two results and what was tried on the way
    page.evaluate("document.querySelector('input[value=latency]').click()")
    assert marks(page, "settings") == 2
    page.visit(addresses["comparison"])
    for name in ("parameters", "macs", "latency"):
        assert marks(page, name) == 2
        assert {"#1", "#2"} <= set(texts(page, f"[data-plot={name}] text"))


def test_hostile_names_stay_text(page: Page, addresses: dict[str, str]) -> None:
    page.visit(addresses["attacked"])
    assert page.evaluate("document.images.length") == 0
    assert texts(page, "h1") == [f"{ATTACK}, pruned"]
    assert texts(page, "option:checked")[0].startswith(ATTACK)


def test_script_that_is_not_ours_does_not_run(page: Page, tmp_path: Path) -> None:
    """Even if something slipped through the escaping, the page's policy would stop it."""
    forged = PAGES["report"]().replace("<main>", "<main><script>document.title = 'owned'</script>")
    (tmp_path / "forged.html").write_text(forged, encoding="utf-8")
    page.visit((tmp_path / "forged.html").as_uri())
    assert page.evaluate("document.title") == "lenet pruned: entprune report"
    assert any("Content Security Policy" in complaint for complaint in page.complaints)
    assert marks(page, "candidates") > 0


def test_single_candidate_is_drawn(page: Page, tmp_path: Path) -> None:
    report = make_report(candidates=[make_candidate(0.1, 0.0, chosen=True)], budget={"macs_removed": 0.8})
    (tmp_path / "one.html").write_text(render_html(report, {}), encoding="utf-8")
    page.visit((tmp_path / "one.html").as_uri(), width=360)
    assert page.complaints == []
    assert marks(page, "candidates") == 2
    assert "NaN" not in page.evaluate("document.querySelector('[data-plot=candidates] svg').outerHTML")
