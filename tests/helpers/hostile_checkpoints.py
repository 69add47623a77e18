"""Checkpoints as strangers, cut cables and bad disks make them; and opening one in a child."""

import io
import json
import os
import pickle
import random
import resource
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from helpers.preloaded import preloading_context, use_default_start_method
from samft.cli import run_command
from samft.models.sam import open_checkpoint
from samft.weights.huggingface_names import to_huggingface_names

State = dict[str, Tensor]
CPU_SECONDS = 10
Maker = Callable[[random.Random, State, Path], Path]

# Whole files of each format, which faults are then done to


def as_torch(content: Any, **options: Any) -> bytes:
    """The bytes of `torch.save`."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def as_legacy(content: Any) -> bytes:
    """The bytes of `torch.save` before it wrote zip files."""
    return as_torch(content, _use_new_zipfile_serialization=False)


def with_pickle(pickled: bytes, *, compress: bool = False) -> bytes:
    """A zip file of torch whose objects are this pickle, beside one storage of eight bytes."""
    entries = {
        "archive/data.pkl": pickled,
        "archive/byteorder": b"little",
        "archive/data/0": bytes(8),
        "archive/version": b"3\n",
    }
    return as_zip(entries, compress=compress)


def as_zip(entries: dict[str, bytes], *, compress: bool = False) -> bytes:
    """A zip file."""
    file = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


# Pickles by hand, of opcodes that torch reads


def pickled_text(text: str) -> bytes:
    """A string."""
    content = text.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def pickled_int(number: int) -> bytes:
    """A whole number of any size."""
    content = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def pickled_call(name: str, *arguments: bytes) -> bytes:
    """A call of `module function`."""
    module, _, function = name.rpartition(".")
    return b"c" + f"{module}\n{function}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def pickled_tensor(numel: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A tensor over storage 0, which claims to have `numel` values."""
    storage = pickled_text("storage") + b"ctorch\nFloatStorage\n" + pickled_text("0")
    storage = b"(" + storage + pickled_text("cpu") + pickled_int(numel) + b"tQ"
    sizes, strides = (b"(" + b"".join(map(pickled_int, one)) + b"t" for one in (shape, stride))
    hooks = b"ccollections\nOrderedDict\n)R"
    return pickled_call(
        "torch._utils._rebuild_tensor_v2", storage, b"K\0", sizes, strides, b"\x89", hooks
    )


def pickled_state(value: bytes, name: str = "image_encoder.pos_embed") -> bytes:
    """A state dict of one entry."""
    return b"\x80\x02}" + pickled_text(name) + value + b"s."


# Faults of the bytes of a whole file


def flip(content: bytes, rng: random.Random) -> bytes:
    """One bit to eight."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(content: bytes, rng: random.Random) -> bytes:
    """Only its beginning."""
    return content[: rng.randrange(len(content))]


def blank(content: bytes, rng: random.Random) -> bytes:
    """Zeros in a range, as on a disk that lost a block."""
    start, length = rng.randrange(len(content)), rng.randint(1, len(content) // 2)
    return content[:start] + bytes(len(content[start : start + length])) + content[start + length :]


def cut_out(content: bytes, rng: random.Random) -> bytes:
    """Without a range."""
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.randint(1, 5000) :]


def insert(content: bytes, rng: random.Random) -> bytes:
    """With garbage in between."""
    start = rng.randrange(len(content))
    return content[:start] + rng.randbytes(rng.randint(1, 5000)) + content[start:]


FAULTS = (flip, truncate, blank, cut_out, insert)


def _damaged(rng: random.Random, state: State, folder: Path) -> Path:
    whole = rng.choice([as_torch(state), as_torch({"model": state}), as_legacy(state), save(state)])
    return _write_file(folder, rng.choice(FAULTS)(whole, rng))


def _damaged_head(rng: random.Random, state: State, folder: Path) -> Path:
    # Where the structure is, rather than the weights.
    whole = rng.choice([as_torch(state), as_legacy(state), save(state)])
    length = min(len(whole), 60_000)
    return _write_file(folder, rng.choice(FAULTS)(whole[:length], rng) + whole[length:])


def _garbage(rng: random.Random, state: State, folder: Path) -> Path:
    heads = [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x02}", (90).to_bytes(8, "little") + b"{", b"<"]
    return _write_file(folder, rng.choice(heads) + rng.randbytes(rng.randint(0, 20_000)))


# Lies about sizes, and bombs

VAST = 10**12
_LIES: dict[str, Callable[[], bytes]] = {
    "storage": lambda: with_pickle(pickled_state(pickled_tensor(VAST, (VAST,), (1,)))),
    "storage of 8 GB": lambda: with_pickle(pickled_state(pickled_tensor(2 * 10**9, (1,), (1,)))),
    "shape": lambda: with_pickle(pickled_state(pickled_tensor(2, (VAST,), (1,)))),
    "strides": lambda: with_pickle(
        pickled_state(pickled_tensor(2, (1, 10**5, 10**5, 128), (0, 0, 0, 0)))
    ),
    "negative": lambda: with_pickle(pickled_state(pickled_tensor(2, (-1,), (1,)))),
    "overflow": lambda: with_pickle(pickled_state(pickled_tensor(2, (2**62, 4), (0, 0)))),
    "bytearray": lambda: with_pickle(
        pickled_state(pickled_call("builtins.bytearray", pickled_int(2 * 10**9)))
    ),
    "tensor by its class": lambda: with_pickle(
        pickled_state(pickled_call("torch.Tensor", *[pickled_int(10**4)] * 3))
    ),
    "small tensor by its class": lambda: with_pickle(
        pickled_state(pickled_call("torch.Tensor", *map(pickled_int, (1, 4, 4, 128))))
    ),
    "NumPy array": lambda: with_pickle(
        pickled_state(
            pickled_call(
                "numpy._core.multiarray._reconstruct",
                b"cnumpy\nndarray\n",
                b"(" + pickled_int(VAST) + b"t",
                pickled_text("f8"),
            )
        )
    ),
    "wrapper": lambda: with_pickle(
        pickled_state(
            pickled_call(
                "torch._utils._rebuild_wrapper_subclass",
                b"ctorch\nTensor\n",
                b"ctorch\nfloat32\n",
                *[b"(" + b"".join(map(pickled_int, one)) + b"t" for one in ((1, 4, 4, 128), (1,))],
                pickled_int(0),
                b"N" + pickled_call("torch.device", pickled_text("cpu")) + b"\x89",
            )
        )
    ),
    "lists in lists": lambda: with_pickle(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."),
    "dicts in dicts": lambda: with_pickle(
        b"\x80\x02" + (b"}" + pickled_text("a")) * 10**4 + b"}" + b"s" * 10**4 + b"."
    ),
    "tuples in tuples as a key": lambda: with_pickle(b"\x80\x02})" + b"\x85" * 10**5 + b"Ns."),
    "largest model": lambda: as_torch({"image_encoder.pos_embed": torch.zeros(1, 4, 4, 1280)}),
    "itself": lambda: with_pickle(b"\x80\x02}q\0" + pickled_text("model") + b"h\0s."),
    "doubling": lambda: with_pickle(
        b"\x80\x02}q\0" + b"".join(_two_of(level) for level in range(1, 30)) + b"."
    ),
    "many objects": lambda: with_pickle(b"\x80\x02]" + b"(" + b"}" * (20 << 20) + b"e."),
    "few bytes, many objects": lambda: with_pickle(
        b"\x80\x02]" + b"(" + b"}" * (20 << 20) + b"e.", compress=True
    ),
    "zip bomb": lambda: as_zip(
        {"archive/data.pkl": pickled_state(b"N"), "archive/data/0": bytes(600 << 20)},
        compress=True,
    ),
    "safetensors": lambda: _safetensors({"image_encoder.pos_embed": _header((VAST,), (0, 4))}),
    "safetensors that overflows": lambda: _safetensors(
        {"image_encoder.pos_embed": _header((2**62, 2**62), (0, 4))}
    ),
    "safetensors that overlaps": lambda: _safetensors(
        {"image_encoder.pos_embed": _header((1,), (0, 4)), "b": _header((1,), (0, 4))}
    ),
    "safetensors of no dtype": lambda: _safetensors(
        {"image_encoder.pos_embed": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}}
    ),
    "safetensors header": lambda: (99_000_000).to_bytes(8, "little") + b"{" + b" " * 1000,
    "legacy storage": lambda: _legacy_lie(VAST),
    "legacy storage of 8 GB": lambda: _legacy_lie(2 * 10**9),
}


def _two_of(level: int) -> bytes:
    # A dict that holds the one before it twice.
    last = b"h" + bytes([level - 1]) + b"s"
    return b"}" + pickled_text("a") + last + pickled_text("b") + last + b"q" + bytes([level])


def _header(shape: tuple[int, ...], offsets: tuple[int, int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


def _safetensors(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4)


def _legacy_lie(numel: int) -> bytes:
    whole = as_legacy({"image_encoder.pos_embed": torch.zeros(77)})
    claim = pickle.dumps(77, protocol=2)[2:-1]
    return whole.replace(claim, pickled_int(numel), 1)


def _lie(rng: random.Random, state: State, folder: Path) -> Path:
    return _write_file(folder, _LIES[rng.choice(sorted(_LIES))]())


# Whole files of odd content


def _odd_tensor(rng: random.Random, state: State, folder: Path) -> Path:
    name = rng.choice(sorted(state))
    tensor = state[name]
    odd = rng.choice(
        [
            lambda: tensor.to_sparse(),
            lambda: tensor.to("meta"),
            lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
            lambda: tensor.long(),
            lambda: tensor.to(torch.complex64),
            lambda: tensor.double(),
            lambda: tensor.half(),
            lambda: tensor * float("nan"),
            lambda: tensor / 0,
            lambda: tensor[:0],
            lambda: tensor.sum(),
            lambda: tensor[None],
            lambda: torch.zeros(()).expand(10**6, 10**6),
            lambda: torch.zeros(()).expand(tensor.shape),
            lambda: state[rng.choice(sorted(state))],
            lambda: tensor.tolist(),
            lambda: None,
        ]
    )()
    return _write_file(folder, rng.choice([as_torch, as_legacy])({**state, name: odd}))


def _odd_names(rng: random.Random, state: State, folder: Path) -> Path:
    names = sorted(state)
    some = rng.sample(names, rng.randint(1, 5))
    odd = rng.choice(
        [
            lambda: {name: state[name] for name in names if name not in some},
            lambda: {**state, **{f"{name}\n\x1b[2J": state[name] for name in some}},
            lambda: {**state, rng.choice([3, None, (1, 2), b"a", 2.5]): state[some[0]]},
            lambda: {"a": state, "b": {"c": dict(state)}},
            lambda: {f"module.{name}": tensor for name, tensor in state.items()} | state,
            lambda: {"model": list(state.values())},
            lambda: {f"{number}": {"epoch": number} for number in range(5000)} | {"net": state},
            lambda: {f"image_encoder.blocks.{k}.norm1.weight": state[some[0]] for k in range(9999)},
        ]
    )()
    return _write_file(folder, as_torch(odd))


def _odd_folder(rng: random.Random, state: State, folder: Path) -> Path:
    place = folder / "folder"
    place.mkdir()
    names = to_huggingface_names(state)
    index = place / "model.safetensors.index.json"
    kind = rng.randrange(6)
    if kind == 0:
        _write_file(place, FAULTS[1](save(names), rng), "model.safetensors")
    elif kind == 1:
        _write_file(place, rng.randbytes(3000), "pytorch_model.bin")
    elif kind == 2:
        index.write_text(json.dumps({"weight_map": {"a": index.name}}))
    elif kind == 3:
        index.write_text(json.dumps({"weight_map": {"a": "../../../etc/passwd"}}))
    elif kind == 4:
        index.write_text("[" * 100_000)
    else:
        (place / "model.safetensors").mkdir()
    return place


MAKERS: tuple[tuple[Maker, int], ...] = (
    (_damaged, 20),
    (_damaged_head, 20),
    (_garbage, 8),
    (_lie, 26),
    (_odd_tensor, 12),
    (_odd_names, 8),
    (_odd_folder, 6),
)


def make_hostile(number: int, state: State, folder: Path) -> Path:
    """Makes one of 100 checkpoints: the same for the same number."""
    rng = random.Random(number)
    kinds = [maker for maker, count in MAKERS for _ in range(count)]
    if kinds[number] is _lie:  # each of them once
        first = kinds.index(_lie)
        return _write_file(folder, _LIES[sorted(_LIES)[number - first]]())
    return kinds[number](rng, state, folder)


def _write_file(folder: Path, content: bytes, name: str = "a.pth") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


# Opening one


def open_in_child(path: Path, folder: Path, timeout: float) -> tuple[int | None, str, int]:
    """Opens a checkpoint as commands do.

    Returns:
        The exit code (negative: a signal, as of too much time), what it wrote, and by how many
        bytes its memory grew.
    """
    output, growth = folder / "output", folder / "growth"
    child = preloading_context().Process(target=_open, args=(str(path), str(output), str(growth)))
    child.start()
    child.join(timeout)
    child.kill()
    child.join()
    grown = int(growth.read_text()) if growth.exists() else 0
    return child.exitcode, output.read_text(errors="replace"), grown


def _open(path: str, output: str, growth: str) -> None:
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    use_default_start_method()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = run_command(lambda argv: open_checkpoint(Path(argv[0])), [path])
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Path(growth).write_text(str((after - before) * 1024))
    sys.stderr.flush()
    os._exit(code)
