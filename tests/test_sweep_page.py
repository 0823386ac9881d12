"""The page and the table of a sweep: they stand alone, escape what users wrote, and show every setting."""

from __future__ import annotations

import copy
import io
import json
import re
from typing import Any

import pytest
from rich.console import Console

from entprune.report.sweep_page import describe_search, fronts_of, render_sweep
from flows.tables import sweep_table
from tests.reports import make_sweep


@pytest.fixture
def content() -> dict[str, Any]:
    return make_sweep()


def test_page_asks_for_nothing_from_elsewhere(content: dict[str, Any]) -> None:
    page = render_sweep(content)
    assert set(re.findall(r"https?://[^'\";\s]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"<(link|img|iframe)|\bsrc=|@import|url\([^#]|fetch\(", page)
    assert "prefers-color-scheme: dark" in page


def test_points_can_be_read_back_and_end_no_script(content: dict[str, Any]) -> None:
    page = render_sweep(content)
    assert page.count("</script>") == 2
    (text,) = re.findall(r"id='settings-data'>(.*?)</script>", page, re.DOTALL)
    points = json.loads(text)["points"]
    assert [point["kind"] for point in points] == ["tried", "chosen", "tried", "stopped"]
    assert [point["x"]["latency"] for point in points] == [None, 9.5, None, 9.5]
    assert points[1]["lines"][0] == "#0 ridge 0 </script>"


def test_every_setting_is_a_row_and_the_chosen_one_stands_out(content: dict[str, Any]) -> None:
    page = render_sweep(content)
    assert page.count("<td class='text'>ridge ") == 2
    assert page.count("<tr class=chosen>") == 1
    assert "stopped after 1 round by #0" in page


def test_words_about_fronts_and_searches(content: dict[str, Any]) -> None:
    assert fronts_of(content, 0) == ["parameters", "macs"]
    assert fronts_of(content, 1) == ["parameters"]
    assert describe_search(content["settings"][0]) == "3 rounds"
    assert describe_search(content["settings"][0] | {"budget_met": False}) == "3 rounds, budget not met"
    unmet = copy.deepcopy(content)
    unmet["chosen"]["budget_met"] = False
    assert "No setting met the budget: the one nearest to it was kept." in render_sweep(unmet)


def test_table_fits_a_narrow_terminal(content: dict[str, Any]) -> None:
    content["settings"][0]["label"] = "entropy_weight 0.5, loss_exponent 0.7"
    console = Console(file=io.StringIO(), width=80)
    console.print(sweep_table(content))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("entropy_weight 0.5", "loss_exponent 0.7", "−90.0%", "9.50", "+0.40", "+0.50", "P M", "stopped"):
        assert part in text
    assert max(len(line) for line in text.splitlines()) <= 80
