"""The running text of the pages: its commands, flags, names and links; sizes; the built site."""

import argparse
import contextlib
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest

from helpers import REPOSITORY, TESTS
from helpers.documentation import PAGES, Block, PageError, Runner
from samft.commands import COMMANDS as PROGRAM
from samft.config import TrainConfig

COMMANDS = ("train", "evaluate", "average", "predict", "export", "convert", "check", "demo")
BENCHMARKS = (
    *("coco_like", "predict", "pretrain_tiny", "quality", "same_numbers", "saving", "scale"),
    "train_step",
)
# Flags of other programs, and those that stand for any.
FOREIGN = {
    "--x",
    "--no-x",
    "--help",
    "--max-restarts",
    "--signals-to-handle",
    "--standalone",
    "--requeue",
    "--shm-size",
    "--user",
    "--entrypoint",
    "--return-single-mask",
}
OTHER_NAMES = {"KillWait", "TimeoutStopSec"}  # settings of SLURM and systemd
# Files of a run, of a YOLO dataset, of the plan that a decision departs from, and of a reader.
NOT_IN_REPOSITORY = {"config.yaml", "data.yaml", "gallery.py", "mine.yaml", "tversky.py"}


def running_text(page: str) -> str:
    """A page's text without code blocks; each paragraph, item and table row on one line."""
    text = re.sub(r"^[ \t]*```.*?^[ \t]*```$", "", page, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\n(?![\n|#]|\s*[-*\d] )[ \t]*", " ", text)


def code_spans(page: str) -> list[str]:
    """What stands in `backticks` in the running text."""
    return [
        span for line in running_text(page).splitlines() for span in re.findall(r"`([^`]+)`", line)
    ]


SPANS = [(page, span) for page in PAGES for span in code_spans(page.read_text())]


def block_on(page: Path) -> Block:
    """For errors."""
    return Block(page.relative_to(REPOSITORY).as_posix(), 0, "bash", "")


def test_spans_are_read_over_line_ends() -> None:
    page = (
        "See `make\ncheck` and\n`b`.\n\n- `c`\n- d `e\n  f`\n\n| `g` |\n| `h` |\n```\n`i`\n```\n`j`"
    )
    assert code_spans(page) == ["make check", "b", "c", "e f", "g", "h", "j"]
    assert len(SPANS) > 500


@pytest.mark.run
def test_commands_in_the_text_have_right_arguments(runner: Runner) -> None:
    programs = [f"samft {name} --" for name in PROGRAM]
    for page, span in SPANS:
        if span.startswith((*programs, "python -m ", "bash launch.sh", "make ", "pip install ")):
            tokens = shlex.split(span)
            if tokens[0] == "python" and (len(tokens) == 3 or tokens[3] == "--help"):
                assert hasattr(importlib.import_module(tokens[2]), "main"), span
            elif not {"...", "--help"} & set(tokens):
                runner.run_tokens(tokens, block_on(page), only_parse=True)
    assert len(runner.commands) > 15
    with pytest.raises(PageError):
        runner.run_tokens(["make", "chek"], block_on(PAGES[0]), only_parse=True)


def flags_of(module: str) -> set[str]:
    """The flags that a command's parser knows."""

    class ParserMadeError(Exception):
        pass

    known: set[str] = set()

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        known.update(parser._option_string_actions)
        raise ParserMadeError

    main = importlib.import_module(module).main
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        mock.patch.object(sys, "argv", [module]),
        contextlib.suppress(ParserMadeError),
    ):
        main([]) if module.startswith("samft.") else main()
    return known


def unknown_flags(span: str, known: set[str]) -> list[str]:
    """The tokens of a span that look like flags, and are none of the known ones."""
    flags = re.findall(r"(?:^|\s)(--[\w-]+)", span)
    return [flag for flag in flags if flag not in known]


def test_flags_in_the_text_exist() -> None:
    known = FOREIGN | {f"--{field.name}" for field in fields(TrainConfig)} | {"--config"}
    for module in (*(f"samft.{c}" for c in COMMANDS), *(f"benchmarks.{b}" for b in BENCHMARKS)):
        known |= flags_of(module)
    wrong = {
        f"{page.name}: {flag}"
        for page, span in SPANS
        if not span.startswith(("torchrun", "docker", "srun"))
        for flag in unknown_flags(span, known)
    }
    assert not wrong
    assert unknown_flags("--batch_size 4 --batchsize 4", known) == ["--batchsize"]


def missing_file(span: str) -> bool:
    """Whether it is the path of a source file that is not there."""
    if (
        not re.fullmatch(r"[\w.-]+(/[\w.-]+)*\.(py|md|sh|yaml|yml)", span)
        or span in NOT_IN_REPOSITORY
    ):
        return False
    roots = (REPOSITORY, REPOSITORY / "samft", REPOSITORY / "docs", TESTS)
    return not any((root / span).is_file() for root in roots)


def test_files_in_the_text_exist() -> None:
    assert not {f"{page.name}: {span}" for page, span in SPANS if missing_file(span)}
    assert missing_file("samft/engine.py") and not missing_file("training/engine.py")


def is_name(dotted: str) -> bool:
    """Whether `samft.module.name` can be imported."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            value = importlib.import_module(".".join(parts[:length]))
            return all((value := getattr(value, part, None)) is not None for part in parts[length:])
    return False


def test_names_in_the_text_exist() -> None:
    names = {span for _, span in SPANS if re.fullmatch(r"(samft|benchmarks)(\.\w+)+", span)}
    assert len(names) > 5
    assert not {name for name in names if not is_name(name)}
    assert not is_name("samft.training.engine.Trainr") and not is_name("samft.engine")


def test_classes_in_the_text_exist() -> None:
    source = "".join(path.read_text() for path in (REPOSITORY / "samft").rglob("*.py"))
    classes = {span for _, span in SPANS if re.fullmatch(r"[A-Z][a-z]+[A-Z][A-Za-z]+", span)}
    assert len(classes) > 8
    assert not {name for name in classes - OTHER_NAMES if not re.search(rf"\b{name}\b", source)}


def links(page: Path) -> Iterator[tuple[str, Path]]:
    """The links of a page to files, and where they lead."""
    text = re.sub(r"`[^`]*`", "", running_text(page.read_text()))
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            yield target, page.parent / target


def test_links_lead_to_files() -> None:
    all_links = [(page, *link) for page in PAGES for link in links(page)]
    assert len(all_links) > 60
    assert not [f"{page.name}: {target}" for page, target, path in all_links if not path.exists()]


def test_the_readme_and_contributing_are_short() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert len(readme.split()) <= 1200
    assert not [line for line in readme.splitlines() if len(line) > 120]
    assert len((REPOSITORY / "CONTRIBUTING.md").read_text().splitlines()) <= 60


def first_column(page: str, heading: str) -> list[str]:
    """The code spans in the first column of the table under a heading."""
    section = page.split(f"\n## {heading}")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [span for row in rows[2:] for span in re.findall(r"`([^`]+)`", row.split("|")[1])]


@pytest.mark.run
def test_the_files_that_a_run_is_said_to_leave_are_there(material: Path) -> None:
    run = material / "runs" / "mine"
    for page in ("README.md", "docs/training.md"):
        names = first_column((REPOSITORY / page).read_text(), "What a run leaves")
        assert len(names) >= 12
        for name in set(names) - {"{step}-{val_per_mask_iou}.ckpt", "bad_steps.jsonl"}:
            assert any(run.rglob(f"*{name.strip('/').removeprefix('previous/')}")), name


def test_the_readme_names_every_command() -> None:
    commands = first_column((REPOSITORY / "README.md").read_text(), "Commands")
    assert commands == ["bash launch.sh ...", *(f"samft {name}" for name in COMMANDS)]


def test_the_tests_that_reliability_names_exist() -> None:
    page = (REPOSITORY / "docs" / "reliability.md").read_text()
    table = page.split("\n## What is tested")[1].split("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("|")]
    names = [name for row in rows for name in re.findall(r"`([\w.]+)`", row[3])]
    tests = "".join(f"{path.stem} {path.read_text()}" for path in TESTS.rglob("test_*.py"))
    assert len(names) > 20
    assert not [name for name in names if name.strip(".").rstrip("_") not in tests]


def build_site(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """`mkdocs build --strict`, for which a warning is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = {"NO_MKDOCS_2_WARNING": "1", "PATH": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.run
def test_the_site_builds_without_a_warning_and_a_broken_link_is_one(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: make docs installs it")
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    shutil.copy(REPOSITORY / "mkdocs.yml", tmp_path)
    built = build_site(tmp_path, tmp_path / "site")
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "index.html").is_file()
    with (tmp_path / "docs" / "why.md").open("a") as page:
        page.write("\n[broken](training.md#nothing)\n")
    broken = build_site(tmp_path, tmp_path / "site")
    assert broken.returncode == 1 and "training.md#nothing" in broken.stderr, broken.stderr
