"""`torchmetrics.Metric`, imported without the hundred metrics beside it.

`import torchmetrics` runs its whole package, and what is installed of `transformers`, SciPy and
others: about a second before each run and evaluation, for one class. Its package module is made
here without being run, so that its submodules can be imported. As soon as anything is asked of it
that no submodule has set, by whichever program, it is run as usual: nothing else differs.
"""

import logging
import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import samft.runtime.torchvision_compat  # noqa: F401  (torchmetrics imports torchvision)

_NAME = "torchmetrics"


class _UnrunPackage(ModuleType):
    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        assert spec is not None and spec.loader is not None
        ModuleType.__setattr__(self, "__class__", ModuleType)
        spec.loader.exec_module(self)
        return getattr(self, name)


def import_metric() -> type:
    """Imports `torchmetrics.Metric`, alone if that is how this version can be imported."""
    spec = find_spec(_NAME)
    if spec is None or _NAME in sys.modules:
        return import_module(_NAME).Metric
    package = module_from_spec(spec)
    vars(package)["_logger"] = logging.getLogger(_NAME)  # what its submodules take of it
    ModuleType.__setattr__(package, "__class__", _UnrunPackage)
    sys.modules[_NAME] = package
    try:
        import_module(f"{_NAME}.utilities")  # `metric` alone would import itself by way of this
        return import_module(f"{_NAME}.metric").Metric
    except (ImportError, AttributeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == _NAME]:
            del sys.modules[name]
        return import_module(_NAME).Metric


if TYPE_CHECKING:
    from torchmetrics import Metric as Metric
else:
    Metric = import_metric()
