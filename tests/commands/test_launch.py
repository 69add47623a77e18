"""launch.sh: which command it builds, what it installs when, and which exit code it ends with."""

import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import REPOSITORY

pytestmark = pytest.mark.processes

# What samft.train takes without complaint; whether the dataset exists is not launch.sh's business.
RUN = ("--model_type", "vit_tiny", "--checkpoint_path", "auto", "--data_root", "nowhere")
FOUR_GPUS = "".join(f"GPU {i}: NVIDIA (UUID: GPU-{i})\n" for i in range(4))


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(0o755)
    return path


class Launcher:
    """Runs launch.sh with programs and an environment of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.script = REPOSITORY / "launch.sh"
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": os.environ.get("HOME", "/"),
            "SAMFT_VENV": str(folder / "venv"),
        }
        write_script(self.bin / "nvidia-smi", "exit 9")

    def command(self, *args: str, **environment: str) -> list[str]:
        """The arguments for subprocess that start it."""
        variables = {**self.environment, **environment}
        settings = [f"{name}={value}" for name, value in variables.items()]
        return ["env", "-i", *settings, "bash", str(self.script), *args]

    def run(self, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs it to its end."""
        command = self.command(*args, **environment)
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    def dry_run(self, *args: str, **environment: str) -> list[str]:
        """The command it would run, as a list."""
        ended = self.run(*args, LAUNCH_DRY_RUN="1", **environment)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("\n") == 1
        return shlex.split(ended.stdout)


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path)


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_one_process_without_a_gpu(launcher: Launcher, tmp_path: Path) -> None:
    command = launcher.dry_run("--output_dir", "a folder", "--data_root=it's $HOME")
    assert command[0] == str(tmp_path / "venv/bin/python")
    assert command[1:4] == ["-m", "torch.distributed.run", "--standalone"]
    assert option(command, "--nproc_per_node") == "1"
    module = command.index("samft.train")
    assert command[module - 1] == "-m"
    assert command[module + 1 :] == ["--output_dir", "a folder", "--data_root=it's $HOME"]
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("environment", "args", "processes"),
    [
        ({}, [], "4"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, [], "2"),
        ({"CUDA_VISIBLE_DEVICES": "3"}, [], "1"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2,GPU-3"}, [], "3"),
        ({"CUDA_VISIBLE_DEVICES": "0,1,-1,2"}, [], "2"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, [], "1"),
        ({"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b"}, [], "1"),
        ({"CUDA_VISIBLE_DEVICES": ""}, [], "1"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "NPROC_PER_NODE": "3"}, [], "3"),
        ({}, ["--device", "cpu"], "1"),
        ({}, ["--device=cpu"], "1"),
    ],
)
def test_one_process_for_each_visible_gpu(
    launcher: Launcher, environment: dict[str, str], args: list[str], processes: str
) -> None:
    write_script(launcher.bin / "nvidia-smi", f'[ "$1" = -L ] && echo -n "{FOUR_GPUS}"')
    command = launcher.dry_run(*RUN, *args, **environment)
    assert option(command, "--nproc_per_node") == processes


@pytest.mark.parametrize(("device", "processes"), [("cpu", "1"), ("auto", "4")])
def test_the_device_of_a_file_counts_too(
    launcher: Launcher, tmp_path: Path, device: str, processes: str
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"device: {device}\n")
    write_script(launcher.bin / "nvidia-smi", f'echo -n "{FOUR_GPUS}"')
    arguments = (*RUN, "--config", str(config))
    python = {"SAMFT_PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
    assert option(launcher.dry_run(*arguments, **python), "--nproc_per_node") == processes
    flags = launcher.dry_run(*arguments, "--device", "cpu", **python)
    assert option(flags, "--nproc_per_node") == "1"


def test_devices_without_a_driver_do_not_count(launcher: Launcher) -> None:
    command = launcher.dry_run(*RUN, CUDA_VISIBLE_DEVICES="0,1,2")
    assert option(command, "--nproc_per_node") == "1"


def test_without_arguments_it_tunes_on_the_demo(launcher: Launcher) -> None:
    write_script(launcher.bin / "nvidia-smi", f'echo -n "{FOUR_GPUS}"')
    command = launcher.dry_run()
    assert option(command, "--nproc_per_node") == "1"
    assert option(command, "--config") == "configs/demo.yaml"
    assert option(command, "--data_root") == "runs/demo-data"
    assert option(command, "--output_dir") == "runs/demo"
    assert (REPOSITORY / "configs/demo.yaml").is_file()


def test_from_another_folder_the_demo_is_named_by_its_path(
    launcher: Launcher, tmp_path: Path
) -> None:
    ended = subprocess.run(
        launcher.command(LAUNCH_DRY_RUN="1"), cwd=tmp_path, capture_output=True, text=True
    )
    command = shlex.split(ended.stdout)
    for name in ("--config", "--data_root", "--output_dir"):
        assert option(command, name).startswith(f"{REPOSITORY}/"), command


def test_nodes_from_torchruns_variables(launcher: Launcher) -> None:
    nodes = {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "first", "MASTER_PORT": "1234"}
    command = launcher.dry_run(*RUN, **nodes)
    assert "--standalone" not in command
    assert option(command, "--nnodes") == "3"
    assert option(command, "--node_rank") == "2"
    assert option(command, "--master_addr") == "first"
    assert option(command, "--master_port") == "1234"
    assert "--standalone" in launcher.dry_run(*RUN, NNODES="1", MASTER_ADDR="first")


SLURM = {
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "60007",
    "SLURM_JOB_NODELIST": "gpu-[07-09,12],other",
}


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [("gpu-[07-09,12],other", "gpu-07"), ("a1,b[2-3]", "a1"), ("single", "single")],
)
def test_nodes_from_slurm(launcher: Launcher, nodelist: str, first: str) -> None:
    command = launcher.dry_run(*RUN, **{**SLURM, "SLURM_JOB_NODELIST": nodelist})
    assert option(command, "--nnodes") == "2"
    assert option(command, "--node_rank") == "1"
    assert option(command, "--master_addr") == first
    assert option(command, "--master_port") == "20007"  # 10000 + 60007 % 50000


def test_slurm_itself_names_the_first_host(launcher: Launcher) -> None:
    write_script(launcher.bin / "scontrol", 'echo "$*" | tr " " -; echo second')
    command = launcher.dry_run(*RUN, **{**SLURM, "SLURM_JOB_NODELIST": "x[1-2]"})
    assert option(command, "--master_addr") == "show-hostnames-x[1-2]"


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"NPROC_PER_NODE": "all"}, "NPROC_PER_NODE"),
        ({"NNODES": "1:4"}, "NNODES"),
        ({"NNODES": "2", "MASTER_ADDR": "first"}, "NODE_RANK"),
        ({"NNODES": "2", "MASTER_ADDR": "first", "NODE_RANK": "2"}, "NODE_RANK"),
        ({"NNODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR"),
        ({**SLURM, "SLURM_LOCALID": "1"}, "--ntasks-per-node=1"),
    ],
)
def test_wrong_environment_is_exit_2(
    launcher: Launcher, environment: dict[str, str], named: str
) -> None:
    ended = launcher.run(*RUN, LAUNCH_DRY_RUN="1", **environment)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert named in ended.stderr and ended.stderr.count("\n") == 1


def test_help_installs_nothing(launcher: Launcher, tmp_path: Path) -> None:
    ended = launcher.run("--help")
    assert ended.returncode == 0, ended.stderr
    assert "usage: bash launch.sh" in ended.stdout
    assert not (tmp_path / "venv").exists()


def test_active_environment_with_this_samft_is_used(launcher: Launcher) -> None:
    command = launcher.dry_run(*RUN, VIRTUAL_ENV=sys.prefix)
    assert command[0] == f"{sys.prefix}/bin/python"


def test_active_environment_without_samft_is_left_alone(launcher: Launcher, tmp_path: Path) -> None:
    write_script(tmp_path / "theirs/bin/python", "exit 1")
    command = launcher.dry_run(*RUN, VIRTUAL_ENV=str(tmp_path / "theirs"))
    assert command[0] == str(tmp_path / "venv/bin/python")


def fake_python(path: Path, torchrun: str) -> str:
    """A Python that runs given shell lines as torchrun and all else for real."""
    text = f'[ "$2" = torch.distributed.run ] || exec {shlex.quote(sys.executable)} "$@"\n'
    return str(write_script(path, text + torchrun))


def write_status(**status: object) -> str:
    return f"echo {shlex.quote(json.dumps(status))} >$SAMFT_STATUS_FILE\n"


@pytest.mark.parametrize(
    ("torchrun", "code"),
    [
        (write_status(state="done", exit_code=0) + "exit 0", 0),
        (write_status(state="failed", exit_code=1) + "exit 1", 1),
        (write_status(state="failed", exit_code=2) + "exit 1", 2),
        (write_status(state="preempted", exit_code=75) + "exit 1", 75),
        (write_status(state="done", exit_code=0) + "exit 9", 9),
        (write_status(state="running", exit_code=None) + "exit 9", 9),
        (write_status(state="running", exit_code=0) + "exit 0", 1),
        ("exit 5", 5),
        ("exit 0", 0),
    ],
)
def test_exit_code(launcher: Launcher, tmp_path: Path, torchrun: str, code: int) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    python = fake_python(tmp_path / "python", torchrun)
    ended = launcher.run(*RUN, SAMFT_PYTHON=python, TMPDIR=str(temporary))
    assert ended.returncode == code, ended.stderr
    assert not list(temporary.iterdir())


def test_the_environment_is_named_at_the_end_unless_it_is_active(
    launcher: Launcher, tmp_path: Path
) -> None:
    folder = tmp_path / "my env" / "bin"
    python = fake_python(folder / "python", write_status(state="done", exit_code=0))
    for name in ("samft", "activate"):
        write_script(folder / name, "")
    ended = launcher.run(*RUN, SAMFT_PYTHON=python)
    *_, sentence, activate = ended.stderr.splitlines()
    assert sentence.startswith(f"launch.sh: samft is installed in {folder.parent}.")
    assert shlex.split(activate) == ["source", str(folder / "activate")]
    path = f"{folder}:{launcher.environment['PATH']}"
    assert "activate" not in launcher.run(*RUN, SAMFT_PYTHON=python, PATH=path).stderr
    failed = fake_python(folder / "python", write_status(state="failed", exit_code=2))
    assert "activate" not in launcher.run(*RUN, SAMFT_PYTHON=failed).stderr


def test_stopped_before_the_run_begins_is_75(launcher: Launcher, tmp_path: Path) -> None:
    python = fake_python(tmp_path / "python", 'kill -TERM "$PPID"; exec sleep 60')
    ended = launcher.run(*RUN, SAMFT_PYTHON=python)
    assert ended.returncode == 75, ended.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("place", ["counting GPUs", "checking arguments"])
def test_stopped_while_the_start_is_prepared_is_75(
    launcher: Launcher, tmp_path: Path, number: signal.Signals, place: str
) -> None:
    announce = f'echo "$$" >{tmp_path}/pid; echo ready >&2; exec sleep 60\n'
    given = {"SAMFT_PYTHON": str(write_script(tmp_path / "python", announce))}
    if place == "counting GPUs":
        write_script(launcher.bin / "nvidia-smi", announce.replace(">&2", ">/proc/$PPID/fd/2"))
    else:
        given["NPROC_PER_NODE"] = "1"
    with subprocess.Popen(
        launcher.command(*RUN, **given),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
        start_new_session=True,
    ) as process:
        assert process.stderr is not None and process.stderr.readline() == "ready\n"
        child = os.pidfd_open(int((tmp_path / "pid").read_text()))
        if place == "counting GPUs":
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        assert process.wait(60) == 75
        assert f"stopped by {number.name} before the run began" in process.stderr.read()
    assert select.select([child], [], [], 30)[0]  # it has ended, too
    os.close(child)


@pytest.mark.parametrize(
    ("failed", "stop_first", "code"),
    [
        (1, False, 75),  # torchrun was about to start it again
        (2, False, 2),  # which it does not then
        (1, True, 1),  # it failed to stop in good order: a full disk, say
    ],
)
def test_stopped_after_a_failure(
    launcher: Launcher, tmp_path: Path, failed: int, stop_first: bool, code: int
) -> None:
    fail = write_status(state="failed", exit_code=failed, reason="a hang")
    stop = 'kill -TERM "$PPID"\n'
    lines = ["trap '' TERM\n", stop, "sleep 0.5\n", fail] if stop_first else [fail, stop]
    python = fake_python(tmp_path / "python", "".join([*lines, "sleep 0.5; exit 1"]))
    ended = launcher.run(*RUN, SAMFT_PYTHON=python)
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.splitlines()[-1] == "launch.sh: a hang"


def test_reason_is_the_last_line(launcher: Launcher, tmp_path: Path) -> None:
    status = write_status(state="failed", exit_code=2, reason="there is no such folder")
    python = fake_python(tmp_path / "python", status + "echo noise >&2; exit 1")
    ended = launcher.run(*RUN, SAMFT_PYTHON=python)
    assert ended.stderr.splitlines()[-1] == "launch.sh: there is no such folder"


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGTERM),  # without processes yet
        (signal.SIGUSR1, signal.SIGUSR1),
        (signal.SIGHUP, signal.SIGTERM),
    ],
)
def test_signals_are_forwarded_to_torchrun_which_is_waited_for(
    launcher: Launcher, tmp_path: Path, sent: signal.Signals, received: signal.Signals
) -> None:
    waits = f"""exec {shlex.quote(sys.executable)} -c '
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, list(range(1, 16)))
print("ready", flush=True)
number = signal.sigwait(list(range(1, 16)))
with open(os.environ["SAMFT_STATUS_FILE"], "w") as file:
    status = f"\\"state\\": \\"preempted\\", \\"exit_code\\": {{60 + number}}"
    file.write(chr(123) + status + chr(125))
raise SystemExit(1)
'"""
    python = fake_python(tmp_path / "python", waits)
    command = launcher.command(*RUN, SAMFT_PYTHON=python)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        # Tests that were started with nohup, or with & in a script, ignore some signals, and a
        # shell cannot take that back.
        preexec_fn=lambda: signal.signal(sent, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(sent)
        assert process.wait(60) == 60 + received


def test_ctrl_c_goes_to_the_processes_and_torchrun_stays_silent(
    launcher: Launcher, tmp_path: Path
) -> None:
    rank = f"""{shlex.quote(sys.executable)} -c '
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
print("ready", flush=True)
signal.sigwait([signal.SIGINT])
open(os.environ["SAMFT_STATUS_FILE"], "w").write(chr(123) + "\\"state\\": \\"preempted\\", "
    + "\\"exit_code\\": 75" + chr(125))
'"""
    torchrun = f"""trap 'echo "a traceback" >&2; exit 1' INT TERM
set -m; {rank} & set +m; wait $!"""
    python = fake_python(tmp_path / "python", torchrun)
    with subprocess.Popen(
        launcher.command(*RUN, SAMFT_PYTHON=python),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 75
        assert process.stderr.read() == ""


def test_environment_of_the_run(launcher: Launcher, tmp_path: Path) -> None:
    python = fake_python(tmp_path / "python", "echo $OMP_NUM_THREADS $PYTHONUNBUFFERED")
    write_script(launcher.bin / "nproc", "echo 7")
    given = {"SAMFT_PYTHON": python, "NPROC_PER_NODE": "2"}
    assert launcher.run(*RUN, **given).stdout == "3 1\n"
    given |= {"NPROC_PER_NODE": "8"}
    assert launcher.run(*RUN, **given).stdout == "1 1\n"
    given |= {"OMP_NUM_THREADS": "5"}
    assert launcher.run(*RUN, **given).stdout == "5 1\n"


def test_settings_of_pytorch_are_its_own_or_the_users(launcher: Launcher, tmp_path: Path) -> None:
    python = fake_python(tmp_path / "python", "env")
    given = {"SAMFT_PYTHON": python, "NPROC_PER_NODE": "2"}

    def settings(**environment: str) -> list[str]:
        lines = launcher.run(*RUN, **given, **environment).stdout.splitlines()
        return sorted(line for line in lines if line.startswith(("PYTORCH_", "TORCH_NCCL")))

    assert settings() == ["PYTORCH_ALLOC_CONF=expandable_segments:True"]
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        assert settings(**{name: "max_split_size_mb:64"}) == [f"{name}=max_split_size_mb:64"]
    own = settings(TORCH_NCCL_ASYNC_ERROR_HANDLING="2")
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING=2" in own


@pytest.fixture
def clone(launcher: Launcher, tmp_path: Path) -> Launcher:
    """A clone of its own, and a Python that only records what it would install."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("launch.sh", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, folder)
    launcher.script = folder / "launch.sh"
    del launcher.environment["SAMFT_VENV"]
    launcher.environment["PYTHON"] = str(
        write_script(
            tmp_path / "base",
            f"""case "$1 $2" in
"-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
"-m pip") shift 2; echo "$*" >>{folder}/installed ;;
"-m torch.distributed.run") ;;
*) exec {shlex.quote(sys.executable)} "$@" ;;
esac""",
        )
    )
    return launcher


def installed(clone: Launcher) -> list[str]:
    return (clone.script.parent / "installed").read_text().splitlines()


def test_installs_once_also_when_started_together(clone: Launcher) -> None:
    command = clone.command(*RUN)
    starts = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(4)]
    assert [process.wait(60) for process in starts] == [0, 0, 0, 0]
    assert clone.run(*RUN).returncode == 0
    folder = clone.script.parent
    (line,) = installed(clone)
    assert line.startswith("install ")
    assert line.endswith(f"-c {folder}/constraints.txt -e {folder}")


def test_installs_again_when_the_constraints_change(clone: Launcher) -> None:
    assert clone.run(*RUN).returncode == 0
    with (clone.script.parent / "constraints.txt").open("a") as file:
        file.write("numpy==2.4.7\n")
    assert clone.run(*RUN).returncode == 0
    assert len(installed(clone)) == 2


def test_failed_installation_is_tried_again(clone: Launcher, tmp_path: Path) -> None:
    base = Path(clone.environment["PYTHON"])
    working = base.read_text()
    write_script(base, working.replace("shift 2;", "exit 1;"))
    ended = clone.run(*RUN)
    assert ended.returncode == 2
    assert "the installation failed" in ended.stderr
    write_script(clone.script.parent / ".venv/bin/python", working)
    assert clone.run(*RUN).returncode == 0
    assert len(installed(clone)) == 1


def test_no_python_is_a_clear_error(clone: Launcher) -> None:
    for version in ("", "3", "3.13", "3.12", "3.11", "3.10"):
        write_script(clone.bin / f"python{version}", "exit 1")
    ended = clone.run(*RUN, PYTHON="python")
    assert ended.returncode == 2
    assert "no Python 3.10 or newer found" in ended.stderr


def test_wrong_arguments_are_reported_once_and_start_nothing(
    launcher: Launcher, tmp_path: Path
) -> None:
    python = fake_python(tmp_path / "python", f"touch {tmp_path}/started")
    ended = launcher.run(*RUN, "--no_such_flag", "1", SAMFT_PYTHON=python, NPROC_PER_NODE="4")
    assert ended.returncode == 2
    assert ended.stderr.count("no_such_flag") == 1 and "Traceback" not in ended.stderr
    assert not (tmp_path / "started").exists()


def test_missing_dataset_is_exit_2_through_torchrun(launcher: Launcher, tmp_path: Path) -> None:
    outputs = ("--data_root", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "run"))
    ended = launcher.run(*RUN, *outputs, SAMFT_PYTHON=sys.executable)
    assert ended.returncode == 2, ended.stderr
    assert str(tmp_path / "nowhere") in ended.stderr
