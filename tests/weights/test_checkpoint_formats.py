"""Checkpoints as other programs write them: found, translated and said, or refused by name."""

import argparse
import collections
import contextlib
import datetime
import io
import json
import logging
import pathlib
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from samft.errors import CheckpointError
from samft.exporters.huggingface import write_huggingface
from samft.exporters.weight_files import write_safetensors
from samft.models.sam import build_sam, open_checkpoint, read_state
from samft.weights.huggingface_names import to_huggingface_names

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(3)
    return dict(build_sam("vit_tiny", 64).state_dict())


def assert_equal(read: State, expected: State) -> None:
    torch.testing.assert_close(read, expected, rtol=0, atol=0)


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def spoilt(state: State) -> State:
    return {name: tensor + 1 for name, tensor in state.items()}


WRAPPERS: dict[str, tuple[Callable[[State], Any], str]] = {
    "DataParallel": (lambda s: prefixed("module.", s), "'module' taken off"),
    "compiled": (lambda s: prefixed("_orig_mod.", s), "'_orig_mod' taken off"),
    "compiled encoder": (
        lambda s: {k.replace("encoder.", "encoder._orig_mod.", 1): v for k, v in s.items()},
        "'_orig_mod' taken off",
    ),
    "nested": (
        lambda s: {"state_dict": prefixed("module.model.sam._orig_mod.", s)},
        "found under 'state_dict'; 'model.sam' and '_orig_mod' and 'module' taken off",
    ),
    "Lightning": (
        lambda s: {
            "epoch": 3,
            "pytorch-lightning_version": "2.4.0",
            "state_dict": {**prefixed("model.", s), "criterion.weight": torch.ones(2)},
            "hyper_parameters": argparse.Namespace(lr=1e-4, out=pathlib.Path("x")),
            "callbacks": {"Checkpoint": {"best_model_score": torch.tensor(1.0)}},
        },
        "entries left out that are not SAM's: 1 (criterion.weight)",
    ),
    "micro-sam": (
        lambda s: {
            "model_state": prefixed("sam.", s),
            "decoder_state": {"base.weight": torch.ones(2)},
            "current_metric": np.float64(0.5),
            "optimizer_state": {"state": {0: {"step": torch.tensor(3.0)}}},
        },
        "found under 'model_state'; 'sam' taken off",
    ),
    "MedSAM": (
        lambda s: {"model": prefixed("module.", s), "optimizer": {"state": {}}, "epoch": 9},
        "found under 'model'; 'module' taken off",
    ),
    "EMA beside": (
        lambda s: {"model": s, "model_ema": spoilt(s)},
        "found under 'model'",
    ),
    "EMA alone": (lambda s: {"model_ema": s, "epoch": 3}, "found under 'model_ema'"),
    "EMA as prefix": (
        lambda s: {**prefixed("model.", s), **prefixed("ema.", spoilt(s))},
        "'model' taken off",
    ),
    "SWA": (lambda s: {"n_averaged": torch.tensor(4), **prefixed("module.", s)}, "n_averaged"),
    "three parts": (
        lambda s: {
            part: {k.removeprefix(f"{part}."): v for k, v in s.items() if k.startswith(part)}
            for part in ("image_encoder", "prompt_encoder", "mask_decoder")
        },
        "",
    ),
    "parameters": (lambda s: {k: torch.nn.Parameter(v) for k, v in s.items()}, ""),
    "buffers": (lambda s: {**s, "pixel_mean": torch.ones(3, 1, 1)}, "(pixel_mean)"),
    "profiled": (
        lambda s: {**s, "image_encoder.neck.total_ops": torch.ones(1, dtype=torch.float64)},
        "(image_encoder.neck.total_ops)",
    ),
    "numbers beside": (lambda s: {**s, "epoch": 3}, "(epoch)"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_weights_are_found_and_it_is_said(
    name: str, tmp_path: Path, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    wrap, message = WRAPPERS[name]
    for legacy in (False, True):
        caplog.clear()
        path = tmp_path / "a.pth"
        torch.save(wrap(state), path, _use_new_zipfile_serialization=not legacy)
        with caplog.at_level(logging.WARNING):
            assert_equal(read_state(path), state)
        assert message in caplog.text
        assert bool(caplog.records) == bool(message)


def test_nothing_is_said_of_plain_weights_or_when_quiet(
    tmp_path: Path, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(state, tmp_path / "a.pth")
    torch.save({"model": state}, tmp_path / "b.pth")
    assert_equal(read_state(tmp_path / "a.pth"), state)
    assert_equal(read_state(tmp_path / "b.pth", quiet=True), state)
    assert not caplog.records


def test_two_sams_in_one_file_are_refused_by_their_names(tmp_path: Path, state: State) -> None:
    torch.save({"student": state, "teacher": spoilt(state)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"holds 2 SAMs \('student', 'teacher'\)"):
        read_state(tmp_path / "a.pth")


EXTRAS: dict[str, Any] = {
    "Namespace": argparse.Namespace(lr=1e-4),
    "NumPy scalar": np.float64(0.5),
    "NumPy dtype": np.dtype("float32"),
    "NumPy array": np.arange(3),
    "NumPy random state": np.random.RandomState(0).get_state(),
    "NumPy generator": np.random.default_rng(0),
    "NumPy type": np.float32,
    "configuration": OmegaConf.create({"a": [1, {"b": "x"}], "c": None, "d": 1.5, "e": True}),
    "path": pathlib.PurePosixPath("/home/me"),
    "Windows path": pathlib.PureWindowsPath("C:/me"),
    "date": datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc),
    "OrderedDict": collections.OrderedDict(a=1),
    "defaultdict": collections.defaultdict(dict, a={1: 2}),
    "deque": collections.deque([1]),
    "bytes": b"abc",
    "complex": 1j,
    "set": {1, 2},
    "version": torch.__version__,
}


@pytest.mark.parametrize("name", EXTRAS)
def test_what_training_programs_save_beside_weights_is_no_obstacle(
    name: str, tmp_path: Path, state: State
) -> None:
    torch.save({"model": state, "args": {"value": EXTRAS[name]}}, tmp_path / "a.pth")
    assert_equal(read_state(tmp_path / "a.pth", quiet=True), state)


def test_numpy_never_sees_what_a_file_holds(tmp_path: Path, state: State) -> None:
    # With a dtype that claims to be of objects, NumPy would follow the file's bytes as pointers.
    objects = np.array([None], dtype=object)
    torch.save({**state, "image_encoder.neck.0.weight": objects}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"holds an object of the class .*_reconstruct for"):
        read_state(tmp_path / "a.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_converted_and_it_is_said(
    dtype: torch.dtype, tmp_path: Path, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    narrow = {name: tensor.to(dtype) for name, tensor in state.items()}
    torch.save(narrow, tmp_path / "a.pth")
    save_file(narrow, tmp_path / "b.safetensors")
    for name in ("a.pth", "b.safetensors"):
        caplog.clear()
        read = read_state(tmp_path / name)
        assert_equal(read, {name: tensor.float() for name, tensor in narrow.items()})
        assert f"tensors converted from {str(dtype)[6:]}: {len(state)}" in caplog.text


# Files of other formats


def test_safetensors_come_back_with_their_resize_mode(tmp_path: Path, state: State) -> None:
    sam = build_sam("vit_tiny", 64)
    sam.load_state_dict(state)
    for name in ("a.safetensors", "named_otherwise.pth"):
        write_safetensors(sam, tmp_path / name, {"resize_mode": "squash"})
        opened = open_checkpoint(tmp_path / name)
        assert_equal(opened.sam.state_dict(), state)
        assert (opened.model_type, opened.image_size, opened.resize_mode) == (
            "vit_tiny", 64, "squash"
        )  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, state: State) -> Path:
    sam = build_sam("vit_tiny", 64)
    sam.load_state_dict(state)
    folder = tmp_path_factory.mktemp("huggingface") / "tuned"
    write_huggingface(sam, folder, {"resize_mode": "squash"})
    return folder


def test_a_folder_of_transformers_comes_back_bit_for_bit(
    exported: Path, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    for path in (exported, exported / "model.safetensors"):
        caplog.clear()
        opened = open_checkpoint(path)
        assert_equal(opened.sam.state_dict(), state)
        assert opened.resize_mode == "squash"
        assert "names of transformers translated" in caplog.text


@pytest.mark.parametrize("model_type", ["vit_h", "vit_l", "vit_b", "vit_tiny"])
def test_names_of_transformers_are_translated_back_for_every_type(model_type: str) -> None:
    from samft.weights.huggingface_names import from_huggingface_names

    with torch.device("meta"):
        names = build_sam(model_type, 64).state_dict()
    assert from_huggingface_names(to_huggingface_names(names), names).keys() == names.keys()


def huggingface_state(state: State) -> State:
    names = to_huggingface_names(state)
    shared = names["shared_image_embedding.positional_embedding"]
    return {**names, "prompt_encoder.shared_embedding.positional_embedding": shared.clone()}


def test_older_and_split_files_of_transformers_are_read(tmp_path: Path, state: State) -> None:
    names = huggingface_state(state)
    torch.save(names, tmp_path / "pytorch_model.bin")
    assert_equal(read_state(tmp_path, quiet=True), state)
    cached = tmp_path / "models--me--sam/snapshots/0123"
    cached.mkdir(parents=True)
    (cached / "pytorch_model.bin").symlink_to(tmp_path / "pytorch_model.bin")
    assert_equal(read_state(tmp_path / "models--me--sam", quiet=True), state)
    split = tmp_path / "split"
    split.mkdir()
    parts = {f"model-0000{k}-of-00002.safetensors": list(names)[k - 1 :: 2] for k in (1, 2)}
    for part, keys in parts.items():
        save_file({key: names[key] for key in keys}, split / part)
    weight_map = {key: part for part, keys in parts.items() for key in keys}
    index = split / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for path in (split, index):
        assert_equal(read_state(path, quiet=True), state)
    (split / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names model-00002-of-.*not beside it"):
        read_state(split)
    index.write_text(json.dumps({"weight_map": {"a": "../pytorch_model.bin"}}))
    with pytest.raises(CheckpointError, match=r"'\.\./pytorch_model.bin', which is no file beside"):
        read_state(split)


# What is no SAM 1, by its names

SAM = "image_encoder.pos_embed"
OTHER_MODELS: dict[str, tuple[list[str], str]] = {
    "SAM 2": (["image_encoder.trunk.pos_embed", "sam_mask_decoder.iou_token.weight"], "is SAM 2"),
    "SAM 2 of transformers": (["vision_encoder.backbone.pos_embed"], "is SAM 2"),
    "HQ-SAM": ([SAM, "mask_decoder.hf_token.weight"], "is HQ-SAM"),
    "MobileSAM": (["image_encoder.patch_embed.seq.0.c.weight"], "is MobileSAM or TinySAM"),
    "LoRA": ([SAM, "image_encoder.blocks.0.attn.qkv.lora_A.weight"], "with adapters"),
    "PEFT": ([SAM, "image_encoder.blocks.0.attn.qkv.lora_A.default.weight"], "with adapters"),
    "SAMed": ([SAM, "image_encoder.blocks.0.attn.qkv.linear_a_q.weight"], "with adapters"),
    "SAM-Med2D": ([SAM, "image_encoder.blocks.0.Adapter.channel.0.weight"], "with adapters"),
    "YOLO": (["model.0.conv.weight", "model.22.cv2.0.0.conv.weight"], "is a YOLO"),
    "encoder": (["pos_embed", "patch_embed.proj.weight", "neck.0.weight"], "image encoder of"),
    "decoder": (["mask_decoder.iou_token.weight"], "the mask_decoder of a SAM without its image"),
    "ViT": (["cls_token", "pos_embed", "blocks.0.norm1.weight"], "is a plain vision transformer"),
    "ResNet": (["layer1.0.conv1.weight", "fc.weight"], "is a ResNet"),
    "unknown": (["a.weight", "b.weight"], "but 2 other tensors (a.weight, b.weight)"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_models_are_named(name: str, tmp_path: Path) -> None:
    keys, message = OTHER_MODELS[name]
    tensors = {key: torch.ones(1, 4, 4, 128) for key in keys}
    for content in (tensors, {"model": prefixed("module.", tensors), "epoch": 1}):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(CheckpointError) as caught:
            read_state(tmp_path / "a.pth")
        assert message in str(caught.value) and "samft reads SAM 1" in str(caught.value)


class Custom:
    """A class that no list allows."""


def as_zip(names: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return file.getvalue()


def as_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("sam.pth"))
    return file.getvalue()


def as_torch(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "it is empty"),
    "HTML": (lambda: b"\n<!DOCTYPE html><html>login</html>", "a web page (HTML)"),
    "LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "gzip": (lambda: b"\x1f\x8b\x08\0\0\0", "compressed with gzip"),
    "tar": (as_tar, "a tar archive: unpack it"),
    "zip": (lambda: as_zip({"readme.txt": b"hello"}), "with readme.txt"),
    "zip of .pth": (lambda: as_zip({"sam/sam.pth": b"x"}), "that holds sam/sam.pth: unpack it"),
    "npz": (lambda: as_zip({"a.npy": b"x"}), "a NumPy archive"),
    "TorchScript": (lambda: as_zip({"a/constants.pkl": b"", "a/code/x.py": b""}), "TorchScript"),
    "ONNX": (lambda: b"\x08\x08\x12\x07pytorch\x1a\x051.0", "an ONNX file"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    "JSON": (lambda: b'{"error": "rate limit"}', "JSON text"),
    "text": (lambda: b"404: Not Found", "text, not weights"),
    "zeros": (lambda: bytes(2000), "zeros at its beginning"),
    "noise": (lambda: bytes(range(255, 0, -1)) * 4, "no format that samft knows"),
    "safetensors cut short": (lambda: (200).to_bytes(8, "little") + b'{"a":', "cut short"),
    "class": (lambda: as_torch({"model": Custom()}), "of the class test_checkpoint_formats.Custom"),
    "legacy class": (
        lambda: as_torch(Custom(), _use_new_zipfile_serialization=False),
        "of the class test_checkpoint_formats.Custom",
    ),
    "YOLO": (
        lambda: as_zip(
            {
                "a/data.pkl": b"\x80\x02cultralytics.nn.tasks\nDetectionModel\n)\x81.",
                "a/version": b"3",
            }
        ),
        "is a YOLO of Ultralytics",
    ),
    "zip cut short": (
        lambda: as_torch({"a": torch.ones(1)})[:-30],
        "the table of contents at its end is missing",
    ),
    "protocol 4": (lambda: as_torch({"a": torch.ones(1)}, pickle_protocol=4), "pickle_protocol"),
    "bytearray": (lambda: as_torch({"a": bytearray(b"x")}), "the class builtins.bytearray"),
    "legacy bytearray": (
        lambda: as_torch({"a": bytearray(b"x")}, _use_new_zipfile_serialization=False),
        "the class builtins.bytearray",
    ),
    "plain pickle": (lambda: pickle.dumps({"a": 1}, protocol=2), "not a readable checkpoint"),
    "list": (lambda: as_torch([torch.ones(1)]), "but a value of the type list"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_checkpoint_is_named(name: str, tmp_path: Path) -> None:
    make, message = FILES[name]
    (tmp_path / "a.pth").write_bytes(make())
    with pytest.raises(CheckpointError) as caught:
        read_state(tmp_path / "a.pth")
    assert str(tmp_path / "a.pth") in str(caught.value) and message in str(caught.value)
    if "class" in message:
        assert "cut short" not in str(caught.value) and "state_dict()" in str(caught.value)


FOLDERS = {
    "unpacked": (["data.pkl", "data/0"], "was unpacked"),
    "distributed": ([".metadata", "__0_0.distcp"], "distributed checkpoint"),
    "of a run": (["30-0.67.ckpt"], "name a file in it, such as 30-0.67.ckpt"),
    "snapshots": (["snapshots/a/model.safetensors", "snapshots/b/model.safetensors"], "(a, b)"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_are_refused_with_what_to_give(name: str, tmp_path: Path) -> None:
    files, message = FOLDERS[name]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(CheckpointError) as caught:
        read_state(tmp_path)
    assert message in str(caught.value)


# Tensors that are no weights

TENSORS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "sparse": (lambda t: t.to_sparse(), "is sparse"),
    "meta": (lambda t: t.to("meta"), "a meta tensor"),
    "vast meta": (lambda t: torch.empty(10**6, 10**6, device="meta"), "a meta tensor"),
    "quantised": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "is quantised"),
    "nested": (lambda t: torch.nested.nested_tensor([t, t]), "is a nested tensor"),
    "integer": (lambda t: t.int(), "holds torch.int32 values"),
    "boolean": (lambda t: t.bool(), "holds torch.bool values"),
    "complex": (lambda t: t.to(torch.complex64), "holds torch.complex64 values"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "holds torch.float8_e4m3fn values"),
    "empty": (lambda t: t[:0], "is empty"),
    "scalar": (lambda t: t.sum(), "of another shape"),
    "list": (lambda t: t.tolist(), "a value of the type list"),
    "none": (lambda t: None, "a value of the type NoneType"),
    "NumPy": (lambda t: t.numpy(), "an object of the class numpy"),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.filterwarnings("ignore")  # of torch, that such tensors are prototypes
def test_tensors_that_are_no_weights_are_refused(name: str, tmp_path: Path, state: State) -> None:
    change, message = TENSORS[name]
    for key in ("mask_decoder.iou_token.weight", "image_encoder.pos_embed"):
        torch.save({**state, key: change(state[key])}, tmp_path / "a.pth")
        with pytest.raises(CheckpointError) as caught:
            read_state(tmp_path / "a.pth")
        assert message in str(caught.value) or "not of four dimensions" in str(caught.value)


def test_a_key_that_is_no_text_is_refused(tmp_path: Path, state: State) -> None:
    torch.save({**state, 3: torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="a key that is no text, 3"):
        read_state(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 10**6, 10**6, 128), "its tensors declare 512,000,"),
        ((1, 4, 5, 128), "no square image"),
        ((2, 4, 4, 128), "no square image"),
        ((1, 4, 4, 1280), "does not fit the model"),  # nor is a vit_h built to find out
        ((1, 4, 4, 999), "999 wide"),
    ],
)
def test_positions_of_absurd_shapes_are_refused(
    shape: tuple[int, ...], message: str, tmp_path: Path, state: State
) -> None:
    vast = torch.zeros(()).expand(shape)
    torch.save({**state, "image_encoder.pos_embed": vast}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        read_state(tmp_path / "a.pth")
    assert message in str(caught.value)


def test_a_flipped_bit_is_noticed_where_the_file_has_checksums(
    tmp_path: Path, state: State
) -> None:
    path = tmp_path / "a.pth"
    torch.save(state, path)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"damaged: the checksum of a/data/\d+ is wrong"):
        read_state(path)
    with without_checksums():
        torch.save(state, path)
    assert_equal(read_state(path), state)


@contextlib.contextmanager
def without_checksums() -> Iterator[None]:
    """Has torch.save compute no checksums."""
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(True)


def test_a_compressed_archive_that_would_fill_the_memory_is_refused(
    tmp_path: Path, state: State
) -> None:
    torch.save(state, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as source:
        contents = {name: source.read(name) for name in source.namelist()}
    contents["archive/data/bomb"] = bytes(200 << 20)
    with zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in contents.items():
            target.writestr(name, content)
    with pytest.raises(CheckpointError, match="unpacked, it would be 2.*torch.save does not comp"):
        read_state(tmp_path / "b.pth")
    # Packed by hand without a bomb, it is read.
    with zipfile.ZipFile(tmp_path / "c.pth", "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in contents.items():
            if "bomb" not in name:
                target.writestr(name, content)
    assert_equal(read_state(tmp_path / "c.pth"), state)
