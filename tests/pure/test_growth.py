"""Growth: fits that recover what made the data, the scaling law against brute force, sizes as people know them."""

import csv
import json
import math
import random
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import brim
from brim import cli
from brim.errors import UsageError
from brim.growth import feasibility, fit_growth, releases, trends
from brim.growth.fit import CONFIDENCE, student_t
from brim.growth.history import utilizations
from brim.growth.law import PUBLISHED, REPLICATION
from brim.hardware.catalogue import accelerator
from brim.units import parse_count

Captured = pytest.CaptureFixture[str]


def test_a_fit_recovers_exact_growth() -> None:
    """Values that double every seven months are fitted as that, with no width and nothing unexplained."""
    points = [(2018 + year / 3, 5e8 * 2 ** (12 * year / 3 / 7)) for year in range(20)]
    fit = fit_growth(points)
    assert fit is not None and fit.doubling_months == pytest.approx(7)
    assert (fit.factor_low, fit.factor_high) == pytest.approx((fit.factor, fit.factor))
    assert fit.r_squared == pytest.approx(1)
    assert [fit.at(date) for date, _ in points] == pytest.approx([value for _, value in points])


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Over many samples of noisy growth, the true factor lies in nine tenths of the intervals."""
    random.seed(7)
    held, trials = 0, 600
    for _ in range(trials):
        dates = [2018 + 8 * random.random() for _ in range(12)]
        fit = fit_growth((date, math.exp(0.7 * date - 1400 + random.gauss(0, 1))) for date in dates)
        assert fit is not None
        held += fit.factor_low <= math.exp(0.7) <= fit.factor_high
    assert held / trials == pytest.approx(CONFIDENCE, abs=0.04)


@pytest.mark.parametrize(("degrees", "table"), [(3, 2.3534), (8, 1.8595), (10, 1.8125), (30, 1.6973), (120, 1.6577)])
def test_student_t_is_that_of_the_tables(degrees: int, table: float) -> None:
    """Two-sided 90 % quantiles, as printed in any statistics book."""
    assert student_t(0.9, degrees) == pytest.approx(table, rel=0.005)


def test_few_points_are_not_fitted() -> None:
    """A line through four models, or through models of one date, says nothing."""
    assert fit_growth([(2020 + year, 2.0**year) for year in range(4)]) is None
    assert fit_growth([(2020.0, 2.0**power) for power in range(9)]) is None
    assert fit_growth([]) is None


@pytest.mark.parametrize("flops", [1e19, 5.76e23, 3.8e25])
@pytest.mark.parametrize("law", [REPLICATION, PUBLISHED], ids=["replication", "published"])
def test_optimum_is_where_brute_force_finds_it(law, flops: float) -> None:  # type: ignore[no-untyped-def]
    """No other split of the same compute gives a lower loss, and both directions name the same split."""
    grid = [10 ** (power / 500) for power in range(3500, 6500)]
    best = min(grid, key=lambda parameters: law.loss(parameters, flops / 6 / parameters))
    chosen = law.optimal_parameters(flops)
    assert chosen == pytest.approx(best, rel=0.01)
    assert law.optimal_tokens(chosen) == pytest.approx(flops / 6 / chosen)


def test_replication_agrees_with_chinchilla_and_the_rounded_coefficients_do_not() -> None:
    """At Chinchilla's compute: about 70B parameters and 20 tokens each; rounded, a third of it."""
    parameters = REPLICATION.optimal_parameters(5.76e23)
    assert parameters == pytest.approx(70e9, rel=0.05)
    assert 15 < REPLICATION.optimal_tokens(parameters) / parameters < 25
    assert PUBLISHED.optimal_parameters(5.76e23) < 35e9


def test_history_obeys_the_count_of_operations() -> None:
    """Compute over active parameters and tokens is near 6 (3 with an encoder, 8 recomputed); exceptions are known."""
    ratios = {
        model.model: model.flops / (model.active_parameters * model.tokens)
        for model in releases()
        if model.flops and model.active_parameters and model.tokens
    }
    assert len(ratios) > 50
    assert [model for model, ratio in ratios.items() if not 2.5 < ratio < 9] == ["Hunyuan-Large"]
    assert all(model.source and 2017 < model.date < 2027 for model in releases())


def test_no_run_used_more_than_its_devices_had() -> None:
    """Work done is less than devices x hours x peak; GPT-3's fifth and LLaMA-65B's half are as they were reported."""
    shares = dict(utilizations())
    assert len(shares) > 25 and all(0.01 < share < 0.65 for share in shares.values())
    assert shares["GPT-3 175B"] == pytest.approx(0.20, abs=0.01)
    assert shares["LLaMA 65B"] == pytest.approx(0.48, abs=0.01)


def test_ever_larger_is_a_story_of_before_2022() -> None:
    """All years grow and those before 2022 fast; since, sizes do not grow surely and tokens do."""
    found = {trend.quantity: trend for trend in trends()}
    sizes = found["num_parameters"]
    assert sizes.overall is not None and sizes.before is not None and sizes.since is not None
    assert sizes.overall.is_growth and sizes.before.factor_low > 2 * sizes.overall.factor_high
    assert not sizes.since.is_growth
    assert found["active_parameters"].verdict == "shrinking"
    assert found["tokens"].verdict == "growing"


def _rows() -> list[dict[str, str]]:
    path = Path(brim.__file__).parent / "growth" / "data" / "model_history.csv"
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def _quantile(probability: float, degrees: int) -> float:
    """Student's t, by adding up its density."""
    ends = np.linspace(0, 60, 2_000_001)
    density = (1 + ends**2 / degrees) ** (-(degrees + 1) / 2)
    share = np.cumsum(density) / density.sum()
    return float(ends[np.searchsorted(share, 2 * probability - 1)])


@pytest.mark.parametrize(
    ("quantity", "column"), [("num_parameters", "params"), ("tokens", "train_tokens"), ("flops", "train_flops")]
)
def test_doubling_times_are_those_of_another_fit_of_the_file(quantity: str, column: str) -> None:
    """numpy's fit of the rows as they stand, its covariance and an integrated t: factors, intervals, months; all years,
    to 2022 and since."""
    trend = next(trend for trend in trends() if trend.quantity == quantity)
    points = [
        (int(row["year"]) + int(row["month"]) / 12, math.log(float(row[column]))) for row in _rows() if row[column]
    ]
    spans = {trend.overall: (0, 3000), trend.before: (0, 2022), trend.since: (2022, 3000)}
    for fit, (first, last) in spans.items():
        dates, logs = zip(*(point for point in points if first <= point[0] - 1 / 24 < last), strict=True)
        (slope, _), covariance = np.polyfit(np.array(dates) - 2020, logs, 1, cov=True)
        margin = _quantile(0.95, len(dates) - 2) * math.sqrt(covariance[0, 0])
        assert fit is not None and fit.num_points == len(dates)
        expected = [math.exp(slope), math.exp(slope - margin), math.exp(slope + margin)]
        assert [fit.factor, fit.factor_low, fit.factor_high] == pytest.approx(expected, rel=2e-3)
        assert fit.doubling_months == pytest.approx(12 * math.log(2) / slope, rel=1e-6)


@pytest.mark.parametrize(("billions", "cards"), [(1, 1), (50, 50), (100, 100)])
def test_sizes_are_those_that_people_know(billions: int, cards: int) -> None:
    """1B: 4 GB in FP32 and 24 GB to train; 50B and 100B train in 50 and 100 times a 24 GB card."""
    answer = feasibility(billions * 10**9, accelerator("h100"))
    assert answer.weight_bytes["fp32"] == 4 * billions * 10**9
    assert answer.weight_bytes["bf16"] == 2 * billions * 10**9
    assert answer.rule_bytes == 24 * billions * 10**9
    assert answer.small_cards == cards
    assert (answer.gpus_needed - 1) * answer.gpu_memory_bytes < answer.rule_bytes
    assert answer.gpus_needed * answer.gpu_memory_bytes >= answer.rule_bytes


def test_hours_follow_work_and_devices() -> None:
    """Twice the tokens take twice as long, twice the devices half; price and energy do not depend on the devices."""
    gpu = accelerator("h100")
    one = feasibility(10**11, gpu, tokens=10**12, num_gpus=256)
    longer = feasibility(10**11, gpu, tokens=2 * 10**12, num_gpus=256)
    wider = feasibility(10**11, gpu, tokens=10**12, num_gpus=512)
    assert longer.hours.middle == pytest.approx(2 * one.hours.middle)
    assert wider.hours.middle == pytest.approx(one.hours.middle / 2)
    assert one.price_usd is not None and wider.price_usd is not None
    assert wider.price_usd.high == pytest.approx(one.price_usd.high)
    assert wider.energy_kwh == one.energy_kwh
    assert one.hours.low < one.hours.middle < one.hours.high
    work = 6 * 10**11 * 10**12
    assert work / (256 * 3600 * one.hours.middle * gpu.peak_flops["bf16"]) == pytest.approx(one.utilization.middle)


def test_experts_are_held_but_not_computed() -> None:
    """A model that meets a tenth of its parameters takes all its memory and a tenth of the hours."""
    gpu = accelerator("h100")
    dense = feasibility(10**11, gpu, tokens=10**12)
    sparse = feasibility(10**11, gpu, tokens=10**12, active_parameters=10**10)
    assert sparse.rule_bytes == dense.rule_bytes
    assert sparse.hours.middle == pytest.approx(dense.hours.middle / 10)
    with pytest.raises(UsageError, match="exceed"):
        feasibility(10**9, gpu, active_parameters=10**10)


def test_from_scratch_is_years_where_adapters_are_hours(capsys: Captured) -> None:
    """The sentence is computed: Llama-2-7B on one RTX 4090 takes decades, adapters on it hours."""
    assert cli.main(["growth", "--params", "7B", "--tokens", "2T", "--gpu", "rtx-4090", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    years = found["feasibility"]["one_gpu_hours"]["middle"] / (24 * 365.25)
    assert 30 < years < 100
    assert 1 < found["feasibility"]["lora_hours_one_gpu"]["middle"] < 6
    assert f"scratch: {years:.0f} (" in found["sentence"] and "years" in found["sentence"]
    # 6 x 7e9 x 2e12 operations at 35 % of 165 TFLOP/s: the 46 years that people tell are within the range
    told = 6 * 7e9 * 2e12 / (0.35 * 165e12) / 3600
    hours = found["feasibility"]["one_gpu_hours"]
    assert told / 24 / 365 == pytest.approx(46, abs=0.5) and hours["low"] < told < hours["high"]
    adapters = found["feasibility"]["lora_hours_one_gpu"]
    assert adapters["low"] < 3 < adapters["high"]


def test_history_is_drawn(tmp_path: Path, capsys: Captured) -> None:
    """The picture has the four quantities and is the same for the same data."""
    files = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for file in files:
        assert cli.main(["growth", "--plot", str(file)]) == 0
    assert "no longer holds" in capsys.readouterr().out
    assert ElementTree.parse(files[0]).getroot().tag.endswith("svg")
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--params", "1B", "--gpu", "h1000"], "did you mean h100"),
        (["--params", "many"], "--params 'many' is not a count"),
        (["--params", "0"], "is not a count"),
        (["--params", "1B", "--tokens", "2Q"], "--tokens '2Q'"),
        (["--params", "1B", "--gpu", "k80"], "no 16-bit peak"),
        (["--tokens", "2T"], "give --params"),
        (["--plot", "history.pdf"], ".svg or .png"),
    ],
)
def test_bad_input_is_answered(arguments: list[str], message: str, capsys: Captured) -> None:
    """One line that says what is wrong and what to write, and exit code 2."""
    assert cli.main(["growth", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("text", "count"),
    [("100B", 10**11), ("2T", 2 * 10**12), ("1.5e9", 15 * 10**8), ("7_000_000", 7 * 10**6), ("135m", 135 * 10**6)],
)
def test_counts_are_read_as_people_write_them(text: str, count: int) -> None:
    assert parse_count(text, what="--params") == count
