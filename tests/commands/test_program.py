"""The program `samft`: its list, wrong names, and how it and its commands are printed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import REPOSITORY
from samft import __main__, __version__, commands
from samft.commands import COMMANDS, shell_command


def run_samft(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["samft", *arguments])
    return __main__.main()


@pytest.mark.parametrize("arguments", [(), ("help",), ("-h",), ("--help",)])
def test_the_list_has_every_command_and_the_next_step(monkeypatch, capsys, arguments) -> None:
    assert run_samft(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    rows = [line.split()[0] for line in printed.splitlines() if line.startswith("  ")]
    assert rows[: len(COMMANDS)] == list(COMMANDS)
    assert f"  {shell_command('check', '--data_root', 'DATASET')}" in printed.splitlines()
    assert max(map(len, printed.splitlines())) <= 80


def test_the_table_has_every_command_of_the_package() -> None:
    modules = [path.stem for path in (REPOSITORY / "samft").glob("[a-z]*.py")]
    sources = {name: (REPOSITORY / "samft" / f"{name}.py").read_text() for name in modules}
    runnable = [name for name, text in sources.items() if 'if __name__ == "__main__":' in text]
    assert sorted(COMMANDS) == sorted(runnable)


def test_the_version(monkeypatch, capsys) -> None:
    assert run_samft(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"samft {__version__}\n"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("trian", "Did you mean train?"),
        ("eval", "Did you mean evaluate?"),
        ("samft.chek", "Did you mean check?"),
        ("--verison", "Did you mean --version?"),
        ("--lr", f"Flags follow a command, as in `{shell_command('train', '--lr')}`."),
        ("zzz", "has no command 'zzz'. The commands are demo, convert, check,"),
        ("a\x1b[1m", r"has no command 'a\x1b[1m'"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(monkeypatch, capsys, name, hint) -> None:
    assert run_samft(monkeypatch, name) == 2
    printed = capsys.readouterr()
    assert hint in printed.err and not printed.out


def test_a_command_gets_its_arguments_and_exit_code(monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run_samft(monkeypatch, "check", "--data_rot", "X")
    assert ended.value.code == 2
    assert "--data_rot" in capsys.readouterr().err


def test_help_of_a_command_is_that_of_its_flag(monkeypatch, capsys) -> None:
    texts = []
    for arguments in (("help", "demo"), ("demo", "--help")):
        with pytest.raises(SystemExit) as ended:
            run_samft(monkeypatch, *arguments)
        assert not ended.value.code
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and "--output_dir" in texts[0]


def test_list_version_and_wrong_names_import_nothing_heavy() -> None:
    source = (
        "import sys; from samft.__main__ import main\n"
        "for name in ([], ['--version'], ['trian']): sys.argv[1:] = name; main()\n"
        "assert not {'torch', 'numpy', 'omegaconf'} & sys.modules.keys()"
    )
    ended = subprocess.run([sys.executable, "-c", source], cwd=REPOSITORY, capture_output=True)
    assert ended.returncode == 0, ended.stderr


# How a command is printed


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The `bin` of a virtual environment with samft in it, which this Python is made to be of."""
    folder = tmp_path / "my env" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "samft"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setattr(commands.sysconfig, "get_path", lambda *_: str(folder))
    monkeypatch.setattr(commands.site, "ENABLE_USER_SITE", False)
    monkeypatch.chdir(tmp_path)
    return folder


def test_in_an_active_environment_a_command_is_short(environment: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(environment), prepend=os.pathsep)
    assert shell_command("check", "--data_root", "my data") == "samft check --data_root 'my data'"
    assert commands.shell_python() == "python"


def test_elsewhere_a_command_names_its_environment(environment: Path, monkeypatch) -> None:
    assert shell_command("check") == "'my env/bin/samft' check"
    assert commands.shell_python() == "my env/bin/python"
    monkeypatch.chdir(environment)
    assert shell_command("check") == "./samft check"
    monkeypatch.chdir("/")
    assert shell_command("check") == f"'{str(environment)[1:]}/samft' check"


def test_a_samft_of_another_environment_is_not_meant(environment: Path, monkeypatch) -> None:
    other = environment.parent.parent / "other"
    other.mkdir()
    (other / "samft").write_text("#!/bin/sh\n")
    (other / "samft").chmod(0o755)
    monkeypatch.setenv("PATH", str(other), prepend=os.pathsep)
    assert shell_command("check") == "'my env/bin/samft' check"
    (other / "samft").unlink()
    (other / "samft").symlink_to(environment / "samft")  # as pipx does
    assert shell_command("check") == "samft check"


def test_without_an_installation_a_command_is_that_of_python(environment: Path) -> None:
    (environment / "samft").unlink()
    assert shell_command("check", "-x") == "'my env/bin/python' -m samft check -x"
