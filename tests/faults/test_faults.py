"""What may happen to a run on a host, by real commands: nothing is lost, and the cause is named."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.fault_runs import (
    Ended,
    alone,
    faulty_python,
    launch,
    left_after,
    run,
    run_arguments,
    started,
    status_of,
    torchrun,
)
from helpers.processes import descendants_of, has_signal_handler
from helpers.short_runs import command_here, largest_difference, read_metrics, write_data
from samft.checkpoints.training_state import load_latest, save_last
from samft.runtime.output_dir import lock_output_dir

pytestmark = pytest.mark.chaos
# Repetitions that `make soak` runs.
slow = pytest.mark.skipif(not os.environ.get("SAMFT_SLOW"), reason="slow: set SAMFT_SLOW=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a run that nothing happened to, by number of processes."""
    folders: dict[int, Path] = {}

    def of(processes: int) -> Path:
        if processes not in folders:
            folders[processes] = tmp_path_factory.mktemp(f"undisturbed-{processes}")
            argv = run_arguments(data, folders[processes])
            command = alone(argv) if processes == 1 else torchrun(argv, processes=processes)
            ended = run(command, SAMFT_TEST_IDS=str(folders[processes] / "ids"))
            assert ended.code == 0, ended.output
        return folders[processes]

    return of


def check_equal(folder: Path, expected: Path) -> None:
    """Bit-identical weights, and no line of metrics.jsonl twice or missing."""
    assert largest_difference(folder, expected) == 0.0
    lines, wanted = read_metrics(folder), read_metrics(expected)
    assert [(v["step"], v["split"]) for v in lines] == [(v["step"], v["split"]) for v in wanted]
    for line, other in zip(lines, wanted, strict=True):
        assert line["per_mask_iou"] == other["per_mask_iou"]
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert not left_after(folder)
    assert not list(folder.glob(".*.part"))


# Killed


@pytest.mark.parametrize("processes", [2, 4])
def test_a_killed_rank_restarts_all_and_changes_nothing(undisturbed, data, tmp_path, processes):
    expected = undisturbed(processes)
    step = random.Random(processes).randrange(2, 16)
    fault = {"do": "kill", "where": "step", "at": step, "rank": 1}
    argv = run_arguments(data, tmp_path)
    ended = run(torchrun(argv, processes=processes, max_restarts=3), fault)
    assert ended.code == 0, ended.output
    check_equal(tmp_path, expected)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(k, marks=slow) for k in (2, 3, 4))])
def test_all_killed_at_once_the_same_command_resumes(undisturbed, data, tmp_path, seed):
    expected = undisturbed(2)
    chance = random.Random(seed)
    where, at = chance.choice(
        [("step", chance.randrange(1, 17)), ("validation", 1 + seed), ("save", 2 + seed)]
    )
    argv = run_arguments(data, tmp_path)
    fault = {"do": "kill everything", "where": where, "at": at}
    ended = run(torchrun(argv, processes=2), fault)
    assert ended.code == -signal.SIGKILL
    assert not left_after(tmp_path)
    ended = run(torchrun(argv, processes=2))
    assert ended.code == 0, ended.output
    check_equal(tmp_path, expected)


def test_ranks_and_workers_are_gone_with_their_agent(data, tmp_path):
    argv = run_arguments(data, tmp_path, num_workers=1, steps=1000)
    fault = {"do": "kill agent", "where": "step", "at": 3}
    ended = run(torchrun(argv, processes=2), fault)
    assert ended.code == -signal.SIGKILL
    assert not left_after(tmp_path)


def save_again_and_again(folder: Path) -> None:
    torch.set_num_threads(1)
    number = 0
    while True:
        number += 1
        save_last(folder, {"number": number, "weights": torch.full((200_000,), float(number))})


def test_twenty_kills_in_the_middle_of_saving_leave_a_whole_state(tmp_path):
    chance, newest = random.Random(0), 0
    save_last(tmp_path, {"number": 0, "weights": torch.zeros(200_000)})
    for _ in range(20):
        child = multiprocessing.get_context("fork").Process(
            target=save_again_and_again, args=(tmp_path,)
        )
        child.start()
        time.sleep(chance.uniform(0.02, 0.2))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        latest = load_latest(tmp_path)
        assert latest is not None and not latest.passed_over
        assert (latest.state["weights"] == latest.state["number"]).all()
        newest = max(newest, latest.state["number"])
        with lock_output_dir(tmp_path):
            assert not [*tmp_path.glob(".*.part"), *tmp_path.glob("*/.*.part")]
    assert newest > 1


# Stopped


STOPS = {
    "mid-epoch": {"do": "term the agent", "where": "step", "at": 7},
    "in validation": {"do": "term the agent soon", "where": "validation", "at": 4},
    "in a save": {"do": "term the agent soon", "where": "save", "at": 3},
    "before the first step": {"do": "term the agent soon", "where": "validation", "at": 1},
    "in a wait for data": {"do": "term the agent soon", "where": "dataset", "at": 13},
    "one rank only": {"do": "term", "where": "step", "at": 7, "rank": 1},
    "every process": {"do": "term everything", "where": "step", "at": 7},
    "by USR1": {"do": "usr1 the agent", "where": "step", "at": 7},
}


@pytest.mark.parametrize("moment", STOPS)
def test_a_stop_under_torchrun_saves_and_resumes_exactly(undisturbed, data, tmp_path, moment):
    expected = undisturbed(2)
    folder, codes = tmp_path / "run", tmp_path / "codes"
    codes.mkdir()
    argv = run_arguments(data, folder, num_workers=int(moment == "every process"))
    ended = run(torchrun(argv, processes=2), STOPS[moment], SAMFT_TEST_CODES=str(codes))
    assert ended.code != 0
    assert ended.output.count("stopped: ") == 1, ended.output
    assert "[rank 1]" not in ended.output
    assert {int(file.read_text()) for file in codes.iterdir()} == {75}, ended.output
    status = status_of(folder)
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    latest = load_latest(folder)
    assert latest is not None and latest.state["progress"]["step"] == status["step"]
    assert not left_after(folder)
    ended = run(torchrun(argv, processes=2))
    assert ended.code == 0, ended.output
    check_equal(folder, expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_of_launch_sh_is_75_and_resumes_exactly(undisturbed, data, tmp_path, number):
    expected = undisturbed(2)
    folder, python = tmp_path / "run", faulty_python(tmp_path / "python")
    argv = run_arguments(data, folder)
    hang = {"do": "hang", "where": "dataset", "at": 13}
    settings = {"NPROC_PER_NODE": "2", "TMPDIR": str(tmp_path)}
    with started(launch(argv, python), hang, **settings) as process:
        wait_for_line(folder, "step 4/16")
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert not left_after(folder)
    ended = run(launch(argv, python), **settings)
    assert ended.code == 0, ended.output
    check_equal(folder, expected)


def test_a_stop_between_a_failure_and_the_next_start_is_75(undisturbed, data, tmp_path):
    folder, python = tmp_path / "run", faulty_python(tmp_path / "python")
    argv = run_arguments(data, folder)
    fault = {"do": "raise", "where": "forward", "at": 9, "rank": 1}
    settings = {"NPROC_PER_NODE": "2", "TMPDIR": str(tmp_path)}
    # With a group that cannot be left, a process takes some seconds to end after its last words.
    with started(launch(argv, python), fault, SAMFT_TEST_NCCL="abort", **settings) as process:
        output = ""
        assert process.stdout is not None
        for line in process.stdout:
            output += line
            if line.startswith("error: process 1 failed"):
                break
        process.send_signal(signal.SIGTERM)
        output += process.communicate(timeout=90)[0]
    assert process.returncode == 75, output
    assert "stopped after a failure" in output
    assert not left_after(folder)
    ended = run(launch(run_arguments(data, folder), python), **settings)
    assert ended.code == 0, ended.output
    check_equal(folder, undisturbed(2))


def wait_for_line(folder: Path, text: str, *, seconds: float = 90) -> None:
    """Returns when train.log has a line with this text."""
    deadline, log = time.monotonic() + seconds, folder / "train.log"
    while not (log.is_file() and text in log.read_text()):
        assert time.monotonic() < deadline, f"no {text!r} in {log}"
        time.sleep(0.05)


def test_a_stop_while_torch_is_imported_is_75(undisturbed, data, tmp_path):
    argv = run_arguments(data, tmp_path)
    with started([sys.executable, "-m", "samft.train", *argv]) as process:
        while not has_signal_handler(process.pid, signal.SIGTERM):
            assert process.poll() is None
            time.sleep(0.01)
        assert not (tmp_path / "train.log").exists()
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 75, output
    assert run(alone(argv)).code == 0
    check_equal(tmp_path, undisturbed(1))


def test_a_stop_in_validation_without_torchrun_is_75(undisturbed, data, tmp_path):
    argv = run_arguments(data, tmp_path)
    fault = {"do": "term", "where": "validation", "at": 12}
    assert run(alone(argv), fault).code == 75
    assert status_of(tmp_path)["state"] == "preempted"
    assert run(alone(argv)).code == 0
    check_equal(tmp_path, undisturbed(1))


# Damaged


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "empty": lambda path: path.write_bytes(b""),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "garbage": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "a bit flipped": flip_a_bit,
    "no sidecar": lambda path: path.with_suffix(".json").unlink(),
}


@pytest.fixture(scope="module")
def stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    assert command_here([*run_arguments(data, folder), "--stop_after", "7"]) == 75
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named_and_the_one_before_it_used(
    undisturbed, stopped, data, tmp_path, damage, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    DAMAGES[damage](folder / "last.ckpt")
    assert command_here(run_arguments(data, folder)) == 0
    stderr = capsys.readouterr().err
    assert f"resume: {folder / 'last.ckpt'}" in stderr
    assert "resuming from step 4" in stderr  # the state before that of step 7
    check_equal(folder, undisturbed(1))


def test_if_all_states_are_damaged_it_never_starts_anew(stopped, data, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    states = [folder / "last.ckpt", folder / "previous" / "last.ckpt"]
    for path in states:
        flip_a_bit(path)
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    assert command_here(run_arguments(data, folder)) == 2
    stderr = capsys.readouterr().err
    assert all(str(path) in stderr for path in states)
    del before[folder / "status.json"]
    assert all(path.read_bytes() == content for path, content in before.items())


# Other processes


def ids_by_step(files: list[Path]) -> dict[int, list[int]]:
    ids_of: dict[int, list[int]] = {}
    for file in files:
        for line in map(json.loads, file.read_text().splitlines()):
            ids_of.setdefault(line["step"], []).extend(line["ids"])
    return {step: sorted(ids) for step, ids in ids_of.items()}


def test_two_then_four_then_one_process_see_the_same_images(data, tmp_path):
    straight, changing = tmp_path / "straight", tmp_path / "changing"
    for folder in (straight, changing):
        folder.mkdir()
    argv = run_arguments(data, straight, batch_size=2)
    expected = run(torchrun(argv, processes=2), SAMFT_TEST_IDS=str(straight / "ids"))
    assert expected.code == 0, expected.output
    argv = run_arguments(data, changing, batch_size=2)
    parts = [
        torchrun([*argv, "--stop_after", "5"], processes=2),
        torchrun([*argv, "--stop_after", "11"], processes=4),
        alone(argv),
    ]
    outputs = []
    for number, command in enumerate(parts):
        ended = run(command, SAMFT_TEST_IDS=str(changing / f"ids{number}"))
        outputs.append(ended.output)
    assert "4 images per step on 4 process(es): batch_size 1 and accumulate_steps 1" in outputs[1]
    assert "4 images per step on 1 process(es): batch_size 2 and accumulate_steps 2" in outputs[2]
    seen = ids_by_step(sorted(changing.glob("ids*")))
    assert seen == ids_by_step(sorted(straight.glob("ids*")))
    assert sorted(seen) == list(range(16))
    for line, other in zip(read_metrics(changing), read_metrics(straight), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_stopped_twice_in_an_epoch_no_image_is_repeated_or_left_out(undisturbed, data, tmp_path):
    argv = run_arguments(data, tmp_path)
    for number, stop in enumerate(["2", "5", "16"]):
        run(alone([*argv, "--stop_after", stop]), SAMFT_TEST_IDS=str(tmp_path / f"ids{number}"))
    seen = ids_by_step(sorted(tmp_path.glob("ids*")))
    assert seen == ids_by_step(sorted(undisturbed(1).glob("ids*")))
    assert len({seen[step][0] for step in range(13)}) == 13  # an epoch of 13 images


# Numbers


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_one_ranks_nan_skips_the_step_on_all(data, tmp_path, amp):
    options = {"amp": amp, "accumulate_steps": 2, "clip_grad_norm": 0.5, "steps": 8}
    argv = run_arguments(data, tmp_path, **options)
    fault = {"do": "nan", "where": "update", "at": 3, "rank": 1}
    ended = run(torchrun(argv, processes=2), fault)
    assert ended.code == 0, ended.output
    lines = (tmp_path / "bad_steps.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [len(ids) for ids in records[0]["image_ids"]] == [2, 2]
    # A scaler's first steps may overflow of themselves.
    assert any(record["position"] == 3 for record in records)
    assert read_metrics(tmp_path)[-1]["step"] == 8
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["skipped_steps"] == len(records)


def test_nan_after_nan_ends_the_run_with_its_images_and_a_good_state(data, tmp_path):
    folder, codes = tmp_path / "run", tmp_path / "codes"
    codes.mkdir()
    argv = run_arguments(data, folder, max_bad_steps=2)
    fault = {"do": "nan", "where": "update", "at": 7, "times": 9, "rank": 1}
    ended = run(torchrun(argv, processes=2), fault, SAMFT_TEST_CODES=str(codes))
    assert {int(file.read_text()) for file in codes.iterdir()} == {1}
    assert "not finite 3 times in a row after step 6" in ended.output
    assert len((folder / "bad_steps.jsonl").read_text().splitlines()) == 3
    status = status_of(folder)
    assert status["exit_code"] == 1 and status["last_checkpoint"] == str(folder / "last.ckpt")
    latest = load_latest(folder)
    assert latest is not None and latest.state["progress"]["step"] == 4
    assert all(bool(torch.isfinite(value).all()) for value in latest.state["model"].values())


# Resources


def test_a_file_limit_loses_nothing_and_the_same_command_resumes(undisturbed, data, tmp_path):
    argv = run_arguments(data, tmp_path)
    ended = run(alone(argv), {"do": "limit files", "where": "step", "at": 6})
    assert ended.code == 1
    assert "last.ckpt could not be written" in ended.output
    assert "step 16/16" in ended.output  # it went on to its end
    latest = load_latest(tmp_path)
    assert latest is not None and latest.state["progress"]["step"] == 4 and not latest.passed_over
    assert run(alone(argv)).code == 0
    check_equal(tmp_path, undisturbed(1))


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system of its own; skips the test where nobody may mount one."""
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    mounting = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk_is_refused_before_the_start(data, tmp_path):
    with mounted(tmp_path / "small", "size=2m"):
        ended = run(alone(run_arguments(data, tmp_path / "small")))
    assert ended.code == 2 and "make room" in ended.output
    assert "Traceback" not in ended.output


def test_a_read_only_folder_is_refused(data, tmp_path):
    with mounted(tmp_path / "fixed", "ro,size=64m"):
        ended = run(alone(run_arguments(data, tmp_path / "fixed")))
    assert ended.code == 2 and "cannot be written (Read-only file system)" in ended.output
    assert "Traceback" not in ended.output


def test_a_file_in_the_place_of_the_folder_is_refused(data, tmp_path):
    (tmp_path / "run").write_text("not a folder")
    ended = run(alone(run_arguments(data, tmp_path / "run")))
    assert ended.code == 2 and "cannot be written" in ended.output
    assert (tmp_path / "run").read_text() == "not a folder"


def test_a_second_run_into_the_same_folder_is_refused(data, tmp_path):
    argv = run_arguments(data, tmp_path, steps=100_000)
    with started(alone(argv)):
        wait_for_line(tmp_path, "step 0:")
        ended = run(alone(argv))
        assert status_of(tmp_path)["state"] == "running"  # that of the first
    assert ended.code == 2 and "another run is writing into" in ended.output


def test_the_limit_of_open_files_is_raised(data, tmp_path, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, hard), hard))
        assert command_here(run_arguments(data, tmp_path, steps=1)) == 0
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Failures and hangs


def check_down_and_named(ended: Ended, folder: Path, *texts: str) -> None:
    assert ended.code == 1, ended.output
    assert not left_after(folder)
    for text in texts:
        assert text in ended.last_lines, ended.output


@pytest.mark.parametrize(
    ("where", "at", "rank"),
    [("dataset", 8, 1), ("forward", 5, 1), ("validation", 4, 0), ("validation", 4, 1)],
)
def test_a_rank_that_fails_ends_all_and_is_named(data, tmp_path, where, at, rank):
    folder, python = tmp_path / "run", faulty_python(tmp_path / "python")
    fault = {"do": "raise", "where": where, "at": at, "rank": rank}
    settings = {"NPROC_PER_NODE": "2", "TMPDIR": str(tmp_path), "MAX_RESTARTS": "0"}
    argv = run_arguments(data, folder)
    with started(launch(argv, python), fault, **settings) as process:
        output = ""
        assert process.stdout is not None
        for line in process.stdout:  # from the moment of the failure
            output += line
            if "a planted bug" in line:
                break
        failed = time.monotonic()
        output += process.communicate(timeout=60)[0]
    ended = Ended(process.returncode, output, time.monotonic() - failed)
    assert ended.seconds < 15
    check_down_and_named(ended, folder, "a planted bug")
    if rank == 1:
        check_down_and_named(ended, folder, "process 1 failed at step")


def test_a_rank_that_hangs_is_named_with_its_step_and_image(data, tmp_path):
    folder, python = tmp_path / "run", faulty_python(tmp_path / "python")
    fault = {"do": "hang", "where": "forward", "at": 9, "rank": 1}
    # What hangs is killed by torchrun after ten seconds.
    settings = {"NPROC_PER_NODE": "2", "TMPDIR": str(tmp_path), "MAX_RESTARTS": "0"}
    settings["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "10"
    argv = run_arguments(data, folder, hang_timeout=5)
    ended = run(launch(argv, python), fault, **settings)
    texts = ("process 1 does not answer", "at step", "training on images")
    check_down_and_named(ended, folder, *texts)


def test_a_killed_loader_worker_is_named_with_its_images(data, tmp_path):
    argv = run_arguments(data, tmp_path, num_workers=1, steps=1000)
    ended = run(alone(argv), {"do": "kill a worker", "where": "step", "at": 3})
    assert ended.code == 1
    assert "DataLoader worker" in ended.last_lines and "its workers were at" in ended.last_lines
    assert not left_after(tmp_path)


def test_a_wrong_configuration_fails_once(data, tmp_path):
    folder, python = tmp_path / "run", faulty_python(tmp_path / "python")
    argv = run_arguments(data / "nothing", folder)
    settings = {"NPROC_PER_NODE": "2", "TMPDIR": str(tmp_path), "MAX_RESTARTS": "3"}
    ended = run(launch(argv, python), **settings)
    assert ended.code == 2
    assert ended.output.count("error: ") == 1, ended.output


def test_a_lost_rank_under_launch_sh_is_restarted(undisturbed, data, tmp_path):
    folder, python = tmp_path / "run", faulty_python(tmp_path / "python")
    settings = {"NPROC_PER_NODE": "2", "TMPDIR": str(tmp_path)}
    fault = {"do": "kill", "where": "step", "at": 10, "rank": 1}
    with started(launch(run_arguments(data, folder), python), fault, **settings) as process:
        output, _ = process.communicate(timeout=180)
        assert not descendants_of(process.pid)
    assert process.returncode == 0, output
    check_equal(folder, undisturbed(2))
