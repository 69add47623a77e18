"""examples/tune_on_your_data.ipynb: its form, its first cell where samft is missing, and a run."""

import json
import os
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from helpers import REPOSITORY
from helpers.environments import OFFLINE, copy_clone, make_environment, run, shrink_clone

NOTEBOOK = REPOSITORY / "examples" / "tune_on_your_data.ipynb"
# Smaller than what a reader gets, and on the CPU.
FLAGS = "--image_size 64 --batch_size 2 --steps 4 --metrics_interval 2 --num_workers 0 --device cpu"


def read_cells() -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
    return cells


def source_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_it_is_short_and_holds_no_output() -> None:
    cells = read_cells()
    assert 10 <= len(cells) <= 14
    for cell in cells:
        assert cell["cell_type"] in ("markdown", "code") and cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, source_of(cell)
        else:
            text = re.sub(r"^#.*$|`[^`]*`", "", source_of(cell), flags=re.M).strip()
            assert 1 <= len(re.findall(r"[.](?:\s|$)", text)) <= 4, text
    assert json.loads(NOTEBOOK.read_text())["metadata"]["language_info"] == {"name": "python"}


def test_its_links_and_the_links_to_it_lead_somewhere() -> None:
    for name in ("README.md", "docs/getting_started.md"):
        assert "examples/tune_on_your_data.ipynb" in (REPOSITORY / name).read_text()
    text = "".join(source_of(cell) for cell in read_cells())
    pages = re.findall(r"docs/\w+\.md", text)
    assert len(pages) > 3 and all((REPOSITORY / page).is_file() for page in pages)


def execute(cells: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Runs cells in a kernel of this Python; returns their outputs, in order."""
    nbclient = pytest.importorskip("nbclient", reason="pip install '.[dev]'")
    pytest.importorskip("ipykernel", reason="pip install '.[dev]'")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.from_dict({**json.loads(NOTEBOOK.read_text()), "cells": cells})
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=240, resources=resources).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


@pytest.fixture
def kernel_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for a kernel in which samft is as it is here, and the person's settings are not."""
    (tmp_path / "clone").mkdir()
    clone = copy_clone(REPOSITORY, tmp_path / "clone")
    shrink_clone(clone)
    path = os.pathsep.join([str(clone), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path.rstrip(os.pathsep))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    (tmp_path / "my work").mkdir()  # with a space, as in paths of Google Drive
    return tmp_path / "my work"


def pictures(outputs: list[dict[str, Any]]) -> list[np.ndarray]:
    """The pictures that are shown, decoded."""
    import base64

    shown = []
    for output in outputs:
        for kind, data in output.get("data", {}).items():
            if kind.startswith("image/"):
                encoded = np.frombuffer(base64.b64decode(data), np.uint8)
                shown.append(cv2.imdecode(encoded, cv2.IMREAD_COLOR))
    return shown


def replaced(cells: list[dict[str, Any]], pattern: str, line: str) -> list[dict[str, Any]]:
    """The cells with one line of one of them replaced."""
    texts = [source_of(cell) for cell in cells]
    assert sum(len(re.findall(pattern, text, flags=re.M)) for text in texts) == 1
    new = [re.sub(pattern, lambda _: line, text, flags=re.M) for text in texts]
    return [{**cell, "source": text} for cell, text in zip(cells, new, strict=True)]


@pytest.mark.processes
@pytest.mark.timeout(600)
def test_it_runs_from_end_to_end(kernel_folder: Path) -> None:
    cells = replaced(read_cells(), "^FLAGS = .*$", f'FLAGS = "{FLAGS}"')
    outputs = execute(cells, kernel_folder)
    text = "".join(output.get("text", "") for output in outputs)
    assert text.startswith("samft ")
    assert re.search(r"IoU 0\.\d{3} before, 0\.\d{3} after", text)
    assert "tuned.pth" in text
    shown = pictures(outputs)
    assert len(shown) == 4 and all(picture.std() > 10 for picture in shown)
    run_folder = kernel_folder / "runs" / "notebook"
    assert (run_folder / "tuned.pth").stat().st_size > 1e6
    dataset = COCO(str(run_folder / "predictions" / "dataset.json"))
    masks = [dataset.annToMask(one) for one in dataset.loadAnns(dataset.getAnnIds())]
    assert len(masks) > 20 and all(mask.any() for mask in masks)


@pytest.mark.processes
def test_a_command_that_fails_ends_the_run(kernel_folder: Path) -> None:
    cells = replaced(read_cells(), '^DATASET = ""$', 'DATASET = "no data"')
    nbclient = pytest.importorskip("nbclient", reason="pip install '.[dev]'")
    with pytest.raises(nbclient.exceptions.CellExecutionError) as failure:
        execute(cells, kernel_folder)
    assert "exit code 2" in str(failure.value) and "check --data_root" in str(failure.value)
    assert not (kernel_folder / "runs").exists()


@pytest.mark.processes
def test_an_interrupted_cell_saves_and_goes_on(kernel_folder: Path) -> None:
    manager_of = pytest.importorskip("jupyter_client.manager", reason="pip install '.[dev]'")
    pytest.importorskip("ipykernel", reason="pip install '.[dev]'")
    flags = FLAGS.replace("--steps 4", "--steps 100000")
    sources = [c["source"] for c in replaced(read_cells(), "^FLAGS = .*$", f'FLAGS = "{flags}"')]
    (train,) = (source for source in sources if source.startswith("%samft train"))
    manager, client = manager_of.start_new_kernel(cwd=str(kernel_folder))
    try:
        for source in sources[1:4:2]:
            assert client.execute_interactive(source)["content"]["status"] == "ok"
        shown: list[str] = []

        def interrupt_at_a_step(message: dict[str, Any]) -> None:
            shown.append(message["content"].get("text", ""))
            if " step 2/" in shown[-1]:
                manager.interrupt_kernel()

        ended = client.execute_interactive(train, output_hook=interrupt_at_a_step, timeout=240)
        assert ended["content"]["ename"] == "KeyboardInterrupt", shown
        status = json.loads((kernel_folder / "runs" / "notebook" / "status.json").read_text())
        assert (status["state"], status["exit_code"]) == ("preempted", 75)
        code = "%samft train --help"  # the kernel is as before
        ended = client.execute_interactive(code, output_hook=lambda message: None)
        assert ended["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def make_colab(folder: Path) -> tuple[Path, Path]:
    """An environment as on Colab, without samft; its Python, and the folder of its packages."""
    bin = make_environment(folder / "env")
    (packages,) = (folder / "env").glob("lib/python3*/site-packages")
    (packages / "google" / "colab").mkdir(parents=True)
    (packages / "google" / "colab" / "__init__.py").write_text('"""Pretends to be Colab."""\n')
    return bin / "python", packages


@pytest.mark.processes
def test_the_first_cell_installs_samft_on_colab_and_keeps_its_torch(tmp_path: Path) -> None:
    pytest.importorskip("IPython", reason="pip install '.[dev]'")
    python, packages = make_colab(tmp_path)
    content = tmp_path / "content"
    content.mkdir()
    variables = {**OFFLINE, "HOME": str(tmp_path)}
    first = replaced(read_cells(), '^REPOSITORY = ""', f"REPOSITORY = {str(REPOSITORY)!r}")[1]
    cell, unset = content / "cell.ipy", content / "unset.ipy"
    cell.write_text(
        first["source"] + "\nimport google.colab, samft, torch\nprint(samft.__file__)\n"
    )
    unset.write_text(source_of(read_cells()[1]))

    with pytest.raises(AssertionError, match="set REPOSITORY above"):
        run(python, "-m", "IPython", unset, cwd=content, **variables)
    versions = "from importlib.metadata import version as v; print(v('torch'), v('torchvision'))"
    before = run(python, "-c", versions, cwd=content, **variables)
    printed = run(python, "-m", "IPython", cell, cwd=content, **variables)
    assert str(packages / "samft" / "__init__.py") in printed
    assert run(python, "-c", versions, cwd=content, **variables) == before
    assert not [path.name for path in packages.glob("torch*")]
    kept = (content / "kept.txt").read_text().split()
    assert sorted(line.split("==")[0] for line in kept) == ["numpy", "torch", "torchvision"]

    # Where samft is installed it does nothing, whatever REPOSITORY is.
    again = run(python, "-m", "IPython", unset, cwd=content, **variables)
    assert again.startswith("samft ") and "clone" not in again


@pytest.mark.processes
def test_the_first_cell_refuses_a_torch_that_is_too_old(tmp_path: Path) -> None:
    pytest.importorskip("IPython", reason="pip install '.[dev]'")
    python, packages = make_colab(tmp_path)
    old = packages / "torch-2.9.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.0\n")
    cell = tmp_path / "cell.ipy"
    first = replaced(read_cells(), '^REPOSITORY = ""', f"REPOSITORY = {str(REPOSITORY)!r}")[1]
    cell.write_text(first["source"])
    with pytest.raises(AssertionError, match=r"samft 0\.\d\.\d depends on torch>=2\.10"):
        run(python, "-m", "IPython", cell, cwd=tmp_path, **OFFLINE, HOME=str(tmp_path))
    assert old.is_dir() and not (packages / "samft").exists()
