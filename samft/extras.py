"""Packages that only some commands need, and the extras that bring them. Imports no torch."""

from importlib.util import find_spec

from samft.errors import ConfigError

EXTRAS = {
    "safetensors": ("safetensors",),
    "onnx": ("onnx", "onnxruntime"),
    "huggingface": ("safetensors", "transformers"),
}


def require_extra(extra: str, *, what: str) -> None:
    """Makes sure that an extra's packages are installed, without importing them.

    Args:
        extra: A key of `EXTRAS`, which is what `setup.cfg` calls it.
        what: What needs them, for the error.

    Raises:
        ConfigError: Some are missing; the command that installs them is named.
    """
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{what} needs {' and '.join(missing)}, which this Python does not have: "
            f"pip install 'samft[{extra}]'."
        )
