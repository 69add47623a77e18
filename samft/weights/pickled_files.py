"""Loads files of `torch.save` that may hold other things than weights, without running anything.

Training programs save more than weights: their arguments, a score as a NumPy scalar, a date. These
are of no use here, so classes of an explicit list are replaced by ones that take anything and do
nothing; not even NumPy gets to see what a stranger's file holds. All else is refused by name.
"""

import mmap
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from samft.errors import CheckpointError

# A checkpoint of 2.5 GB has 100 kB of Python objects beside its tensors. One byte of a pickle can
# make an object of 64 bytes.
_MAX_PICKLE_BYTES = 8 << 20
# What a checkpoint may take up in memory, relative to its size on the disk, and in bytes.
_MAX_EXPANSION, _SLACK_BYTES = 2, 64 << 20

_UNUSED_CLASSES = """
argparse.Namespace types.SimpleNamespace copyreg._reconstructor builtins.object
builtins.frozenset builtins.slice builtins.range functools.partial
datetime.date datetime.datetime datetime.time datetime.timedelta datetime.timezone
decimal.Decimal fractions.Fraction uuid.UUID
pathlib.Path pathlib.PosixPath pathlib.WindowsPath
pathlib.PurePath pathlib.PurePosixPath pathlib.PureWindowsPath
pathlib._local.Path pathlib._local.PosixPath pathlib._local.WindowsPath
pathlib._local.PurePath pathlib._local.PurePosixPath pathlib._local.PureWindowsPath
numpy.ndarray numpy.dtype numpy.bool_ numpy.bool numpy.float16 numpy.float32 numpy.float64
numpy.int8 numpy.int16 numpy.int32 numpy.int64 numpy.longlong numpy.ulonglong
numpy.uint8 numpy.uint16 numpy.uint32 numpy.uint64 numpy.str_ numpy.bytes_ numpy.datetime64
numpy.core.multiarray.scalar numpy._core.multiarray.scalar
numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct
numpy.random._pickle.__randomstate_ctor numpy.random._pickle.__generator_ctor
numpy.random._pickle.__bit_generator_ctor numpy.random._mt19937.MT19937
numpy.random._pcg64.PCG64 numpy.random.bit_generator.SeedSequence
numpy.random.bit_generator.__pyx_unpickle_SeedSequence
torch.torch_version.TorchVersion torch.Generator
omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig
omegaconf.base.Metadata omegaconf.base.ContainerMetadata omegaconf.base.SCMode
omegaconf.nodes.AnyNode omegaconf.nodes.StringNode omegaconf.nodes.IntegerNode
omegaconf.nodes.FloatNode omegaconf.nodes.BooleanNode omegaconf.nodes.PathNode
typing.Any builtins.int builtins.str builtins.float builtins.bool builtins.list builtins.tuple
pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint
lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint
""".split()
# Mappings, whose items torch sets in plain dictionaries only.
_MAPPINGS = """
builtins.dict collections.defaultdict
pytorch_lightning.utilities.parsing.AttributeDict
lightning.pytorch.utilities.parsing.AttributeDict
lightning.fabric.utilities.data.AttributeDict lightning_fabric.utilities.data.AttributeDict
""".split()


class Unused:
    """Stands for an object of one of the classes of the list; the name tells of which."""

    def __new__(cls, *args: Any, **options: Any) -> "Unused":
        """Takes the arguments of any class."""
        return object.__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None:
        """Keeps nothing."""

    def __setstate__(self, state: Any) -> None:
        """Keeps nothing."""


class _PlainDict:
    def __new__(cls, *args: Any) -> Any:
        return {}


class _PlainList:
    def __new__(cls, *args: Any) -> Any:
        return []


_ALLOWED: list[Any] = [
    *((type(name, (Unused,), {}), name) for name in _UNUSED_CLASSES),
    *((_PlainDict, name) for name in _MAPPINGS),
    (_PlainList, "collections.deque"),
]


def load_torch_file(path: Path) -> Any:
    """Loads what `torch.save` wrote, in its zip format or the older one.

    Args:
        path: The file.

    Returns:
        Tensors on the CPU in plain containers; in place of other objects an `Unused`.

    Raises:
        CheckpointError: It is damaged, holds what is not on the list, or would take up far more
            memory than it has bytes.
    """
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        else:
            _check_other_file(path)
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals(_ALLOWED),
        ):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises a dozen types for a damaged or hostile file
        raise CheckpointError(
            f"{path} is not a readable checkpoint: {_explain(str(error) or type(error).__name__)}"
        ) from error


def fits_in_memory(num_bytes: int, *, file_bytes: int) -> bool:
    """Whether content of this many bytes can be that of a file, and not a bomb or a lie."""
    return num_bytes <= _MAX_EXPANSION * file_bytes + _SLACK_BYTES


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        pickled = [entry for entry in entries if entry.filename.split("/")[-1] == "data.pkl"]
        total = sum(entry.file_size for entry in entries)
        if not fits_in_memory(total, file_bytes=path.stat().st_size):
            raise _refusal(
                path, f"unpacked, it would be {total:,} bytes: torch.save does not compress."
            )
        for entry in entries:
            if not entry.CRC:  # torch.save may have been told to compute none
                entry.CRC = None  # type: ignore[assignment]
        damaged = archive.testzip()  # torch does not look at them
        if damaged is not None:
            raise _refusal(
                path, f"it is damaged: the checksum of {damaged} is wrong. Fetch or copy it again."
            )
        for entry in pickled:
            if entry.file_size > _MAX_PICKLE_BYTES:
                raise _refusal(
                    path,
                    f"it has {entry.file_size:,} bytes of other objects than tensors, such as "
                    "NumPy arrays: save the weights alone, as tensors "
                    "(torch.save(model.state_dict(), 'weights.pth')).",
                )
            if b"\nbytearray\n" in archive.read(entry):
                raise _refusal(path, _explain_class("builtins.bytearray"))


def _check_other_file(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:4] == b"PK\x03\x04":
            raise _refusal(
                path,
                "it is cut short: the table of contents at its end is missing. Fetch or copy it "
                "again.",
            )
        # Filled with zeros as soon as it is made, a bytearray is the one object that torch allows
        # whose size a file may choose.
        if content.find(b"\nbytearray\n") >= 0:
            raise _refusal(path, _explain_class("builtins.bytearray"))


def _refusal(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a readable checkpoint: {reason}")


def _explain(message: str) -> str:
    match = re.search(r"GLOBAL ([\w.<>]+) (?:was not an allowed|whose module)", message)
    if match:
        return _explain_class(match[1])
    if "recognized function" in message or "new object for" in message or "Can only" in message:
        return (
            f"it builds Python objects in a way that weights do not ({_brief(message)}). Save the "
            "state dict alone where it was made: torch.save(model.state_dict(), 'weights.pth')."
        )
    if "Unsupported operand" in message:
        return (
            "it is pickled in a way that torch loads no weights from, with another pickle_protocol "
            "than 2, say. Save it again where it was made: torch.save(state_dict, 'weights.pth')."
        )
    if re.search("allocate memory|Unable to allocate|overflow", message):
        return "a tensor in it declares more values than fit into memory."
    if re.search("does not match expected size|not resizable|out of bounds", message):
        return "a tensor in it declares more values than its data has, so it is damaged."
    if message.startswith("[Errno 22]"):  # of a seek to before the file's beginning
        message = "its table of contents does not fit it"
    return (
        f"it is damaged or cut short ({_brief(message)}). Fetch or copy it again, and compare its "
        "size and SHA-256 with the source's."
    )


def _brief(message: str) -> str:
    # torch puts paragraphs of advice around the reason.
    text = " ".join(message.rpartition("WeightsUnpickler error:")[2].split())
    return text.split(" Check the documentation")[0].split(". ")[0][:160]


def _explain_class(name: str) -> str:
    package = name.split(".")[0]
    kind = "holds a Python object"
    if package == "ultralytics" or name.startswith("models.yolo"):
        kind = "is a YOLO of Ultralytics, and no SAM, with a Python object"
    elif package == "segment_anything":
        kind = "holds a whole pickled model instead of its weights, with an object"
    return (
        f"it {kind} of the class {name}, which samft does not load, because loading it could run "
        "anything. If it has SAM's weights, save them alone where it was made: "
        "torch.save(model.state_dict(), 'weights.pth')."
    )
