"""The command: the training's number, files, comparisons, processes, and wrong inputs."""

import contextlib
import csv
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from helpers.coco_files import write_coco
from helpers.preloaded import run_preloaded
from helpers.short_runs import (
    COMMAND_SECONDS,
    arguments,
    clean_environment,
    command_line,
    evaluate_here,
    read_metrics,
    train_here,
    write_data,
)
from helpers.tiny_checkpoint import mask_finding_sam, write_tiny
from samft import predict
from samft.cli import run_command
from samft.commands import shell_command
from samft.evaluate import main
from samft.weights.download import PACKAGED_TINY

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    train_here(arguments(data, folder, steps=4, metrics_interval=2, save_top_k=2))
    return folder


def best_files(folder: Path) -> list[Path]:
    paths = (path for path in folder.glob("*.ckpt") if path.name != "last.ckpt")
    return sorted(paths, key=lambda path: int(path.name.split("-")[0]))


def arguments_for(data: Path, *checkpoints: Path, **flags: Any) -> list[str]:
    named = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    places = ["--checkpoint", *map(str, checkpoints), "--data_root", str(data)]
    return [*places, "--num_workers", "0", "--device", "cpu", *named]


def test_iou_equals_the_one_in_the_training_log(data: Path, trained: Path) -> None:
    logged = {line["step"]: line for line in read_metrics(trained, "val")}
    for path in best_files(trained):
        report = evaluate_here(arguments_for(data, path))
        line = logged[int(path.name.split("-")[0])]
        assert report["per_mask_iou"] == pytest.approx(line["per_mask_iou"], abs=1e-6)
        assert (report["model_type"], report["image_size"]) == ("vit_tiny", 64)
        assert report["box_fill_iou"] == pytest.approx(
            json.loads((trained / "summary.json").read_text())["box_fill_iou"], abs=1e-6
        )


def test_output_files_and_comparison(
    data: Path, trained: Path, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "new" / "scores.json"
    before, after = best_files(trained)
    report = evaluate_here(arguments_for(data, before, after, output=output))
    written = json.loads(output.read_text())
    assert written == json.loads(json.dumps(report))
    assert next(iter(written)) == "per_mask_iou"
    assert written["checkpoint"] == str(before)
    (other,) = written["others"]
    assert other["checkpoint"] == str(after)
    change = other["per_mask_iou"] - written["per_mask_iou"]
    comparison = other["comparison"]
    assert comparison["iou"]["difference"] == pytest.approx(change, abs=1e-12)
    low, high = comparison["iou"]["interval"]
    assert low <= change <= high
    counted = comparison["wins"] + comparison["losses"] + comparison["ties"]
    assert counted == other["masks"] == written["masks"]
    with (output.parent / written["objects_file"]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    own = [row for row in rows if row["checkpoint"] == str(before)]
    assert len(own) == written["masks"] == len(rows) / 2
    assert {row["category"] for row in rows} == {"thing"}
    assert all(row["file_name"].startswith("image_") for row in rows)
    mean = sum(float(row["iou_actual"]) for row in own) / len(own)
    assert mean == pytest.approx(written["per_mask_iou"], abs=1e-12)
    shown = capsys.readouterr().out
    assert f"{written['per_mask_iou']:.4f}" in shown and "B against A" in shown
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "scores.html",
        "scores.json",
        "scores.objects.csv",
    ]
    assert (
        "clicks" not in written and "One click" not in (output.parent / "scores.html").read_text()
    )
    assert evaluate_here(arguments_for(data, before, output=output))["others"] == []  # replaced


def test_clicks_are_scored_drawn_and_compared(
    data: Path, trained: Path, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "scores.json"
    report = evaluate_here(arguments_for(data, *best_files(trained), output=output, clicks=2))
    assert json.loads(output.read_text()) == json.loads(json.dumps(report))
    after = report["others"][0]
    for model in (report, after):
        box, point = model["clicks"]["box"], model["clicks"]["point"]
        assert (box["clicks"], point["clicks"]) == ([0, 1, 2], [1, 2])
        assert box["iou"][0] == pytest.approx(model["per_mask_iou"], abs=1e-12)
        first = "point_multimask" if model["first_click"] == "best of three masks" else "point"
        assert point["iou"][0] == pytest.approx(model["by_prompt"][first]["mean"], abs=1e-12)
    for start, curve in after["clicks"].items():
        changes = after["comparison"]["clicks"][start]
        for number, change in enumerate(changes["iou"]):
            difference = curve["iou"][number] - report["clicks"][start]["iou"][number]
            assert change["difference"] == pytest.approx(difference, abs=1e-12)
            low, high = change["interval"]
            assert low <= difference <= high
    with (tmp_path / report["objects_file"]).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["checkpoint"] == after["checkpoint"]]
    mean = sum(float(row["iou_box_clicks_2"]) for row in rows) / len(rows)
    assert mean == pytest.approx(after["clicks"]["box"]["iou"][2], abs=1e-12)
    counts = [int(row["noc_85_point"] or 2) for row in rows]
    assert sum(counts) / len(rows) == pytest.approx(after["clicks"]["point"]["noc_85"])
    shown = capsys.readouterr().out
    assert "IoU by clicks, from a point" in shown and "IoU, box, 2 clicks" in shown
    page = (tmp_path / report["page_file"]).read_text()
    assert page.count("<polygon") == 4 and "One click, two clicks, three" in page
    assert page.count("data:image/jpeg") >= 2 * 6  # six objects, of both models


def test_a_page_that_is_not_ours_is_not_replaced(
    data: Path, trained: Path, tmp_path: Path, capsys: Any
) -> None:
    page = tmp_path / "scores.html"
    page.write_text("<p>my own</p>")
    argv = arguments_for(data, best_files(trained)[0], output=tmp_path / "scores.json")
    assert run_command(evaluate_here, argv) == 2
    assert f"{page} exists, and no evaluation of samft has written it" in capsys.readouterr().err
    assert page.read_text() == "<p>my own</p>"


def test_ap_is_that_of_cocoeval_on_the_file_that_predict_writes(
    data_root: Path, tmp_path: Path
) -> None:
    root = data_root / "coco_open104"
    annotations = root / "annotations" / "instances_val2017.json"
    report = evaluate_here(arguments_for(root, PACKAGED_TINY, split="val2017"))
    places = ["--images", root / "val2017", "--annotations", annotations]
    options = [*places, "--checkpoint", PACKAGED_TINY, "--output_dir", tmp_path, "--device", "cpu"]
    predict.main([str(word) for word in options])
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        coco_eval = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "segm")
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    for name, value in zip(("ap", "ap50", "ap75"), coco_eval.stats, strict=False):
        assert report["coco"][name] == pytest.approx(value, abs=1e-6)
    assert 0.05 < report["coco"]["ap"] < 0.95  # not equal for being nothing


def test_automatic_masks_score_as_cocoeval_scores_those_of_predict(
    tmp_path: Path, capsys: Any
) -> None:
    val = write_coco(tmp_path / "data", 3, split="val").parent
    checkpoint = write_tiny(tmp_path, sam=mask_finding_sam())
    (tmp_path / "none").mkdir()
    nothing = write_tiny(tmp_path / "none", sam=mask_finding_sam(iou_predicted=0.5))
    output, few = tmp_path / "scores.json", {"points_per_side": 3, "crop_n_layers": 1}
    argv = arguments_for(tmp_path / "data", nothing, checkpoint, output=output, **few)
    report = evaluate_here([*argv, "--automatic"])
    shown = capsys.readouterr()
    assert "30-0.67.ckpt was tuned on boxes only" in shown.err
    assert "automatic masks, 3 images, any class" in shown.out and "automatic AR@1000" in shown.out
    places = ["--images", val, "--annotations", val / "_annotations.coco.json", "--device", "cpu"]
    settings = [word for name, value in few.items() for word in (f"--{name}", value)]
    options = ["--checkpoint", checkpoint, "--output_dir", tmp_path / "out", "--automatic"]
    predict.main([str(word) for word in (*places, *options, *settings)])
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(val / "_annotations.coco.json"))
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        # Automatic masks have class 0, which COCOeval leaves out even where classes do not count.
        assert {one["category_id"] for one in results} == {0}
        for one in (*results, *truth.dataset["annotations"]):
            one["category_id"] = truth.getCatIds()[0]
        truth.createIndex()
        coco_eval = COCOeval(truth, truth.loadRes(results), "segm")
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    (other,) = report["others"]
    scores = other["automatic"]
    assert [scores["ap"], scores["ar_100"]] == pytest.approx(coco_eval.stats[[0, 8]], abs=1e-9)
    assert scores["ar_100"] > 0
    assert scores["images"] == 3 and scores["settings"] == few and scores["masks_per_image"] > 1
    assert report["automatic"]["masks_per_image"] == 0
    changes = other["comparison"]["automatic"]
    assert changes["masks_per_image"]["difference"] == scores["masks_per_image"]
    with (tmp_path / "scores.objects.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["checkpoint"] == str(checkpoint)]
    recalls = [float(row["automatic_ar_1000"]) for row in rows]
    assert sum(recalls) / len(recalls) == pytest.approx(scores["ar_1000"])
    page = (tmp_path / "scores.html").read_text()
    assert "objects found at IoU .50" in page


def test_a_sample_of_images_gets_automatic_masks(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    argv = arguments_for(data, PACKAGED_TINY, output=output, automatic=2, points_per_side=1)
    assert evaluate_here(argv)["automatic"]["images"] == 2
    with (tmp_path / "scores.objects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    sampled = {row["file_name"] for row in rows if row["automatic_found_50"]}
    assert len(sampled) == 2 < len({row["file_name"] for row in rows})


def test_two_processes_by_torchrun(data: Path, trained: Path, tmp_path: Path) -> None:
    path = best_files(trained)[0]
    files = tmp_path / "one.json", tmp_path / "two.json"
    evaluate_here(arguments_for(data, path, output=files[0], clicks=1))
    argv = arguments_for(data, path, output=files[1], clicks=1)
    line = command_line(argv, processes=2, module="samft.evaluate")
    code, output = run_preloaded(line, clean_environment(), timeout=COMMAND_SECONDS)
    assert code == 0, output
    one, two = (json.loads(file.read_text()) for file in files)
    for name in ("seconds", "objects_file", "page_file"):
        one.pop(name), two.pop(name)
    assert one == two
    for ending in ("objects.csv", "html"):
        written = [(tmp_path / f"{name}.{ending}").read_text() for name in ("one", "two")]
        assert written[0] == written[1]
    assert output.count("IoU, mean over masks") == 1  # rank 0 alone speaks


def test_resize_mode_comes_from_the_sidecar_or_the_state(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    short = {"steps": 1, "metrics_interval": 1}
    train_here(arguments(data, folder, resize_mode="squash", **short))
    logged = read_metrics(folder, "val")[-1]["per_mask_iou"]
    (path,) = best_files(folder)
    for checkpoint in (path, folder / "last.ckpt"):
        report = evaluate_here(arguments_for(data, checkpoint))
        assert report["resize_mode"] == "squash"
        assert report["per_mask_iou"] == pytest.approx(logged, abs=1e-6)
    path.with_suffix(".json").unlink()
    assert evaluate_here(arguments_for(data, path))["resize_mode"] == "pad"


def test_flags_select_objects(data: Path, trained: Path) -> None:
    path = best_files(trained)[0]
    whole = evaluate_here(arguments_for(data, path))
    some = evaluate_here(arguments_for(data, path, min_mask_area=150, category_names="thing"))
    assert 0 < some["masks"] < whole["masks"]
    val = data / "val"
    named = ["--annotations", str(val / "_annotations.coco.json"), "--images", str(val)]
    assert evaluate_here([*arguments_for(data, path), *named])["masks"] == whole["masks"]


def test_images_that_a_training_held_out(data: Path, tmp_path: Path) -> None:
    one_split = tmp_path / "data"
    shutil.copytree(data / "train", one_split / "train")
    folder = tmp_path / "run"
    settings = {"steps": 2, "metrics_interval": 2, "val_fraction": 0.3, "group_by": "(image_1)"}
    train_here(arguments(one_split, folder, **settings))
    log = (folder / "train.log").read_text()
    printed = re.search(f"{re.escape(shell_command('evaluate'))} (.*)", log)
    assert printed
    argv = [*shlex.split(printed[1]), "--num_workers", "0", "--device", "cpu"]
    report = evaluate_here(argv)
    assert (report["images"], report["data"]["val_fraction"]) == (4, 0.3)  # of 13
    (best,) = best_files(folder)
    logged = {line["step"]: line["per_mask_iou"] for line in read_metrics(folder, "val")}
    assert report["per_mask_iou"] == pytest.approx(logged[int(best.name.split("-")[0])], abs=1e-6)
    # Held out as by the training, whatever stands beside its weights, and whatever is scored.
    held_out: dict[str, Any] = {"split": "train", "val_fraction": 0.3}
    for path in (best, folder / "last.ckpt"):
        argv = arguments_for(one_split, PACKAGED_TINY, path, **held_out)
        assert evaluate_here(argv)["images"] == 4


def test_other_objects_are_scored_on_the_images_that_the_training_held_out(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    path, root = tmp_path / "best.ckpt", tmp_path / "data"
    write_copy(best_files(trained)[0], path, {"val_fraction": 0.3})
    shutil.copytree(data / "train", root / "train")

    def images_of(**flags: Any) -> set[str]:
        argv = arguments_for(root, path, split="train", val_fraction=0.3, **flags)
        evaluate_here([*argv, "--output", str(tmp_path / "scores.json")])
        with (tmp_path / "scores.objects.csv").open(newline="") as file:
            return {row["image_id"] for row in csv.DictReader(file)}

    first, *others = sorted(images_of())
    annotations = root / "train" / "_annotations.coco.json"
    document = json.loads(annotations.read_text())
    document["categories"] = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    for entry in document["annotations"]:
        entry["category_id"] = 2 if str(entry["image_id"]) in others else 1
    annotations.write_text(json.dumps(document))
    assert images_of(category_names="a") == {first}


def test_held_out_otherwise_there_are_no_common_images(
    data: Path, trained: Path, tmp_path: Path, capsys: Any
) -> None:
    paths = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    for path, group_by in zip(paths, ("auto", "folder"), strict=True):
        write_copy(best_files(trained)[0], path, {"val_fraction": 0.3, "group_by": group_by})
    argv = arguments_for(data, *paths, split="train", val_fraction=0.3)
    assert run_command(evaluate_here, argv) == 2
    error = capsys.readouterr().err
    assert "group_by auto" in error and "group_by folder" in error
    assert run_command(evaluate_here, [*argv, "--group_by", "none"]) == 0
    assert "trained on" not in capsys.readouterr().err
    argv = arguments_for(data, paths[0], split="train", val_fraction=0.4)
    assert run_command(evaluate_here, argv) == 0
    assert "so that some of these images were trained on" in capsys.readouterr().err


def write_copy(checkpoint: Path, copy: Path, config: dict[str, Any]) -> None:
    """A copy of a checkpoint, of a training with other settings."""
    shutil.copy(checkpoint, copy)
    sidecar = json.loads(checkpoint.with_suffix(".json").read_text())
    changed = {**sidecar, "config": {**sidecar["config"], **config}}
    copy.with_suffix(".json").write_text(json.dumps(changed))


def copy_without(data: Path, folder: Path, name: str) -> Path:
    shutil.copytree(data, folder)
    (folder / "val" / name).unlink()
    return folder


def test_missing_images_are_refused_or_left_out(
    data: Path, trained: Path, tmp_path: Path, capsys: Any
) -> None:
    broken = copy_without(data, tmp_path / "data", "image_1.png")
    path = best_files(trained)[0]
    argv = arguments_for(broken, path)
    assert run_command(evaluate_here, argv) == 2
    assert "image-missing" in capsys.readouterr().err
    assert evaluate_here([*argv, "--on_bad_image", "skip"])["images"] == 4


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--checkpoint", "nowhere.ckpt"], "there is no file nowhere.ckpt"),
        (["--checkpoint", "."], "is a folder"),
        (["--split", "test"], "no split test"),
        (["--split", "test"], "Give --split NAME, or --annotations FILE and --images DIR"),
        (["--data_root", "nowhere"], "no dataset folder"),
        (["--category_names", "thin"], "Did you mean 'thing'"),
        (["--min_mask_area", "1e9"], "no object is left"),
        (["--annotations", "a.json"], "go together"),
        (["--num_workers", "-1"], "must be at least 0"),
        (["--clicks", "-1"], "no number of clicks from 0, for none, to 100"),
        (["--clicks", "101"], "no number of clicks"),
        (["--val_fraction", "1"], "must lie between 0 and 1"),
        (["--val_fraction", "0.5"], "add --split train"),
        (
            ["--val_fraction", "0.5", "--split", "train", "--group_by", "a("],
            "no regular expression",
        ),
        (["--min_mask_area", "many"], "--help"),
        (["--splitt", "val"], "--help"),
        (["--automatic", "-1"], "-1 is no number of images"),
        (["--automatic", "many"], "--help"),
        (["--points_per_side", "4"], "--points_per_side is for automatic masks: add --automatic"),
        (["--automatic", "--points_per_side", "0"], "is not a whole number and at least 1"),
        (["--output", str(PACKAGED_TINY)], "choose another name"),
        (["--output", str(PACKAGED_TINY.with_suffix(".json"))], "choose another name"),
        (["--output", "/proc/nothing/a.json"], "cannot be written"),
        (["--output", "."], "is a folder"),
        (["--device", "cuda"], "sees no GPU"),
    ],
)
def test_wrong_inputs_end_with_a_paragraph(
    flags: list[str], expected: str, data: Path, capsys: Any
) -> None:
    if flags[0] == "--device":
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    argv = [*arguments_for(data, PACKAGED_TINY), *flags]
    assert run_command(evaluate_here, argv) == 2
    stderr = capsys.readouterr().err
    assert expected in stderr
    assert "Traceback" not in stderr and stderr.count("\nerror:") + stderr.startswith("error:") == 1


def test_an_unreadable_checkpoint_is_refused(data: Path, tmp_path: Path, capsys: Any) -> None:
    wrong = tmp_path / "wrong.pth"
    wrong.write_bytes(b"no checkpoint")
    assert run_command(evaluate_here, arguments_for(data, wrong)) == 2
    assert "not a readable checkpoint" in capsys.readouterr().err


def test_nothing_to_evaluate_on(capsys: Any) -> None:
    assert run_command(main, ["--checkpoint", str(PACKAGED_TINY)]) == 2
    assert "nothing to evaluate on" in capsys.readouterr().err
    assert run_command(main, ["--data_root", "x"]) == 2
    assert "--checkpoint" in capsys.readouterr().err


HELP = """
import runpy, sys
sys.argv = ["evaluate", "--help"]
try:
    runpy.run_module("samft.evaluate", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("torch" in sys.modules)
"""


def test_help_imports_no_torch() -> None:
    ended = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "--checkpoint" in ended.stdout
    assert ended.stdout.endswith("False\n")
