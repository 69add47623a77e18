"""`torchmetrics.Metric` is imported alone, and torchmetrics is whole for everybody else."""

import subprocess
import sys
from pathlib import Path

from helpers import REPOSITORY


def run_python(source: str, *folders: Path) -> str:
    path = ":".join(map(str, (*folders, REPOSITORY)))
    ended = subprocess.run(
        [sys.executable, "-c", source], env={"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


WHOLE = """
import pickle, sys
from samft.evaluation.metrics import PerMaskIoU
light = {"torchmetrics.functional", "torchmetrics.classification", "transformers"}
assert not light & sys.modules.keys()
import torch, torchmetrics
mean = pickle.loads(pickle.dumps(PerMaskIoU()))
mean.update(torch.tensor([0.25, 0.75]))
assert isinstance(mean, torchmetrics.Metric) and "torchmetrics.functional" in sys.modules
from torchmetrics import Accuracy, MeanMetric
from torchmetrics.classification import BinaryJaccardIndex
collection = torchmetrics.MetricCollection({"iou": mean, "mean": MeanMetric()})
assert issubclass(BinaryJaccardIndex, torchmetrics.metric.Metric)
print(torchmetrics.__version__, type(torchmetrics).__name__, float(mean.compute()))
"""


def test_the_package_is_run_once_something_else_of_it_is_wanted() -> None:
    import torchmetrics

    assert run_python(WHOLE).split() == [torchmetrics.__version__, "module", "0.5"]


def test_a_package_that_is_imported_already_is_used() -> None:
    compat = "import samft.runtime.torchvision_compat, torchmetrics"
    source = f"{compat}; from samft.evaluation.metric_base import Metric as M"
    assert run_python(f"{source}\nprint(M is torchmetrics.Metric)") == "True\n"


def test_a_version_that_is_laid_out_otherwise_is_imported_whole(tmp_path: Path) -> None:
    package = tmp_path / "torchmetrics"
    package.mkdir()
    (package / "__init__.py").write_text("from torchmetrics.metric import Metric\nwhole = 1\n")
    (package / "metric.py").write_text("class Metric: ...\n")
    source = "from samft.evaluation.metric_base import Metric; import torchmetrics as t"
    printed = run_python(f"{source}\nprint(t.Metric is Metric, t.whole, t.__file__)", tmp_path)
    assert printed.split() == ["True", "1", str(package / "__init__.py")]
