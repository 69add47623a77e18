"""Reads a checkpoint file of any format, and says of a file that is none what it is."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from samft.errors import CheckpointError
from samft.runtime.checkpoint_paths import INDEX_SUFFIX
from samft.weights.pickled_files import load_torch_file

_HEAD_BYTES = 512
_MAX_HEADER_BYTES = 100_000_000  # Source: safetensors' own limit
_MAX_INDEX_BYTES = 16 << 20
_LFS = b"version https://git-lfs.github.com"
# Where the first bytes tell what a file is: its offset there, the bytes, and a sentence.
_SIGNATURES = (
    (0, _LFS, "a Git LFS pointer, not the file itself: fetch that with `git lfs pull`"),
    (0, b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (0, b"\xfd7zXZ", "compressed with xz: unpack it first"),
    (0, b"BZh", "compressed with bzip2: unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first"),
    (0, b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (0, b"Rar!", "a RAR archive: unpack it first"),
    (257, b"ustar", "a tar archive: unpack it, and give the checkpoint in it"),
    (0, b"\x89HDF", "an HDF5 file, as Keras writes it: samft reads weights of PyTorch"),
    (0, b"\x93NUMPY", "a NumPy array: samft reads weights of PyTorch"),
    (0, b"GGUF", "a GGUF file: samft reads weights of PyTorch"),
    (0, b"\x89PNG", "a picture"),
    (0, b"\xff\xd8\xff", "a picture"),
    (0, b"II*\0", "a picture"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\x7fELF", "a program"),
    (4, b"TFL3", "a TensorFlow Lite model: samft reads weights of PyTorch"),
)


@dataclass(frozen=True)
class CheckpointContent:
    """What a checkpoint holds.

    Attributes:
        content: Tensors in plain containers, as they were saved.
        num_bytes: Size of its files.
        metadata: Of a safetensors file; else empty.
    """

    content: Any
    num_bytes: int
    metadata: dict[str, str]


def read_checkpoint_file(path: Path) -> CheckpointContent:
    """Reads a file of `torch.save` or safetensors, or all files that an index names.

    Args:
        path: See `find_weights_file`.

    Raises:
        CheckpointError: It cannot be read; the message says what it is, and what to do.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        num_bytes = path.stat().st_size
        if path.name.endswith(INDEX_SUFFIX) and head.lstrip().startswith(b"{"):
            return _read_parts(path)
        if _is_safetensors(head):
            return CheckpointContent(*_read_safetensors(path, num_bytes))
        is_torch = head.startswith((b"PK\x03\x04", b"\x80"))
        what = _describe_archive(path) if zipfile.is_zipfile(path) else None
        what = what or (None if is_torch else _describe_content(head, path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    if what is not None:
        raise CheckpointError(f"{path} is not a readable checkpoint: it is {what}.")
    return CheckpointContent(load_torch_file(path), num_bytes, {})


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for a file of any other format."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def _is_safetensors(head: bytes) -> bool:
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 2 <= length <= _MAX_HEADER_BYTES


def _read_safetensors(path: Path, num_bytes: int) -> tuple[Any, int, dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, num_bytes, dict(file.metadata() or {})
    except (SafetensorError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a readable checkpoint: its header does not fit its content ({error}), "
            "so it is damaged or cut short. Fetch or copy it again."
        ) from error


def _read_parts(index: Path) -> CheckpointContent:
    tensors: dict[str, Any] = {}
    num_bytes = 0
    for name in _names_of_parts(index):
        part = index.with_name(name)
        if not part.is_file():
            raise CheckpointError(f"{index} names {name}, which is not beside it: fetch that too.")
        read = read_checkpoint_file(part)
        if not isinstance(read.content, dict):
            raise CheckpointError(f"{part} holds no dict of tensors.")
        tensors.update(read.content)
        num_bytes += read.num_bytes
    return CheckpointContent(tensors, num_bytes, {})


def _names_of_parts(index: Path) -> list[str]:
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError("it is far too large")
        names = sorted(
            {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of a model's files ({error}).") from error
    for name in names:
        # Only files beside the index: it must not lead to any other of the user's files.
        if Path(name).name != name or name.endswith(INDEX_SUFFIX):
            raise CheckpointError(f"{index} names {name!r}, which is no file beside it.")
    return names


def _describe_archive(path: Path) -> str | None:
    # A zip file that torch.save did not write.
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return None  # torch says what is wrong with it
    last = {name.split("/")[-1] for name in names}
    if "constants.pkl" in last or any("/code/" in name for name in names):
        return (
            "a TorchScript program: samft needs weights. Save them where it was made: "
            "torch.save(model.state_dict(), 'weights.pth')"
        )
    if "data.pkl" in last:
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive: samft reads weights of PyTorch"
    checkpoints = [name for name in names if name.endswith((".pth", ".pt", ".ckpt"))]
    if checkpoints:
        return f"a zip archive that holds {checkpoints[0]}: unpack it first"
    first = f", with {names[0]}" if names else ""
    return f"a zip archive that torch.save did not write{first}"


def _describe_content(head: bytes, path: Path) -> str:
    if not head:
        return "empty. Its download was cut short, or the disk was full: fetch or copy it again"
    for offset, signature, what in _SIGNATURES:
        if head[offset:].startswith(signature):
            return what
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<")):
        return (
            "a web page (HTML), not a file of weights: the address that it came from asks for a "
            "login or a click, or does not exist. Fetch it in a browser"
        )
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and (b"pytorch" in head or b"onnx" in head)):
        return (
            "an ONNX file, which holds a computation: samft needs the checkpoint that it was "
            "exported from"
        )
    if not head.strip(b"\0"):
        return "zeros at its beginning: its download was cut short. Fetch or copy it again"
    if text.startswith((b"{", b"[")):
        return "JSON text, not weights; of a sidecar, give the .ckpt beside it"
    if head.isascii() and head.decode().isprintable() or text[:60].isalnum():
        return "text, not weights"
    return (
        "damaged or cut short, or of no format that samft knows: it reads files of torch.save and "
        "safetensors. Fetch or copy it again"
    )
