"""`make gpu`: its parts are commands that exist, and its table says what was not measured."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_checks
from benchmarks.gpu import main, run_part, write_results
from benchmarks.gpu_parts import CHECK, PARTS, TORCHRUN, TRAIN, Part, Setup
from benchmarks.train_step import parse_arguments
from helpers.pretend_cuda.runs import needs_harness, run_with_pretended_gpus
from samft.config import parse_config

BROKEN = Part("broken", "nothing", 30, lambda setup: [["benchmarks.no_such_module"]])
ENDLESS = Part(
    "endless", "nothing", 30, lambda setup: [["timeit", "-n1", "-r1", "while True: pass"]]
)
WHOLE = Part("whole", "the time", 30, lambda setup: [["timeit", "-n1", "-r1", "print('=> seen')"]])


@pytest.mark.parametrize("pretended", [False, True])
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_every_command_is_understood(part: Part, pretended: bool, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    for argv in part.commands(Setup(tmp_path, pretended)):
        if argv[0] == TORCHRUN[0]:
            argv = argv[argv.index(CHECK) :]
        module, *arguments = argv
        if module == CHECK:
            assert arguments[0] in gpu_checks.CHECKS
            if arguments[0] != "train":
                continue
            known = {"--in_group", "--memory_share", "0.03"}
            parse_config([word for word in arguments[1:] if word not in known])
        elif module == TRAIN:
            parse_config(arguments)
        elif module == "benchmarks.train_step":
            assert parse_arguments(arguments).device == "cuda"


def test_limits_leave_room_for_every_kind_of_part() -> None:
    # Of the 12 minutes, what comes first is not cut by what comes before it
    assert sum(part.limit for part in PARTS[:8]) <= gpu.TOTAL_SECONDS
    assert len({part.name for part in PARTS}) == len(PARTS)


def test_failed_and_cut_parts_are_named(tmp_path: Path) -> None:
    setup, log = Setup(tmp_path, pretended=False), tmp_path / "gpu.log"
    results = [
        run_part(BROKEN, setup, limit=30, log=log),
        run_part(ENDLESS, setup, limit=0.5, log=log),
        run_part(WHOLE, setup, limit=30, log=log),
    ]
    assert [result.state for result in results] == ["failed", "not measured", "done"]
    assert "No module named benchmarks.no_such_module" in results[0].lines[0]
    assert results[1].lines == ["cut after 0 s: printed nothing"]
    assert results[2].lines == ["seen"]
    text = write_results(tmp_path, results, setup=setup)
    assert "| endless | nothing | **not measured**: cut after 0 s: printed nothing |" in text
    assert "timeit" in log.read_text()


def test_figures_stand_beside_their_floors(tmp_path: Path) -> None:
    result = gpu.PartResult("steps, vit_b", "time", state="done")
    figures = {"model_type": "vit_b", "mode": "full", "images": 4, "cuda_graphs": False}
    for seconds, cuda_graphs in ((0.02, False), (0.016, True)):
        line = json.dumps({**figures, "seconds": seconds, "cuda_graphs": cuda_graphs})
        result.add_findings(f"=> full: seen\njson: {line}\n| a | b |\nend\n")
    text = write_results(tmp_path, [result], setup=Setup(tmp_path, pretended=False))
    assert "| vit_b | full | 3.7 | 5.00, 4.00 with CUDA graphs |" in text  # 20 and 16 ms
    assert "| vit_h | full | 22.0 | not measured |" in text
    assert "| a | b |" in text
    # On pretended GPUs, times are nobody's figures
    text = write_results(tmp_path, [result], setup=Setup(tmp_path, pretended=True))
    assert "| vit_b | full | 3.7 | not measured |" in text and "| a | b |" not in text
    assert json.loads((tmp_path / "gpu.json").read_text())["pretended"] is True


def test_differing_states_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    for name, value in (("one", 1.0), ("other", 2.0)):
        moments = {0: {"step": torch.tensor(value)}}
        state = {"model": {"w": torch.ones(2)}, "optimizer": {"state": moments}}
        torch.save(state, tmp_path / name)
    paths = [str(tmp_path / name) for name in ("one", "other")]
    gpu_checks.check_states([paths[0], paths[0]])
    assert "0 of 2 tensors differ; all finite: True" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="0 step"):
        gpu_checks.check_states(paths)


def test_differing_rows_are_an_error(tmp_path: Path) -> None:
    for name, iou in (("one", 0.5), ("other", 0.502)):
        (tmp_path / name).write_text(f"object_id,iou_actual\n7,{iou}\n")
    one, other = (str(tmp_path / name) for name in ("one", "other"))
    gpu_checks.check_rows([one, one])
    with pytest.raises(AssertionError, match="more than 1e-3"):
        gpu_checks.check_rows([one, other])


@pytest.mark.processes
@needs_harness
def test_it_runs_without_a_gpu(tmp_path: Path) -> None:
    assert main(["--output_dir", str(tmp_path), "--parts", "GPU = CPU", "out of memory"]) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert [result["state"] for result in results] == ["done", "done", "not measured"]
    assert results[1]["lines"][0].startswith("off: masks differ by 0.0e+00")


@pytest.mark.processes
@needs_harness
def test_cached_step_with_cuda_graphs_launches_little(tmp_path: Path) -> None:
    # 1,138 kernels before CUDA graphs: the host took longer than the GPU
    argv = ["steps", "--model_type", "vit_b", "--image_size", "128", "--images", "1"]
    argv += ["--rounds", "1", "--modes", "cached", "--cuda_graphs"]
    run = run_with_pretended_gpus("benchmarks.gpu_checks", argv, folder=tmp_path)
    assert run.code == 0, run.output[-3000:]
    step = run.reports[0].steps[-1]
    assert step.num_launches <= 1110 / 3 and sum(step.captured.values()) > 500
    assert step.functions_that_wait() == ["samft/training/engine.py _update: item"]
    assert f"=> cached: {step.num_launches} launches" in run.output
