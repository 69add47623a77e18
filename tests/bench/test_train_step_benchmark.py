"""The benchmarks of the training step and of scale run, compare equal work, and add up."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import baseline, measure
from benchmarks.measure import REST, PhaseClock, model_flops, run_in_fresh_process
from benchmarks.scale import LOSS_TOLERANCE, sync_seconds
from benchmarks.scale_model import (
    Cluster,
    Costs,
    TrainingPlan,
    all_reduce_seconds,
    forecast_training,
)
from benchmarks.scale_runs import RankReport, TrainingJob, run_job
from benchmarks.tables import format_speedups
from benchmarks.train_step import BENCHMARKS, main
from benchmarks.variants import (
    SAMFT,
    Variants,
    Workload,
    assert_equal,
    gradient_difference,
)
from helpers.coco_files import write_coco
from helpers.gloo_pool import GlooPool
from helpers.pretend_cuda.runs import needs_harness, run_with_pretended_gpus

pytestmark = pytest.mark.run

CPU = torch.device("cpu")
SMALL = Workload("vit_tiny", 64, num_images=2, boxes=3, frozen=True, device=CPU)
COSTS = Costs(0.01, 0.2, 0.02, 500.0, 500.0)
CLUSTER = Cluster(250.0, 7.0, 8, 4, 50.0, 200.0, 2.0)
PLAN = TrainingPlan("vit_tiny", 64, "full", 2, 8, 50, 0.05)


def test_a_quick_run_takes_every_benchmark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    # Memory needs a process for each variant; the next test starts one.
    main(["--quick", "--memory_gib", "0", "--num_workers", "0", "--json", str(figures)])
    results = json.loads(figures.read_text())["results"]
    assert {result["benchmark"] for result in results} == {"peak", *BENCHMARKS}
    assert [r["mode"] for r in results if r["benchmark"] == "step"] == ["frozen", "full"]
    frozen = next(result for result in results if result["benchmark"] == "step")
    assert {"baseline", "samft", "samft cached", "baseline, again"} <= frozen["seconds"].keys()
    printed = capsys.readouterr().out
    assert "Equal (images): weights exactly" in printed
    assert "Equal (cached): weights exactly" in printed


@needs_harness
def test_equality_holds_on_a_gpu_that_rounds_to_tf32(tmp_path: Path) -> None:
    argv = ["--quick", "--image_size", "128", "--device", "cuda", "--memory_gib", "0"]
    argv += ["--benchmarks", "step", "encoder", "decoder", "--warm_up", "0"]
    run = run_with_pretended_gpus("benchmarks.train_step", argv, folder=tmp_path)
    assert run.code == 0, run.output[-3000:]
    assert run.output.count("Equal (") == 4  # frozen, cached, full, decoder
    assert run.output.count("Equal: embeddings") == 1  # 128 px is the small size, too
    assert "baseline+amp" in run.output
    assert not run.reports[0].faults


def test_memory_is_of_a_fresh_process() -> None:
    flags = ["--quick", "--benchmarks", "step", "--peak_of", SAMFT]
    memory = run_in_fresh_process("benchmarks.train_step", *flags)
    assert memory is not None
    assert 0 < memory["before"] <= memory["peak"]


def test_a_failed_process_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="No module named benchmarks.nothing"):
        run_in_fresh_process("benchmarks.nothing")


@pytest.mark.parametrize("start", ["images", "cached", "embeddings"])
def test_samft_equals_the_baseline(start: str) -> None:
    loss, gradient = assert_equal(Variants(SMALL), start=start)
    assert loss < 1e-6 and gradient < 1e-4


def test_full_fine_tuning_equals_the_baseline() -> None:
    assert_equal(Variants(replace(SMALL, frozen=False)), start="images")


def test_different_weights_are_detected() -> None:
    variants = Variants(SMALL)
    with torch.no_grad():
        variants.baseline.sam.mask_decoder.iou_token.weight[0, 0] += 1e-3
    with pytest.raises(AssertionError, match="weights mask_decoder.iou_token.weight differ"):
        assert_equal(variants, start="images")


def test_a_different_loss_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "FOCAL_WEIGHT", 20.01)
    with pytest.raises(AssertionError, match="losses differ"):
        assert_equal(Variants(SMALL), start="images")


def test_a_different_batch_is_detected() -> None:
    variants = Variants(SMALL)
    variants.samples[0].boxes[0] += 1
    with pytest.raises(AssertionError, match="losses differ"):
        assert_equal(variants, start="images")


def test_a_missing_gradient_is_detected() -> None:
    variants = Variants(SMALL)
    variants.samft.model.sam.mask_decoder.mask_tokens.weight.requires_grad_(False)
    with pytest.raises(AssertionError, match=r"gradients of mask_decoder.mask_tokens.weight"):
        assert_equal(variants, start="images")


def test_gradient_differences_are_relative_to_each_gradient() -> None:
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])}
    actual = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([1.0])}
    assert gradient_difference(actual, expected) == (pytest.approx(0.1), "a")
    assert gradient_difference({"a": expected["a"]}, expected) == (pytest.approx(1.0), "b")


def test_operations_are_those_of_the_published_models() -> None:
    encoder, decoder = model_flops("vit_b", 1024)
    assert encoder == pytest.approx(0.97e12, rel=0.005)
    assert 3 * decoder == pytest.approx(10.9e9, rel=0.005)


class FakeWork:
    """Work that takes a known time on a clock of its own."""

    def __init__(self) -> None:
        self.time = 0.0

    def inner(self) -> None:
        self.time += 1

    def outer(self) -> None:
        self.time += 2
        self.inner()


def test_phases_are_counted_once_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    work = FakeWork()
    monkeypatch.setattr(measure, "now", lambda device: work.time)
    clock = PhaseClock(CPU)
    with clock.watch([(work, "outer", "a"), (work, "inner", "b")]):
        work.outer()
        work.inner()
        work.time += 4
    work.inner()
    assert clock.seconds == {"a": 3.0, "b": 1.0, REST: 4.0}


def test_ratios_are_taken_round_by_round() -> None:
    assert format_speedups([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == "2.00 (1.00 to 3.00)"


# Scale.


def test_two_processes_reach_the_losses_of_one(tmp_path: Path, gloo2: GlooPool) -> None:
    write_coco(tmp_path, 8)
    job = TrainingJob(
        str(tmp_path), str(tmp_path / "cache"), "vit_tiny", 64, global_batch=2, steps=3
    )
    single, both = run_job(job), gloo2.run(run_job, job)
    assert len(single.losses) == 3
    for report in both:
        assert report.losses == pytest.approx(single.losses, rel=LOSS_TOLERANCE)
        assert len(report.launches) == len(report.arrivals) == 3
    assert single.launches == []
    assert {"data", "encoder", "decoder + loss", "backward", "optimizer", REST} <= set(
        single.phases
    )


def test_waiting_for_the_other_rank_is_separated_from_summing() -> None:
    early = RankReport([], {}, 0.0, launches=[1.0, 11.0], arrivals=[4.0, 12.0])
    late = RankReport([], {}, 0.0, launches=[3.0, 11.0], arrivals=[4.5, 12.0])
    assert sync_seconds([early, late]) == [(1.0, 1.0), (1.25, 0.0)]
    assert sync_seconds([RankReport([], {}, 0.0, [], [])]) == [(0.0, 0.0)]


def test_a_ring_all_reduce_sends_almost_everything_twice() -> None:
    assert all_reduce_seconds(100.0, ranks=1, rate_mb_s=10.0) == (0.0, 0.0)
    assert all_reduce_seconds(100.0, ranks=4, rate_mb_s=10.0) == (150.0, 15.0)


def test_a_forecast_adds_up() -> None:
    forecast = forecast_training(PLAN, COSTS, CLUSTER, gpus=1, images=1000)
    assert forecast.steps_per_epoch == 500
    assert forecast.reduced_mb == 0
    assert forecast.parts["loader"] == pytest.approx(2 * 0.01 / 4)
    slowest = max(forecast.parts[name] for name in ("compute", "loader", "disk"))
    spread = forecast.parts["validation"] + forecast.parts["checkpoints"]
    assert forecast.step_s == pytest.approx(slowest + spread)
    assert forecast.epoch_s == pytest.approx(500 * forecast.step_s)


def test_a_step_takes_no_less_than_its_launches() -> None:
    # vit_b, 12 blocks: 1009 kernels from embeddings, 31 more for each block, 7 us each
    plan = replace(PLAN, model_type="vit_b", mode="cached")
    for mode, launches in (("cached", 1009), ("frozen", 1009 + 12 * 31), ("full", 1009 + 12 * 118)):
        small = replace(plan, mode=mode)
        assert small.launches == launches
        forecast = forecast_training(small, COSTS, CLUSTER, gpus=1, images=1000)
        assert forecast.parts["compute"] == pytest.approx(7e-6 * launches)
    # A large batch gives the GPU more to do than the host
    large = replace(plan, mode="full", image_size=1024, batch_size=64)
    forecast = forecast_training(large, COSTS, CLUSTER, gpus=1, images=1000)
    assert forecast.parts["compute"] == pytest.approx(64 * large.image_tflop / 250)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"loader_s": 10.0}, "loader"),
        ({"checkpoint_mb_s": 1e-3}, "checkpoints"),
        ({"validation_s": 1e4}, "validation"),
        ({"image_mb": 1e9}, "disk"),
    ],
)
def test_the_most_expensive_part_is_the_bottleneck(
    changes: dict[str, float], expected: str
) -> None:
    forecast = forecast_training(PLAN, replace(COSTS, **changes), CLUSTER, gpus=1, images=1000)
    assert forecast.bottleneck == expected


def test_a_slow_network_is_the_bottleneck_only_between_hosts() -> None:
    slow = replace(CLUSTER, network_gb_s=1e-4)
    assert forecast_training(PLAN, COSTS, slow, gpus=64, images=1000).bottleneck == "network"
    assert forecast_training(PLAN, COSTS, slow, gpus=8, images=1000).bottleneck != "network"
