"""Which file holds the weights at a path that a user gave. Imports no torch."""

from pathlib import Path

from samft.errors import CheckpointError

# In the order of preference, as `transformers` writes them; an index names the parts of a model.
HUGGINGFACE_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
INDEX_SUFFIX = ".index.json"
_WEIGHTS_SUFFIXES = (".ckpt", ".pth", ".pt", ".safetensors")


def find_weights_file(path: Path, *, field: str | None = None) -> Path:
    """Finds the file with the weights: the path itself, or one of `transformers` in a folder.

    Args:
        path: A file, a folder that `transformers` wrote, or a model's folder in its cache.
        field: The flag that gave it, for the message.

    Returns:
        The file; where the weights are in several, the index that names them.

    Raises:
        CheckpointError: There is none, or more than one; the message says what to give instead.
    """
    try:
        return _find_file(path)
    except CheckpointError as error:
        raise CheckpointError(f"{field}: {error}") if field else error from None
    except OSError as error:
        text = f"{path} cannot be opened ({error.strerror})."
        raise CheckpointError(f"{field}: {text}" if field else text) from error


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        return _find_in_folder(path)
    if path.exists():
        raise CheckpointError(f"{path} is no ordinary file: give a SAM .pth or .ckpt file.")
    raise CheckpointError(
        f"there is no file {path}: give a SAM .pth, .ckpt or .safetensors file, or a folder of "
        "transformers; summary.json of a run of samft names its best checkpoint."
    )


def _find_in_folder(folder: Path) -> Path:
    snapshots = [one for one in folder.glob("snapshots/*") if _first_present(one) is not None]
    if len(snapshots) > 1:
        shown = ", ".join(sorted(one.name for one in snapshots)[:3])
        raise CheckpointError(f"{folder} holds several snapshots: give one of them ({shown}).")
    file = _first_present(snapshots[0] if snapshots else folder)
    if file is not None:
        return file
    names = {one.name for one in folder.iterdir()}
    if {"data.pkl", "data"} <= names:
        raise CheckpointError(
            f"{folder} is a checkpoint of torch that was unpacked: give the file as it was "
            "downloaded, or pack it again, uncompressed and with this folder's name in it "
            f"(zip -0 -r {folder.name}.pth {folder.name})."
        )
    if ".metadata" in names or "latest" in names:
        raise CheckpointError(
            f"{folder} is a distributed checkpoint: convert it to one file first (of torch: "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch; of DeepSpeed: its "
            "zero_to_fp32.py)."
        )
    files = sorted(name for name in names if Path(name).suffix in _WEIGHTS_SUFFIXES)
    hint = f", such as {files[0]}" if files else ""
    raise CheckpointError(
        f"{folder} is a folder: name a file in it{hint}. A folder of transformers would hold "
        f"{HUGGINGFACE_FILES[0]} or {HUGGINGFACE_FILES[2]}."
    )


def _first_present(folder: Path) -> Path | None:
    paths = (folder / name for name in HUGGINGFACE_FILES)
    return next((path for path in paths if path.is_file()), None)
