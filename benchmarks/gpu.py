"""All that only a GPU can show, in 12 minutes: `make gpu`.

    python -m benchmarks.gpu --output_dir FOLDER

Parts run in order of worth, each in processes of its own and with a limit of its own. FOLDER gets
`gpu.md`, the table of results; `gpu.json`, all figures; and `gpu.log`, all that was printed. The
table is written again after every part, so whatever ends this leaves what was measured. Without a
GPU the same runs with smaller models on pretended ones (`tests/helpers/pretend_cuda`), as far as
that goes; its times are not written down. Imports no torch.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import PARTS, REPOSITORY, TORCHRUN, Part, Setup
from benchmarks.tables import markdown_table

TOTAL_SECONDS, PRETENDED_SECONDS = 12 * 60, 15 * 60
MARK, FIGURES = "=> ", "json: "
# What a step takes at least, ms an image at 1024 px: operations at a rate assumed for an H100, see
# docs/memory_and_speed.md. Not measured.
FLOORS = {
    ("vit_b", "frozen"): 1.2,
    ("vit_l", "frozen"): 3.6,
    ("vit_h", "frozen"): 7.2,
    ("vit_b", "full"): 3.7,
    ("vit_l", "full"): 11.0,
    ("vit_h", "full"): 22.0,
    ("vit_b", "cached"): 1.0,
    ("vit_l", "cached"): 1.0,
    ("vit_h", "cached"): 1.0,
}


@dataclass
class PartResult:
    """What a part has shown.

    Attributes:
        name: Of the part.
        shows: See `Part`.
        state: `done`, `failed` or `not measured`.
        seconds: That it took.
        lines: Findings, or the reason why there are none.
        figures: Numbers, where it measures any.
        tables: Lines of the Markdown tables that were printed.
    """

    name: str
    shows: str
    state: str = "not measured"
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)

    def add_findings(self, output: str) -> None:
        """Adds the lines and figures that a command marked in its output."""
        for line in output.splitlines():
            if line.startswith(MARK):
                self.lines.append(line.removeprefix(MARK))
            elif line.startswith(FIGURES):
                self.figures.append(json.loads(line.removeprefix(FIGURES)))
            elif line.startswith("|"):
                self.tables.append(line)
            elif self.tables and self.tables[-1]:
                self.tables.append("")  # the table has ended


def run_part(part: Part, setup: Setup, *, limit: float, log: Path) -> PartResult:
    """Runs the commands of a part within a number of seconds."""
    result = PartResult(part.name, part.shows)
    if setup.pretended and part.needs_gpu:
        result.lines.append(part.needs_gpu)
        return result
    start = time.monotonic()
    commands = part.commands(setup)
    for argv in commands:
        left = limit - (time.monotonic() - start)
        code, output = _run_command(argv, setup, limit=left, log=log)
        result.add_findings(output)
        if code not in _expected_codes(part, argv):
            result.state = "not measured" if code is None else "failed"
            reason = f"cut after {limit:.0f} s" if code is None else f"exit code {code}"
            result.lines.append(f"{reason}: {_last_line(output)}")
            break
    else:
        result.state = "done"
        result.lines += [
            *_summaries(commands, setup),
            *([_last_line(output)] if part.fails else []),
        ]
    result.seconds = time.monotonic() - start
    if setup.pretended:
        _add_reports(result, setup)
    return result


def _expected_codes(part: Part, argv: Sequence[str]) -> tuple[int, ...]:
    if part.fails:
        return (1,)
    # Stopped as planned is 75, of which torchrun makes 1
    return (1, 75) if "--stop_after" in argv else (0,)


def _run_command(
    argv: Sequence[str], setup: Setup, *, limit: float, log: Path
) -> tuple[int | None, str]:
    """Runs a module; its exit code, None if it was cut, and what it printed."""
    harness = ["helpers.pretend_cuda"] if setup.pretended and argv[0] != TORCHRUN[0] else []
    command = [sys.executable, "-m", *harness, *argv]
    with tempfile.TemporaryFile("w+") as file:
        running = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=_environment(setup),
            start_new_session=True,
        )
        try:
            code: int | None = running.wait(max(limit, 0.1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)  # its ranks and workers, too
                running.wait()
        file.seek(0)
        output = file.read()
    with log.open("a") as file:
        file.write(f"\n$ python {' '.join(command[1:])}\n{output}")
    return code, output


def _environment(setup: Setup) -> dict[str, str]:
    paths = [str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    if setup.pretended:
        number = len(list(setup.folder.glob("report-*")))
        environment["PRETEND_CUDA_REPORT"] = str(setup.folder / f"report-{number}")
    return environment


def _add_reports(result: PartResult, setup: Setup) -> None:
    """Adds what pretended GPUs have seen: faults, launches and waits of the last step."""
    for path in sorted(setup.folder.glob("report-*")):
        if path in setup.read_reports:
            continue
        setup.read_reports.add(path)
        report = json.loads(path.read_text())
        if report["faults"]:
            result.state = "failed"
            result.lines.append(f"faults: {', '.join(report['faults'])}")
        if report["steps"]:
            step = report["steps"][-1]
            launches = sum(step["launches"].values())
            waits = sum(wait["times"] for wait in step["waits"])
            result.lines.append(f"{launches} launches and {waits} waits in the last step")


def _summaries(commands: Sequence[Sequence[str]], setup: Setup) -> list[str]:
    """Of each run of `samft.train` that ended: its score and speed."""
    lines = []
    runs = {argv[argv.index("--output_dir") + 1] for argv in commands if "--steps" in argv}
    for path in (Path(run, "summary.json") for run in sorted(runs)):
        if path.exists():
            summary = json.loads(path.read_text())
            scores = [summary[f"{which}_val_per_mask_iou"] for which in ("baseline", "best")]
            speed = "" if setup.pretended else f", {summary['images_per_second']:.3g} images/s"
            lines.append(f"{path.parent.name}: IoU {scores[0]:.4f} to {scores[1]:.4f}{speed}")
    return lines


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if not line.startswith((MARK, FIGURES))]
    return next((line for line in reversed(lines) if line), "printed nothing")


def write_results(folder: Path, results: Sequence[PartResult], *, setup: Setup) -> str:
    """Writes `gpu.md` and `gpu.json`; returns the text of the first."""
    rows = []
    for result in results:
        text = "; ".join(result.lines).replace("|", "/")
        if result.tables and not setup.pretended:
            text = f"see its table. {text}"
        text = text if result.state == "done" else f"**{result.state}**: {text}"
        rows.append(f"| {result.name} | {result.shows} | {text} | {result.seconds:.0f} |")
    parts = [
        f"# {_describe_device(results, setup)}, {time.strftime('%Y-%m-%d %H:%M')}",
        markdown_table("| part | shows | result | s |", rows),
        _floor_table(results, setup),
    ]
    if not setup.pretended:
        parts += [f"## {r.name}\n\n" + "\n".join(r.tables) for r in results if r.tables]
    text = "\n\n".join(parts) + "\n"
    (folder / "gpu.md").write_text(text)
    document = {"pretended": setup.pretended, "results": [asdict(result) for result in results]}
    (folder / "gpu.json").write_text(json.dumps(document, indent=1) + "\n")
    return text


def _describe_device(results: Sequence[PartResult], setup: Setup) -> str:
    if setup.pretended:
        return "On pretended GPUs, whose times mean nothing"
    lines = [line for result in results if result.name == "versions" for line in result.lines]
    return "; ".join(lines) or "On a GPU"


def _floor_table(results: Sequence[PartResult], setup: Setup) -> str:
    """Milliseconds an image beside what the operations take at least."""
    measured: dict[tuple[str, str], list[str]] = {}
    for figures in (figures for result in results for figures in result.figures):
        key = figures["model_type"], figures["mode"]
        own = f"{1e3 * figures['seconds'] / figures['images']:.2f}"
        with_graphs = " with CUDA graphs" if figures["cuda_graphs"] else ""
        measured.setdefault(key, []).append(f"{own}{with_graphs}")
    rows = []
    for (model_type, mode), floor in FLOORS.items():
        times = [] if setup.pretended else measured.get((model_type, mode), [])
        rows.append(f"| {model_type} | {mode} | {floor} | {', '.join(times) or 'not measured'} |")
    return markdown_table("| model | mode | floor on an H100, ms an image | measured |", rows)


def has_gpu() -> bool:
    """Whether PyTorch sees a GPU, asked in another process, which leaves this one without."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts; returns the number that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="for the results")
    names = [part.name for part in PARTS]
    parser.add_argument(
        "--parts", nargs="+", choices=names, metavar="NAME", help=f"{'; '.join(names)}; default all"
    )
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    start, results = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        setup = Setup(Path(name), pretended=not has_gpu())
        total = PRETENDED_SECONDS if setup.pretended else TOTAL_SECONDS
        log = args.output_dir / "gpu.log"
        for part in PARTS:
            if args.parts and part.name not in ("data", *args.parts):
                continue
            # A pretended GPU is slow, and its parts are small
            limit = 240.0 if setup.pretended else part.limit
            left = total - (time.monotonic() - start)
            results.append(_run_in_time(part, setup, limit=limit, left=left, log=log))
            print(f"{part.name}: {results[-1].state}, {results[-1].seconds:.0f} s", flush=True)
            text = write_results(args.output_dir, results, setup=setup)
    print(f"\n{text}\nin {time.monotonic() - start:.0f} s; all output is in {log}")
    return sum(result.state == "failed" for result in results)


def _run_in_time(part: Part, setup: Setup, *, limit: float, left: float, log: Path) -> PartResult:
    if left < 5:
        reason = "the time for all parts was over"
        return PartResult(part.name, part.shows, "not measured", lines=[reason])
    return run_part(part, setup, limit=min(limit, left), log=log)


if __name__ == "__main__":
    sys.exit(main())
