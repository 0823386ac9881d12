"""The benchmark: parts measure what they say, sizes meet the budget, and measured cells are kept."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from entprune import stages
from entprune.assembly import slice_network
from entprune.config import Budget
from entprune.plan import PruningPlan
from entprune.predictions import with_perturbed
from entprune.stages import ImageSet

pytest.importorskip("torch_pruning", reason="the benchmark's peers are development dependencies")
pytest.importorskip("sklearn", reason="the benchmark's peers are development dependencies")

from infra.benchmark import (
    ablation,
    budgets,
    contest,
    epoch,
    estimates,
    latency,
    memory,
    scaling,
    selection,
    sweep_cost,
    tuned,
)
from infra.benchmark.__main__ import choose, main
from infra.benchmark.networks import Bench, Folders
from infra.benchmark.outcomes import unpack_outcomes
from infra.benchmark.parts import Request
from infra.benchmark.records import Record, Subject, all_records
from infra.benchmark.selectors import METHODS, make_selector, select_plan
from tests.benchmark_requests import (
    RUN_WITH_VERSIONS,
    TINY_RECIPE,
    TinyRequest,
    measure_to,
    page_of,
    tiny_request,
)

# --- the parts, on a network of a few channels ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def request_chain() -> TinyRequest:
    return tiny_request()


def test_every_method_is_measured_at_the_same_size_plain_and_refit(
    request_chain: TinyRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    score = contest.score_candidate
    monkeypatch.setattr(contest, "score_candidate", lambda job, plan: calls.append(plan.digest()) or score(job, plan))
    meter = selection.SelectionMeter(request_chain)
    subject = Subject(part="selection", network="chain", seed=0, budget="parameters_removed-0.5")
    facts = meter.facts(Record(subject.path(tmp_path), subject))
    found = {
        (weights, widths, method): meter.measure(subject, {"method": method, "weights": weights, "widths": widths})
        for weights, widths in selection.VARIANTS
        for method in METHODS
    }
    assembled = len({values["plan_sha256"] for (weights, _, _), values in found.items() if weights == "refit"})
    assert len(calls) == assembled < 2 * len(METHODS)  # equal plans are assembled once
    assert all(np.mean(~unpack_outcomes(v["wrong"], 200)) * 100 == pytest.approx(v["accuracy"]) for v in found.values())
    for widths in ("uniform", "allocated"):
        sizes = {tuple(values["widths"]) for (_, kind, _), values in found.items() if kind == widths}
        assert len(sizes) == 1
    assert all(values["parameters"] <= 0.5 * facts["dense"]["parameters"] for values in found.values())
    bench = request_chain.bench()
    kept = make_selector("l1", bench)
    groups = bench.network.groups
    full = {group.name: group.num_channels for group in groups.groups}
    widths = dict(zip(full, found["plain", "uniform", "l1"]["widths"], strict=True))
    plan = select_plan(kept, full, widths)
    sliced = slice_network(bench.network.model, groups, plan).eval()
    assert found["plain", "uniform", "l1"]["accuracy"] == bench.accuracy(sliced)
    assert found["plain", "uniform", "l1"]["plan_sha256"] == plan.digest()
    assert found["plain", "uniform", "l1"]["parameters"] == sum(value.numel() for value in sliced.parameters())


def test_calibration_validation_and_test_images_are_apart(request_chain: TinyRequest) -> None:
    bench = request_chain.bench()
    assert not set(bench.calibration.indices) & set(bench.validation.indices)
    assert bench.calibration.split is bench.validation.split is bench.data.train
    assert bench.test.split is bench.data.test
    subset = budgets.Subset(bench.validation)
    assert torch.equal(subset.batch(np.array([2, 0])), bench.data.train.batch(bench.validation.indices[[2, 0]]))
    assert subset.labels[0] == bench.data.train.labels[bench.validation.indices[0]]


@pytest.fixture(scope="module")
def measured(request_chain: TinyRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of every part but the selection."""
    folder = tmp_path_factory.mktemp("results")
    meters = {
        "budgets": (budgets.BudgetMeter(request_chain), {"max_accuracy_drop": 30.0}),
        "low_rank": (budgets.BudgetMeter(request_chain), {"max_accuracy_drop": 30.0}),
        "epoch": (epoch.EpochMeter(request_chain), {"max_accuracy_drop": 30.0}),
        "latency": (latency.LatencyMeter(request_chain), {"budget": "parameters_removed-0.8"}),
        "sweep": (sweep_cost.SweepMeter(request_chain), {"settings": "12 entropy weights"}),
        "tuned": (tuned.TunedMeter(request_chain, (TINY_RECIPE,)), TINY_RECIPE.key()),
    }
    for part, (meter, key) in meters.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(latency.MULTIPLES, "rounded", 2)  # the chain is narrower than 8
            values = meter.measure(Subject(part=part, network="chain", seed=0), key)
        measure_to(folder, part, "chain", [(key, dict(values))])
    return folder


@pytest.mark.parametrize(("part", "asks"), [("budgets", False), ("low_rank", True)])
def test_low_rank_is_asked_for_in_its_part_alone(
    request_chain: TinyRequest, monkeypatch: pytest.MonkeyPatch, part: str, asks: bool
) -> None:
    def stop(bench: Bench, points: float) -> None:
        raise InterruptedError(bench.config.low_rank, points)

    monkeypatch.setattr(budgets, "prune_within", stop)
    with pytest.raises(InterruptedError) as stopped:
        budgets.BudgetMeter(request_chain).measure(
            Subject(part=part, network="chain", seed=0), {"max_accuracy_drop": 0.1}
        )
    assert stopped.value.args == (asks, 0.1)


def test_parts_measure_what_they_say(measured: Path) -> None:
    (budget,), (times,), (latencies,) = (list(all_records(part, measured)) for part in ("budgets", "epoch", "latency"))
    values = budget["cells"][0]["values"]
    assert values["candidates"]
    assert set(values["one_shot"]["latency_ms"]) == {"1", "64"}
    assert {"calibrate", "solve", "search", "certify"} <= set(values["timings_seconds"])
    values = times["cells"][0]["values"]
    assert "measure" not in values["stages_seconds"]
    assert values["prune_seconds"] == pytest.approx(sum(values["stages_seconds"].values()), abs=0.01)
    fastest = min(values["epoch_seconds"].values())
    assert values["ratio"] == pytest.approx(sum(values["stages_seconds"].values()) / fastest)
    for name, seconds in values["epoch_seconds"].items():
        both = values["epoch_seconds_before"][name], values["epoch_seconds_after"][name]
        assert seconds == pytest.approx(sum(both) / 2)
    assert values["bfloat16_is_native"] == (set(values["epoch_seconds"]) == {"bfloat16"})
    values = latencies["cells"][0]["values"]
    assert values["macs"]["pruned"] < values["macs"]["dense"]
    assert values["multiples"] == {"pruned": 1, "rounded": 2}
    assert all(width % 2 == 0 for width in values["widths"]["rounded"])
    assert set(values["latency_ms"]) == set(values["macs"]) == {"dense", "pruned", "rounded"}
    assert all(times["64"] > 0 for times in values["latency_ms"].values())
    (sweep,) = all_records("sweep", measured)
    values = sweep["cells"][0]["values"]
    assert values["continuations_per_group"] == 13
    assert min(values["one_setting_seconds"], values["sweep_seconds"]) > 0


def test_estimates_are_those_of_the_pruned_network_on_each_kind_of_image(
    request_chain: TinyRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, plans = request_chain.bench(), []
    pruned = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(bench.data.input_shape)), bench.data.num_classes))
    monkeypatch.setattr(contest.Contest, "build", lambda _, plan, *, refit: plans.append((plan, refit)) or pruned)
    meter = estimates.EstimateMeter(request_chain, [Budget(parameters_removed=0.5)])
    values = meter.measure(Subject(part="estimates", network="chain", seed=0), {"budget": "parameters_removed-0.5"})
    ((plan, refit),) = plans
    assert refit
    assert plan == budgets.prune_to(bench, Budget(parameters_removed=0.5)).plan
    assert values["test"]["labels"] == pytest.approx(bench.accuracy(bench.model) - bench.accuracy(pruned))
    plain = bench.validation
    shares = {"plain": 0.0, "perturbed": 1.0, "compared": 0.25}
    for name, share in shares.items():
        images = with_perturbed(plain, replace(bench.config, perturbed_share=share))
        answers = [predict_classes(network, images) for network in (bench.model, pruned)]
        assert values[name]["disagreement"] == pytest.approx(100.0 * np.mean(answers[0] != answers[1]))
        right = [np.mean(answer == images.split.labels[images.indices]) for answer in answers]
        assert values[name]["labels"] == pytest.approx(100.0 * (right[0] - right[1]))
        assert 0.0 < values[name]["posterior"] < values[name]["disagreement"]
    assert len({values[name]["posterior"] for name in shares}) == len(shares)


def predict_classes(network: nn.Module, images: ImageSet) -> np.ndarray:
    with torch.inference_mode():
        return network.eval()(images.split.batch(images.indices)).argmax(1).numpy()


def test_an_epoch_is_timed_without_its_warm_up(request_chain: TinyRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(model: nn.Module, split: object, indices: np.ndarray, loss: object, config: object, stamp: object) -> None:
        assert len(indices) == (epoch.WARM_UP + epoch.STEPS) * config.batch_size
        for step in range(epoch.WARM_UP + epoch.STEPS):
            clock[0] += 100.0 if step < epoch.WARM_UP else 2.0
            stamp(step + 1, 15, "training")

    clock = [0.0]
    monkeypatch.setattr(epoch, "fit", fit)
    monkeypatch.setattr(epoch.time, "perf_counter", lambda: clock[0])
    bench = request_chain.bench()
    assert epoch.epoch_seconds(bench, amp=True) == pytest.approx(2.0 * (1800 // 128))


def test_passes_alternate_and_the_median_ignores_warm_up_and_slow_spells(monkeypatch: pytest.MonkeyPatch) -> None:
    def network(name: str, seconds: float) -> nn.Module:
        class Timed(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                calls.append(name)
                clock[0] += seconds + 10.0 * (len(calls) in {1, 2, 20})
                return x

        return Timed()

    clock, calls = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    medians = latency.time_in_turns([network("dense", 2.0), network("pruned", 0.5)], torch.zeros(1))
    assert medians == pytest.approx([2000.0, 500.0])
    assert calls[:4] == ["dense", "pruned", "dense", "pruned"]
    assert len(calls) == 2 * (3 + latency.PASSES)


def shrink_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CHANNELS", 6), ("OUTPUTS", 4), ("_LATENT", 5), ("_CHUNK", 64)):
        monkeypatch.setattr(scaling, name, value)


def test_solving_time_is_measured_on_moments_of_as_many_rows_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_layer(monkeypatch)
    request = Request(network="synthetic", seed=0, threads=1, folders=Folders(data=Path(), checkpoints=Path()))
    meter = scaling.ScalingMeter(request)
    subject = Subject(part="scaling", network="synthetic", seed=0)
    few, many = (meter.measure(subject, {"quantity": "solve", "images": images}) for images in (100, 2000))
    assert (few["rows"], many["rows"]) == (500, 10_000)
    assert few["solve_seconds"] > 0
    rate = meter.measure(subject, {"quantity": "moments"})
    features = 6 * 9
    assert rate["rows"] == 4 * 64
    assert rate["moments_gflops"] / rate["moments_gflops_if_full"] == pytest.approx((features + 1) / (2 * features))
    assert rate["matmul_gflops"] > 0


def test_a_stream_goes_on_from_fewer_rows_to_the_moments_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_layer(monkeypatch)
    stream = scaling.Stream(seed=3)
    first, longer = (stream.problem(rows).consumers[0].gram for rows in (128, 256))
    again = stream.problem(128).consumers[0].gram
    rows = scaling.activations(64, torch.Generator().manual_seed(3))
    assert not np.allclose(first, longer)
    assert np.array_equal(first, again)
    assert np.allclose(scaling.Stream(seed=3).problem(256).consumers[0].gram, longer, atol=1e-5)
    channels = rows.double().reshape(64, 6, 9).numpy()
    variance = channels.var(0).mean(1)  # a channel's scale is the mean over its taps
    only = scaling.Stream(seed=3).problem(64).consumers[0].gram
    assert np.allclose(np.diag(only), (channels.var(0) / variance[:, None]).ravel(), rtol=1e-3)


@pytest.mark.parametrize("stage", ["solve", "assemble"])
def test_peak_memory_is_that_of_a_whole_pruning(
    stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assembled: list[PruningPlan] = []
    monkeypatch.setattr(memory, "NETWORK", "digits_cnn")
    monkeypatch.setattr(memory, "SHAPE", (1, 8, 8))
    monkeypatch.setattr(memory, "score_candidate", lambda job, plan: assembled.append(plan))
    monkeypatch.setattr(sys, "argv", ["memory", "96", stage, "1"])
    memory.main()
    figures = json.loads(capsys.readouterr().out)
    assert figures["network"] == "digits_cnn"
    assert figures["peak_mib"] >= figures["libraries_mib"] > 50
    assert len(assembled) == (stage == "assemble")


# --- the ablation -----------------------------------------------------------------------------------------------------


def test_every_variant_is_measured_stored_and_on_the_page(
    request_chain: TinyRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved: list[str] = []
    solve_group = stages.solve_group
    monkeypatch.setattr(
        stages, "solve_group", lambda job, setting: solved.append(setting.label()) or solve_group(job, setting)
    )
    meter, subject = ablation.AblationMeter(request_chain), Subject(part="ablation", network="chain", seed=0)
    record = Record(subject.path(tmp_path / "results"), subject)
    record.require_facts(meter.facts(record))
    budget = "parameters_removed-0.5"
    for variant in ablation.variants_for("resnet18_cifar"):
        key = {"variant": variant.name, "budget": budget}
        record.put(key, meter.measure(subject, key), RUN_WITH_VERSIONS)
    again = Record(subject.path(tmp_path / "results"), subject)
    assert again.content == record.content
    values = {cell["key"]["variant"]: cell["values"] for cell in again.content["cells"]}
    groups = len(request_chain.bench().network.groups.groups)
    assert len(solved) == (8 + 2) * groups  # eight settings, and both defaults on statistics without residuals
    assert values["default"]["changes"] == {}
    assert values["no refit at all"]["plan_sha256"] == values["default"]["plan_sha256"]
    assert values["no refit at all"]["kl"] > values["default"]["kl"] > 0
    assert values["output_temperature 0"]["kl"] != values["default"]["kl"]
    dense = again.content["facts"]["dense"]["parameters"]
    assert all(entry["parameters"] <= 0.5 * dense for entry in values.values())
    text = page_of(tmp_path / "results", tmp_path / "out")
    rows = {line.split(" | ")[1]: line for line in text.splitlines() if line.count(" | ") == 5}
    for name, entry in values.items():
        assert f"{1000 * entry['kl']:.2f}" in rows[name]
        assert f"{entry['accuracy']:.2f}" in rows[name]
    best = min(values, key=lambda name: values[name]["kl"])
    assert f"**{1000 * values[best]['kl']:.2f}**" in rows[best]


def test_the_other_parts_have_their_figures_on_the_page(measured: Path, tmp_path: Path) -> None:
    text = page_of(measured, tmp_path / "out")
    (record,) = all_records("epoch", measured)
    assert f"| {record['cells'][0]['values']['prune_seconds']:.1f} |" in text
    missing = ("selection", "estimates", "dense", "recovery", "scaling", "ablation", "actors", "engine")
    assert text.count("Not measured yet.") == len(missing)
    assert (tmp_path / "out" / "plots" / "latency.svg").exists()
    (record,) = all_records("sweep", measured)
    assert f"| {record['cells'][0]['values']['ratio']:.2f} | 13 |" in text


# --- the command ------------------------------------------------------------------------------------------------------


def test_measured_cells_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Counter:
        def facts(self, record: Record) -> dict[str, str]:
            return {"data_sha256": "d"}

        def measure(self, subject: Subject, key: dict[str, str]) -> dict[str, float]:
            if len(seen) == 3:
                raise KeyboardInterrupt
            seen.append(key["method"])
            return {"accuracy": 1.0}

    part = selection.PART
    monkeypatch.setitem(
        main.__globals__["PARTS"], "selection",
        type(part)(name=part.name, networks=part.networks, threads=1, cells=part.cells, meter=lambda _: Counter()),
    )  # fmt: skip
    arguments = ["--part", "selection", "--network", "lenet", "--budget", "parameters_removed-0.92", "--methods",
                 "l1,ours", "--results", str(tmp_path)]  # fmt: skip
    assert main(arguments) == 130
    assert seen == ["ours", "l1", "ours"]  # in the same order, whatever was typed
    seen.append("after the interruption")  # so that the counter does not stop again
    assert main(arguments) == 0
    assert len(seen) == 4 + 5  # eight cells in all, three of them stored before
    assert main(arguments) == 0
    assert len(seen) == 4 + 5
    assert main([*arguments, "--force"]) == 0
    assert len(seen) == 4 + 5 + 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "speed"], "part: expected one of selection"),
        (["--part", "selection", "--network", "alexnet"], "network: expected one of lenet"),
        (["--part", "selection", "--network", "lenet", "--budget", "x"], "budget: expected one of"),
        (["--part", "selection", "--network", "lenet", "--methods", "magic"], "methods: expected some of"),
        (["--part", "recovery", "--network", "lenet", "--budget", "x"], "budget: expected parameters_removed-0.96"),
        (["--part", "budgets", "--network", "lenet", "--checkpoints", "nowhere", "--data-root", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--results", str(tmp_path / "results")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_all_parts_are_reached() -> None:
    assert {part.name for part, _ in choose("all", "all")} == {
        "selection",
        "budgets",
        "low_rank",
        "estimates",
        "tuned",
        "recovery",
        "epoch",
        "scaling",
        "latency",
        "sweep",
        "ablation",
        "actors",
        "engine",
    }
    assert [network for _, network in choose("scaling", "all")] == ["synthetic"]
