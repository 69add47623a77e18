"""The commands and snippets of README.md, CONTRIBUTING.md and docs/ work.

Each page's blocks are run in order in a workspace that has the files which the pages name: a small
dataset, checkpoints of vit_tiny at 64 px, a finished run. `python -m samft...` runs in this
process, as printed, with flags appended that make it small (`SMALL_FLAGS`): the arguments of a
training are parsed as printed first. `launch.sh`, `torchrun` and the SLURM script run nothing: what
they would start is printed, and its arguments are parsed. `make` prints what it would run, and of
`pip install` the extras are looked up.
"""

from pathlib import Path

import pytest

from helpers import REPOSITORY
from helpers.documentation import PAGES, Block, PageError, Runner, read_blocks, read_commands


def blocks_of(page: Path) -> list[Block]:
    return read_blocks(page.read_text(), page=page.relative_to(REPOSITORY).as_posix())


WITH_BLOCKS = [page for page in PAGES if blocks_of(page)]


@pytest.mark.run
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_blocks_of_the_page_work(page: Path, runner: Runner) -> None:
    for block in blocks_of(page):
        runner.run(block)


def test_the_pages_with_most_commands_are_among_them() -> None:
    assert {page.stem for page in WITH_BLOCKS} >= {"README", "training", "export", "many_gpus"}


def test_a_mark_without_a_reason_or_of_another_kind_is_refused() -> None:
    for mark in ("skip", "skip,", "skipped, needs a GPU", "later, maybe"):
        block = Block("page.md", 7, "bash", "make check\n", mark)
        with pytest.raises(PageError, match=f"page.md:7: the mark '{mark}' is not one of"):
            print(block.mode)


PAGE = """
1. First,

   <!-- test: skip, needs a GPU -->
   ```bash
   nvidia-smi
   ```

```
DATASET/train
```

<!-- test: arguments only, takes minutes -->
```bash
python -m samft.train \\
    --steps 3  # few
make check
```

```python
print(1)
```
"""


def test_blocks_are_read_with_their_lines_and_marks() -> None:
    blocks = read_blocks(PAGE, page="page.md")
    assert [(b.line, b.language, b.mode) for b in blocks] == [
        (5, "bash", "skip"),
        (9, "", ""),
        (14, "bash", "arguments only"),
        (20, "python", ""),
    ]
    assert blocks[0].text == "nvidia-smi\n"
    assert read_commands(blocks[2].text) == [
        ["python", "-m", "samft.train", "--steps", "3"],
        ["make", "check"],
    ]
    fences = sum(page.read_text().count("```") for page in PAGES)
    assert fences == 2 * sum(len(blocks_of(page)) for page in PAGES) > 60


# What is spoilt in a page, and what the error says of it: a right version of each is in the pages.
SPOILT = [
    ("bash", "python -m samft.train --data_root DATASET --model_tipe vit_b", "--model_tipe"),
    ("bash", "python -m samft.train --config configs/vit_c.yaml --data_root DATASET", "no file"),
    ("bash", "python -m samft.train --data_root DATASET --model_type vit_b", "checkpoint_path"),
    ("bash", "python -m samft.check --dataroot DATASET", "--dataroot"),
    ("bash", "python -m samft.check --data_root DATASETS", "no dataset folder"),
    (
        "bash",
        "python -m samft.evaluate --checkpoint runs/mine/1500.ckpt --data_root DATASET",
        "1500",
    ),
    ("bash", "python -m samft.score --checkpoint FILE --data_root DATASET", "samft.score"),
    ("bash", "python -m benchmarks.same_numbers --previous main", "--before"),
    ("bash", "bash launch.sh --data_root DATASET --model_typ vit_b", "--model_typ"),
    ("bash", "NNODES=2 bash launch.sh --config configs/vit_b_full.yaml --data_root D", "NODE_RANK"),
    ("bash", "torchrun --nprocs_per_node=8 -m samft.train --data_root DATASET", "nprocs_per_node"),
    ("bash", "torchrun --nproc_per_node=8 -m samft.train --data_rot DATASET", "--data_rot"),
    ("bash", "torchrun --nproc_per_node=8 -m samft.evaluate --data_root DATASET", "--checkpoint"),
    ("bash", "make chek", "chek"),
    ("bash", "pip install 'samft[onyx]'", "no such extra: onyx"),
    ("bash", "pip install -c constraint.txt -e .", "constraint.txt"),
    ("bash", "nvidia-smi", "mark the block"),
    ("bash", "#!/bin/bash\nsrun --nodes=2 bash launch.sh --data_rot D", "--data_rot"),
    ("bash", "#!/bin/bash\nsrun --nodes=2 echo nothing", "exactly one command"),
    ("ini", "[Service]\nExecStart=/bin/bash launch.sh --data_rot D", "--data_rot"),
    ("python", "from samft import load_sams", "ImportError"),
    ("python", "open('runs/mine/sumary.json')", "FileNotFoundError"),
    ("python", "image.shape[:2] +", "SyntaxError"),
    ("yaml", "steps: 3", "no way is known to run a block of yaml"),
    ("", "python -m samft.train --data_root DATASET", "a command in a block without a language"),
]


@pytest.mark.run
def test_a_spoilt_block_is_found(runner: Runner) -> None:
    for language, text, message in SPOILT:
        only_parse = "arguments only, takes minutes" if "benchmarks" in text else ""
        block = Block("page.md", 3, language, text + "\n", only_parse)
        with pytest.raises(PageError, match=r"^page\.md:3: ") as failure:
            runner.run(block)
        assert message in str(failure.value), failure.value


@pytest.mark.run
def test_what_is_marked_is_not_run(runner: Runner) -> None:
    runner.run(Block("page.md", 3, "bash", "nvidia-smi\n", "skip, needs a GPU"))
    assert runner.commands == []
    quick = "python -m benchmarks.same_numbers --before main\n"
    runner.run(Block("page.md", 3, "bash", quick, "arguments only, takes minutes"))
    assert runner.commands == ["python -m benchmarks.same_numbers --before main"]
