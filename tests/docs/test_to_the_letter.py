"""A stranger follows README.md and docs/getting_started.md to the letter.

In a shell without anything (empty home, no caches, no variables), each block of the pages is pasted
as a browser shows it, in the order of the page, up to masks in a COCO dataset that other packages
read. What the pages leave to the reader is put in (`READERS`), runs are small (`SMALL`), and the
environment that `launch.sh` makes sees the packages of this Python instead of downloading them.
"""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from helpers import REPOSITORY
from helpers.environments import OFFLINE, copy_clone, make_environment, run, shrink_clone

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]

# What a reader puts in: the demo's dataset as one's own, its pictures, and the best checkpoint.
READERS = {
    "DATASET": "runs/demo-data",
    "PHOTO.jpg": "runs/demo-data/val/image_0001.jpg",
    "runs/mine/1500-0.83.ckpt": "runs/mine/[0-9]*-*.ckpt",
}
# What the pages say to add without a GPU, and smaller still. The later flag wins.
SMALL = (
    "--model_type vit_tiny --image_size 64 --steps 2 --metrics_interval 2 "
    "--num_workers 0 --device cpu"
)
NOT_FOLLOWED = {"make check": "this test is part of it"}


def shown_commands(page: Path) -> list[tuple[str, str]]:
    """Language and text of each code block, and of `source ...` in the text, as a page shows it."""
    markdown_it = pytest.importorskip("markdown_it", reason="pip install '.[dev]'")
    shown = []
    for token in markdown_it.MarkdownIt().parse(page.read_text()):
        if token.type == "fence":
            shown.append((token.info, token.content))
        spans = (span for span in token.children or () if span.type == "code_inline")
        shown += [("bash", f"{s.content}\n") for s in spans if s.content.startswith("source ")]
    return shown


def is_followed(language: str, text: str) -> bool:
    extra = re.search(r"\[onnx,huggingface\]", text)
    modules = ("onnxruntime", "transformers")
    if extra and not all(importlib.util.find_spec(name) for name in modules):
        return False  # it cannot be installed without a network
    return language in ("bash", "python") and text.strip() not in NOT_FOLLOWED


def pasted(language: str, text: str) -> str:
    """What a reader pastes into the shell."""
    if language == "python":
        text = f"python - <<'END'\n{text}END\n"
    else:
        text = text.replace("\\\n", " ")
        text = re.sub(r"^bash launch\.sh .*DATASET.*$", rf"\g<0> {SMALL}", text, flags=re.M)
    for printed, own in READERS.items():
        text = text.replace(printed, own)
    return text


def follow(page: Path, folder: Path) -> str:
    """Pastes a page's blocks into one shell in a new clone; what the shell shows."""
    clone, home = copy_clone(REPOSITORY, folder / "clone"), folder / "home"
    home.mkdir()
    shrink_clone(clone)
    make_environment(clone / ".venv")
    blocks = [pasted(*block) for block in shown_commands(page) if is_followed(*block)]
    script = folder / "pasted.sh"
    script.write_text("\n".join(["set -ex -o pipefail", *blocks]))
    variables = {"HOME": str(home), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", **OFFLINE}
    settings = [f"{name}={value}" for name, value in variables.items()]
    return run("env", "-i", *settings, "bash", "--norc", script, cwd=clone)


def check_dataset(path: Path) -> None:
    """Every mask of a COCO dataset is there, and the same for pycocotools and supervision."""
    document = json.loads(path.read_text())
    masks = [mask_utils.decode(entry["segmentation"]) for entry in document["annotations"]]
    assert len(masks) > 20 and all(mask.any() for mask in masks)
    if sys.version_info >= (3, 11) and importlib.util.find_spec("supervision"):
        import supervision

        images = path.parent.parent / "runs" / "demo-data" / "val"
        read = supervision.DetectionDataset.from_coco(str(images), str(path), force_masks=True)
        areas = [int(mask.sum()) for one in read.annotations.values() for mask in one.mask]
        assert sorted(areas) == sorted(int(np.sum(mask)) for mask in masks)


@pytest.mark.parametrize("name", ["README.md", "docs/getting_started.md"])
def test_the_page_leads_from_a_clone_to_masks_in_a_coco_dataset(name: str, tmp_path: Path) -> None:
    shown = follow(REPOSITORY / name, tmp_path)
    assert "done: val_per_mask_iou" in shown
    clone = tmp_path / "clone"
    assert (clone / "runs" / "demo" / "report.html").is_file()
    check_dataset(clone / "out" / "dataset.json")


def test_a_command_that_fails_ends_it(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "1. First `source a` `b`\n\n   ```bash\n   false\n   ```\n\n```python\n1\n```\n"
    )
    shown = [("bash", "source a\n"), ("bash", "false\n"), ("python", "1\n")]
    assert shown_commands(page) == shown
    assert pasted("bash", "samft check --data_root DATASET\n").split()[-1] == "runs/demo-data"
    assert pasted("bash", "bash launch.sh --data_root DATASET \\\n  --x\n").count("--steps 2") == 1
    page.write_text("```bash\nfalse\n```\n```bash\necho behind it\n```\n")
    with pytest.raises(AssertionError) as failure:
        follow(page, tmp_path)
    assert "+ false" in str(failure.value) and "behind it" not in str(failure.value)
