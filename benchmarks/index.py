"""Compares samft's index of a COCO file with pycocotools: time to open, and memory when shared.

    python -m benchmarks.index --data_root DIR [--json FILE]

Opening: samft's first index, samft's later starts and `pycocotools.coco.COCO`, each in a fresh
process. Sharing: processes are started as in training (ranks, each with forked loader workers); all
read boxes and segmentations of random images, and measure their own memory while all are alive. The
memory of the same processes without data is subtracted. `benchmarks/coco_like.py` writes a dataset
of COCO's size. Memory is read from /proc, so this runs on Linux only.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from pycocotools.coco import COCO

from benchmarks.tables import format_spread, markdown_table
from samft.coco.layout import find_split
from samft.coco.subset import CocoSubset, read_coco

Source: TypeAlias = tuple[str, str, str]  # annotation file, image folder, samft's cache folder
Reader: TypeAlias = Callable[[np.random.Generator], float]  # reads one random image

_CHILD = "import sys; from benchmarks.index import open_once; open_once(*sys.argv[1:])"
_BARRIER_TIMEOUT = 1800  # s
_METHODS = {
    "first": "samft, first index",
    "again": "samft, later start",
    "pycocotools": "pycocotools",
}


def _open_samft(source: Source) -> CocoSubset:
    annotations, folder, cache = map(Path, source)
    return read_coco(annotations, folder, cache=cache)


def open_pycocotools(annotations: str | Path) -> COCO:
    """Opens the file with pycocotools; its messages go to stderr, since stdout is for tables."""
    with contextlib.redirect_stdout(sys.stderr):
        return COCO(annotations)


def _read_memory(pid: int | str, name: str) -> dict[str, float]:
    # MB of the fields of a file under /proc that are in kB.
    lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
    fields = [line.split() for line in lines if line.endswith(" kB")]
    return {field[0].rstrip(":"): int(field[1]) * 1024 / 1e6 for field in fields}


def open_once(method: str, *source: str) -> None:
    """Opens the dataset and prints seconds and memory as JSON; must run in a fresh process."""
    start = time.perf_counter()
    if method == "pycocotools":
        opened: Any = open_pycocotools(source[0])
        objects = len(opened.anns)
    else:
        opened = _open_samft((source[0], source[1], source[2]))
        objects = opened.num_objects
    seconds = time.perf_counter() - start
    status = _read_memory("self", "status")
    result = {"call_seconds": seconds, "cpu_seconds": sum(os.times()[:4]), "objects": objects}
    print(json.dumps({**result, "peak_rss": status["VmHWM"], "rss": status["VmRSS"]}))


def _resident_below(pid: int) -> float:
    # RSS of a process and its descendants, MB: indexing may start helper processes.
    total, pending = 0.0, [pid]
    while pending:
        parent = pending.pop()
        try:
            total += _read_memory(parent, "status").get("VmRSS", 0.0)
            for task in Path(f"/proc/{parent}/task").iterdir():
                pending += map(int, (task / "children").read_text().split())
        except OSError:  # the process has just ended
            continue
    return total


def measure_opening(method: str, source: Source) -> dict[str, float]:
    """Seconds and MB of opening the dataset in a fresh process."""
    start, peak = time.perf_counter(), 0.0
    command = [sys.executable, "-c", _CHILD, method, *source]
    repository = Path(__file__).resolve().parent.parent  # where `benchmarks` can be imported
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=repository) as child:
        while child.poll() is None:
            peak = max(peak, _resident_below(child.pid))
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        output = child.stdout.read() if child.stdout else ""
    if child.returncode:
        raise RuntimeError(f"{method}: the process ended with {child.returncode}.")
    result = json.loads(output.splitlines()[-1])
    return {"process_seconds": seconds, **result, "peak_rss": max(peak, result["peak_rss"])}


def measure_all_openings(source: Source, *, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Measures all methods in turn; the first index of each round goes to a cache of its own."""
    openings: dict[str, list[dict[str, float]]] = {method: [] for method in _METHODS}
    for number in range(rounds):
        annotations, folder, cache = source
        if number < rounds - 1:  # the cache of the last round is used again by measure_sharing
            cache += f"/round{number}"
        for method in _METHODS:
            openings[method].append(measure_opening(method, (annotations, folder, cache)))
    return openings


# Many processes.


def _nothing_reader(source: Source) -> Reader:
    # The work of the other readers without their data: random numbers, allocations, sums.
    def read(rng: np.random.Generator) -> float:
        rng.integers(1 << 17)
        return float(sum(np.arange(46.0).sum() for _ in range(7)))

    return read


def _samft_reader(source: Source) -> Reader:
    subset = _open_samft(source)

    def read(rng: np.random.Generator) -> float:
        rows = subset.objects_of(int(rng.integers(subset.num_images)))
        total = float(subset.index.boxes[rows].sum())
        for row in rows.tolist():
            segmentation = subset.index.segmentations[row]
            rle = isinstance(segmentation, dict)
            total += sum(float(part.sum()) for part in ([] if rle else segmentation))
        return total

    return read


def _pycocotools_reader(source: Source) -> Reader:
    coco = open_pycocotools(source[0])
    image_ids = list(coco.imgToAnns)

    def read(rng: np.random.Generator) -> float:
        annotations = coco.imgToAnns[image_ids[int(rng.integers(len(image_ids)))]]
        total = float(np.asarray([entry["bbox"] for entry in annotations]).sum())
        for entry in annotations:
            rle = isinstance(entry["segmentation"], dict)
            parts = [] if rle else [np.asarray(part) for part in entry["segmentation"]]
            total += sum(float(part.sum()) for part in parts)
        return total

    return read


_READERS: Mapping[str, Callable[[Source], Reader]] = {
    "nothing": _nothing_reader,
    "samft": _samft_reader,
    "pycocotools": _pycocotools_reader,
}


def _read_and_report(
    reader: Reader, role: str, *, seed: int, reads: int, barrier: Barrier, results: Any
) -> None:
    rng = np.random.default_rng(seed)
    barrier.wait(_BARRIER_TIMEOUT)  # until all have opened the dataset
    start = time.perf_counter()
    for _ in range(reads):
        reader(rng)
    speed = reads / (time.perf_counter() - start)
    barrier.wait(_BARRIER_TIMEOUT)  # a page counts as private until a second process has read it
    memory = _read_memory("self", "smaps_rollup")
    uss = memory["Private_Clean"] + memory["Private_Dirty"]
    report = {"uss": uss, "private_dirty": memory["Private_Dirty"], "pss": memory["Pss"]}
    results.put({"role": role, **report, "images_per_second": speed})
    barrier.wait(
        _BARRIER_TIMEOUT
    )  # no process ends, which would make shared pages private, before all have measured


def _run_rank(
    kind: str,
    source: Source,
    *,
    rank: int,
    num_workers: int,
    reads: int,
    barrier: Barrier,
    results: Any,
) -> None:
    reader = _READERS[kind](source)
    context = multiprocessing.get_context("fork")  # as a DataLoader starts its workers on Linux
    share = {"reads": reads, "barrier": barrier, "results": results}
    workers = [
        context.Process(
            target=_read_and_report,
            args=(reader, "worker"),
            kwargs={"seed": rank * (num_workers + 1) + worker, **share},
        )
        for worker in range(1, num_workers + 1)
    ]
    for worker in workers:
        worker.start()
    _read_and_report(reader, "rank", seed=rank * (num_workers + 1), **share)
    for worker in workers:
        worker.join()


def measure_sharing(
    kind: str, source: Source, *, ranks: int, num_workers: int, reads: int
) -> list[dict[str, Any]]:
    """Memory of each process after random reads, MB."""
    context = multiprocessing.get_context("spawn")  # ranks are independent processes
    barrier, results = context.Barrier(ranks * (1 + num_workers)), context.Queue()
    options = {"num_workers": num_workers, "reads": reads, "barrier": barrier, "results": results}
    processes = [
        context.Process(target=_run_rank, args=(kind, source), kwargs={"rank": rank, **options})
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        return _collect_reports(results, processes, number=barrier.parties)
    finally:
        for process in processes:
            process.join()


def _collect_reports(
    results: Any, processes: Sequence[Any], *, number: int
) -> list[dict[str, Any]]:
    reports: list[dict[str, Any]] = []
    while len(reports) < number:
        try:
            reports.append(results.get(timeout=1))
        except queue.Empty:
            if any(process.exitcode for process in processes):
                for process in processes:
                    process.terminate()
                raise RuntimeError("A process that shares the index has died.") from None
    return reports


# Tables.


def opening_table(openings: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A Markdown table: seconds of opening, median (lowest to highest), and peak memory."""
    rows = []
    for method, runs in openings.items():
        keys = ("call_seconds", "process_seconds", "cpu_seconds")
        columns = [[run[key] for run in runs] for key in keys]
        cells = [format_spread(column) for column in columns]
        peak = max(run["peak_rss"] for run in runs)
        rows.append(f"| {_METHODS[method]} | {' | '.join(cells)} | {peak:,.0f} |")
    head = "| | the call, s | whole process, s | its CPU time, s | peak RSS, MB |"
    return markdown_table(head, rows)


def sharing_table(layouts: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A Markdown table: memory of each kind of process, and how much of it the data adds."""
    rows = []
    for kind, reports in layouts.items():
        for role in ("rank", "worker"):
            of_role = [report for report in reports if report["role"] == role]
            empty = [report for report in layouts["nothing"] if report["role"] == role]
            if not of_role:
                continue
            base = {key: statistics.mean(r[key] for r in empty) for key in ("uss", "pss")}
            dirty = statistics.mean(r["private_dirty"] for r in empty)
            uss = [report["uss"] for report in of_role]
            figures = [
                statistics.mean(uss),
                statistics.mean(uss) - base["uss"],
                max(uss) - base["uss"],
                max(report["private_dirty"] for report in of_role) - dirty,
                statistics.mean(report["pss"] for report in of_role) - base["pss"],
            ]
            speed = statistics.mean(report["images_per_second"] for report in of_role)
            cells = " | ".join(f"{figure:,.1f}" for figure in figures)
            rows.append(f"| {kind} | {role} | {cells} | {speed:,.0f} |")
    head = (
        "| | process | USS, MB | added, mean | added, largest | of it dirty, largest "
        "| PSS added, mean | images/s |"
    )
    return markdown_table(head, rows)


def sharing_sum(layouts: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The memory that the data takes in all processes: PSS divides shared pages among them."""
    total = {kind: sum(r["pss"] for r in reports) for kind, reports in layouts.items()}
    added = [
        f"{kind} {total[kind] - total['nothing']:,.0f} MB" for kind in layouts if kind != "nothing"
    ]
    return f"Added by all processes together (sum of PSS): {', '.join(added)}."


def main(argv: Sequence[str] | None = None) -> None:
    """Measures opening and sharing, and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", type=Path, required=True)
    parser.add_argument("--split", default="train2017")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--num_workers", type=int, default=2, help="per rank")
    parser.add_argument("--reads", type=int, default=20_000, help="images per process")
    parser.add_argument("--rounds", type=int, default=3, help="of opening")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args(argv)
    annotations, folder = find_split(args.data_root, args.split)
    with tempfile.TemporaryDirectory() as cache:
        source = (str(annotations.resolve()), str(folder.resolve()), cache)
        openings = measure_all_openings(source, rounds=args.rounds)
        print(opening_table(openings) + "\n", flush=True)
        layout = {"ranks": args.ranks, "num_workers": args.num_workers, "reads": args.reads}
        layouts = {kind: measure_sharing(kind, source, **layout) for kind in _READERS}
    print(sharing_table(layouts) + "\n\n" + sharing_sum(layouts))
    if args.json:
        figures = {"layout": layout, "openings": openings, "sharing": layouts}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
