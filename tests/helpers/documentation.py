"""The code blocks of Markdown pages: read, and run or checked in a workspace of small files.

A page's author marks a block with a comment on the line above it:

    <!-- test: skip, needs Docker -->                  not run at all
    <!-- test: arguments only, takes minutes -->       only the command line is parsed

Both need a reason. A block without a mark is run: `bash` line by line, `python` as a whole, and the
command of a systemd unit in `ini`. A block without a language is text and may hold no command.
"""

import argparse
import configparser
import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch.distributed.run import get_args_parser

from helpers import REPOSITORY
from samft import api
from samft.cli import run_command
from samft.config import TrainConfig, parse_config

PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "tests/README.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
MODES = ("skip", "arguments only")
COMMANDS = re.compile(r"\s*(\$ |python |samft |bash |make |pip |torchrun |srun |docker )")
# Names that pages use for what a reader has: a small model and size stand in for them.
SMALLER = {
    '"vit_b"': '"vit_tiny"',
    "1024": "64",
    '"configs/vit_b_decoder.yaml"': '"small.yaml"',
}
# Appended to commands that run, where the later flag wins.
SMALL_FLAGS = {
    "train": "--model_type vit_tiny --checkpoint_path auto --image_size 64 --batch_size 1 "
    "--steps 2 --metrics_interval 2 --num_workers 0 --device cpu",
    "evaluate": "--num_workers 0 --device cpu",
    "average": "--num_workers 0 --device cpu --points 0.5",
    "predict": "--num_workers 1 --device cpu --points_per_side 2",
    "check": "--image_size 64",
    "demo": "--images 12 --size 64",
}


class PageError(AssertionError):
    """A command or snippet of a page does not work."""


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Attributes:
        page: Its file, relative to the repository.
        line: Of the opening fence, from 1.
        language: What the fence names; empty: text.
        text: Without indentation.
        mark: What the comment above says after `test:`, or empty.
    """

    page: str
    line: int
    language: str
    text: str
    mark: str = ""

    @property
    def mode(self) -> str:
        """`skip`, `arguments only`, or empty: run it."""
        mode, _, reason = self.mark.partition(",")
        if self.mark and (mode not in MODES or not reason.strip()):
            raise self.error(f"the mark '{self.mark}' is not one of {', '.join(MODES)}, REASON")
        return mode

    def error(self, message: str) -> PageError:
        """An error that names the page and line."""
        return PageError(f"{self.page}:{self.line}: {message}")


FENCE = re.compile(
    r"^(?:[ \t]*<!-- test: (?P<mark>.*?) -->\n)?"
    r"(?P<indent>[ \t]*)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    flags=re.MULTILINE | re.DOTALL,
)


def read_blocks(text: str, *, page: str) -> list[Block]:
    """All fenced code blocks of a page, in order."""
    blocks = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("indent")) + 1
        content = textwrap.dedent(match["text"])
        blocks.append(Block(page, line, match["language"], content, match["mark"] or ""))
    return blocks


def read_commands(script: str) -> list[list[str]]:
    """The commands of a block, split into tokens; comments are dropped, `\\` joins lines."""
    lines = script.replace("\\\n", " ").splitlines()
    return [tokens for line in lines if (tokens := shlex.split(line, comments=True))]


def _as_module(tokens: list[str]) -> list[str]:
    # `samft NAME ...` is `python -m samft.NAME ...`
    is_program = len(tokens) > 1 and tokens[0] == "samft"
    return ["python", "-m", f"samft.{tokens[1]}", *tokens[2:]] if is_program else tokens


@dataclass
class Runner:
    """Runs blocks in a workspace.

    Attributes:
        workspace: The working directory, with the files that the pages name.
        given: Names that Python blocks find defined, such as `image` and `box`.
        commands: What was run or checked, for tests of this runner.
    """

    workspace: Path
    given: Mapping[str, Any] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)

    def run(self, block: Block) -> None:
        """Runs or checks one block.

        Raises:
            PageError: It does not work, or nobody knows how to run it.
        """
        mode = block.mode
        if block.language in ("", "text"):
            if any(COMMANDS.match(line) for line in block.text.splitlines()):
                raise block.error("a command in a block without a language")
        elif mode == "skip":
            return
        elif block.language == "python":
            self._run_python(block)
        elif block.language == "ini":
            self._run_unit(block)
        elif block.text.startswith("#!"):
            self._run_script(block)
        elif block.language == "bash":
            for tokens in read_commands(block.text):
                self.run_tokens(tokens, block, only_parse=mode == "arguments only")
        else:
            raise block.error(f"no way is known to run a block of {block.language}")

    def _run_python(self, block: Block) -> None:
        text = block.text
        for large, small in SMALLER.items():
            text = text.replace(large, small)
        try:
            names = {"__name__": "__main__", **self.given}
            exec(compile(text, f"{block.page}:{block.line}", "exec"), names)
        except Exception as error:
            raise block.error(f"{type(error).__name__}: {error}") from error
        self.commands.append("python")

    def _run_unit(self, block: Block) -> None:
        unit = configparser.ConfigParser(strict=False, interpolation=None)
        unit.optionxform = str  # type: ignore[assignment, method-assign]
        unit.read_string(block.text)
        tokens = shlex.split(unit["Service"]["ExecStart"])
        self.run_tokens([Path(tokens[0]).name, *tokens[1:]], block, only_parse=False)

    def _run_script(self, block: Block) -> None:
        # A batch script, with stand-ins for SLURM's commands on its path.
        stubs = self.workspace / "stubs"
        stubs.mkdir(exist_ok=True)
        for name, text in STUBS.items():
            (stubs / name).write_text(f"#!/bin/bash\n{text}\n")
            (stubs / name).chmod(0o755)
        path = f"{stubs}{os.pathsep}{os.environ['PATH']}"
        output = self._run_bash(["-c", block.text], {**SLURM, "PATH": path}, block)
        self._check_launched(output, block)

    def run_tokens(self, tokens: list[str], block: Block, *, only_parse: bool) -> None:
        """Runs or checks one command, after the variables that are set before it.

        Raises:
            PageError: It does not work, or nobody knows how to run it.
        """
        variables = {}
        while tokens and re.match(r"[A-Z_]+=", tokens[0]):
            name, _, variables[name] = tokens[0].partition("=")
            tokens = tokens[1:]
        self.commands.append(" ".join(tokens))
        match _as_module(tokens):
            case [] | ["source", ".venv/bin/activate"]:
                pass
            case ["export", setting] if "=" in setting:
                pass
            case ["python", "-m", module, *arguments]:
                self._run_module(module, arguments, block, only_parse=only_parse)
            case ["torchrun", *arguments]:
                options = self._parse_arguments(get_args_parser().parse_args, arguments, block)
                if not options.module:
                    raise block.error("torchrun without -m")
                arguments = options.training_script_args
                self._run_module(options.training_script, arguments, block, only_parse=True)
            case ["bash", "launch.sh", *_]:
                self._check_launched(self._run_bash(tokens[1:], variables, block), block)
            case ["make", *arguments]:
                self._run_process(["make", "-n", "-C", str(REPOSITORY), *arguments], block)
            case ["pip", "install", *arguments]:
                self._check_pip_install(arguments, block)
            case _:
                raise block.error(f"no way is known to run `{shlex.join(tokens)}`: mark the block")

    def _run_module(
        self, module: str, arguments: list[str], block: Block, *, only_parse: bool
    ) -> None:
        try:
            main = importlib.import_module(module).main
        except (ImportError, AttributeError) as error:
            raise block.error(f"python -m {module}: {error}") from error
        if module == "samft.train":
            self._parse_arguments(parse_config, arguments, block)
        elif only_parse:
            self._parse_only(main, [module, *arguments], block)
        if only_parse:
            return
        small = SMALL_FLAGS.get(module.removeprefix("samft."), "").split()
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed):
            code = run_command(main, [*arguments, *small])
        if code:
            command = shlex.join(["python", "-m", module, *arguments])
            raise block.error(f"`{command}` ends with {code}: {printed.getvalue()}")

    def _parse_arguments(self, parse: Any, arguments: list[str], block: Block) -> Any:
        try:
            with contextlib.redirect_stderr(io.StringIO()) as printed:
                return parse(arguments)
        except (ValueError, SystemExit) as error:
            raise block.error(f"{printed.getvalue()}{error}") from error

    def _parse_only(self, main: Any, argv: list[str], block: Block) -> None:
        # A command stops as soon as its parser has taken the arguments.
        class ParsedError(Exception):
            pass

        parse_args = argparse.ArgumentParser.parse_args

        def parse(parser: argparse.ArgumentParser, *options: Any, **more: Any) -> Any:
            parse_args(parser, *options, **more)
            raise ParsedError

        with (
            mock.patch.object(argparse.ArgumentParser, "parse_args", parse),
            mock.patch.object(sys, "argv", argv),
            contextlib.suppress(ParsedError),
        ):
            self._parse_arguments(
                main if argv[0].startswith("samft.") else lambda _: main(), argv[1:], block
            )

    def _run_bash(self, tokens: list[str], variables: Mapping[str, str], block: Block) -> str:
        ours = {"LAUNCH_DRY_RUN": "1", "SAMFT_PYTHON": sys.executable}
        kept = {n: v for n, v in os.environ.items() if not n.startswith("SLURM_")}
        return self._run_process(["bash", *tokens], block, env={**kept, **ours, **variables})

    def _run_process(self, command: list[str], block: Block, *, env: Any = None) -> str:
        ended = subprocess.run(
            command, cwd=self.workspace, env=env, capture_output=True, text=True, timeout=60
        )
        if ended.returncode:
            raise block.error(
                f"`{shlex.join(command)}` ends with {ended.returncode}: {ended.stderr}"
            )
        return ended.stdout

    def _check_launched(self, output: str, block: Block) -> None:
        # launch.sh prints what it would run: python -m torch.distributed.run ... -m samft.train ...
        launched = [line for line in output.splitlines() if " -m torch.distributed.run " in line]
        if len(launched) != 1:
            raise block.error(f"launch.sh would not run exactly one command: {output}")
        tokens = shlex.split(launched[0])
        options = self._parse_arguments(get_args_parser().parse_args, tokens[3:], block)
        self._parse_arguments(parse_config, options.training_script_args, block)

    def _check_pip_install(self, arguments: list[str], block: Block) -> None:
        setup = configparser.ConfigParser()
        setup.read(REPOSITORY / "setup.cfg")
        while arguments:
            word, *arguments = arguments
            target = re.fullmatch(r"(\.|samft)(?:\[([\w,-]+)\])?", word)
            if word == "-c":
                file, *arguments = arguments
                if not (REPOSITORY / file).is_file():
                    raise block.error(f"pip install: there is no file {file}")
            elif target is not None:
                extras = set((target[2] or "").split(",")) - {""}
                if unknown := extras - set(setup["options.extras_require"]):
                    raise block.error(f"no such extra: {', '.join(unknown)}")
            elif word not in ("-e", "pre-commit"):
                raise block.error(f"no way is known to check `pip install {word}`")


STUBS = {
    # Runs what it is given on this one node.
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'if [[ $1 == show ]]; then echo node1; else echo "requeued $3"; fi',
}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_CPUS_PER_TASK": "4",
    "SLURM_JOB_NODELIST": "node[1-2]",
}


@contextlib.contextmanager
def smaller_trainings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trainings from Python for two steps at a small image size."""
    convert_values = api.convert_values

    def convert_and_shrink(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
        converted, problems = convert_values(config)
        small = {"image_size": 64, "steps": 2, "metrics_interval": 2, "num_workers": 0}
        return replace(converted, **small, device="cpu"), problems

    with monkeypatch.context() as patch:
        patch.setattr(api, "convert_values", convert_and_shrink)
        yield


@contextlib.contextmanager
def smaller_exports(monkeypatch: pytest.MonkeyPatch, size: int) -> Iterator[None]:
    """Exports at a small image size, and with few points for automatic masks."""
    from segment_anything import sam_model_registry

    from samft import load_sam
    from samft.exporters import automatic_masks, exporter

    def registered(checkpoint: str) -> Any:
        return load_sam(checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(exporter, "META_SIZE", size)
        patch.setattr(automatic_masks, "POINTS_PER_SIDE", 2)
        patch.setitem(sam_model_registry, "vit_tiny", registered)
        yield
