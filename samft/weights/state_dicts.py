"""Finds SAM's weights in what a checkpoint holds, whatever a training program wrapped them in."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samft.errors import CheckpointError
from samft.weights.pickled_files import Unused, fits_in_memory

# By its position embeddings a SAM is found, under segment_anything's name or transformers'.
POSITIONS, HUGGINGFACE_POSITIONS = "image_encoder.pos_embed", "vision_encoder.pos_embed"
_SAM_PARTS = ("image_encoder.", "prompt_encoder.", "mask_decoder.")
_HUGGINGFACE_PARTS = ("vision_encoder.", "shared_image_embedding.", *_SAM_PARTS[1:])
# What DistributedDataParallel, torch.compile, FSDP and others put into names, at any place.
_WRAPPERS = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
    r"|_forward_module)\."
)
_AVERAGES = re.compile(r"(^|[._])(ema|swa|averaged?)([._]|$)", re.IGNORECASE)
_MAX_DEPTH = 4
_WHAT_SAMFT_READS = "samft reads SAM 1 checkpoints (vit_h, vit_l, vit_b) and its own."
# Of dtypes that a copy in float32 keeps every value of, or nearly.
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Models that are no SAM 1: a pattern of their names, and what they are. The first one counts.
_OTHER_MODELS = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (r"vision_backbone\.", "SAM 3, another model"),
        (
            r"(^|\.)(sam_mask_decoder|memory_attention|memory_encoder)\."
            r"|image_encoder\.trunk\.|vision_encoder\.backbone\.",
            "SAM 2, another model",
        ),
        (
            r"mask_decoder\.(hf_token|hf_mlp|hq_token|hq_mask_mlp|compress_vit_feat"
            r"|compress_vit_conv)",
            "HQ-SAM, whose mask decoder has parts that SAM has not",
        ),
        (
            r"image_encoder\.patch_embed\.seq\.",
            "MobileSAM or TinySAM, whose image encoder is a TinyViT",
        ),
        (
            r"image_encoder\.(features|stages)\.",
            "EdgeSAM or RepViT-SAM, with another image encoder",
        ),
        (r"image_encoder\.backbone\.", "EfficientViT-SAM, with another image encoder"),
        (
            r"(?i)(^|[._])(lora|adapter|mlp_adapter|space_adapter)(_[ab])?[._]"
            r"|\.w_[ab]_\d+\.|\.linear_[ab]_[qv]\.|\.qkv\.qkv\.",
            "a SAM with adapters (LoRA, say): merge them into its weights where it was made",
        ),
        (r"^model\.\d+\.(conv|cv\d|m|bn)\.", "a YOLO, such as FastSAM"),
        (r"^neck\.0\.weight$", "the image encoder of a SAM without its other parts"),
        (r"^(cls_token|blocks\.0\.norm1\.weight)$", "a plain vision transformer"),
        (r"^(layer1\.0\.conv1|fc)\.weight$", "a ResNet"),
        (r"(^|\.)(text_model|transformer\.resblocks)\.", "a CLIP"),
        (r"(^|\.)(roi_heads|rpn)\.", "a Mask R-CNN"),
    )
)


@dataclass(frozen=True)
class ExtractedState:
    """SAM's weights, and how they were found.

    Attributes:
        state: Keys without the prefixes of wrappers -> tensors, of any dtype and layout.
        notes: What a user should know, as parts of a sentence; empty for a plain state dict.
        is_huggingface: Whether the keys are those of `transformers`.
    """

    state: dict[str, Tensor]
    notes: list[str]
    is_huggingface: bool


@dataclass(frozen=True)
class _WrappedState:
    path: tuple[str, ...]  # of the dicts that lead to it
    prefix: str
    positions: str
    entries: Mapping[Any, Any]

    @property
    def name(self) -> str:
        return ".".join([*self.path, self.prefix]).strip(".")


def find_state(content: Any, *, source: object) -> ExtractedState:
    """Finds SAM's weights in the content of a checkpoint.

    Args:
        content: As it was saved: a state dict, or one in other dicts, with or without a prefix.
        source: Names the file in errors.

    Raises:
        CheckpointError: It holds no SAM 1, more than one, or what is no tensor in place of one.
    """
    chosen = _choose_candidate(list(_find_candidates(content)), source=source)
    if chosen is None:
        raise CheckpointError(f"{source} {_describe_without_sam(content)}")
    state: dict[str, Tensor] = {}
    left_out = []
    is_huggingface = chosen.positions == HUGGINGFACE_POSITIONS
    parts = _HUGGINGFACE_PARTS if is_huggingface else _SAM_PARTS
    for key, value in chosen.entries.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{source} has a key that is no text, {_key_text(key)}.")
        name = _bare(key).removeprefix(chosen.prefix)
        if not _bare(key).startswith(chosen.prefix) or not name.startswith(parts):
            left_out.append(key)
        elif name.endswith((".total_ops", ".total_params")):
            left_out.append(key)  # counters of the profiler thop
        elif name in state:
            raise CheckpointError(f"{source} has two tensors for {name}.")
        elif not isinstance(value, Tensor):
            raise CheckpointError(f"{source} holds {_describe(value)} for {key}, not a tensor.")
        else:
            state[name] = value.detach()
    what = describe_other_model(state)
    if what is not None:
        raise CheckpointError(f"{source} is {what}: {_WHAT_SAMFT_READS}")
    return ExtractedState(state, _notes(chosen, left_out), is_huggingface)


def to_float32(
    state: Mapping[str, Tensor], *, file_bytes: int, source: object
) -> tuple[dict[str, Tensor], list[str]]:
    """Converts weights to float32, and refuses tensors that cannot be weights.

    Args:
        state: Keys -> tensors.
        file_bytes: Size of the file that they are from.
        source: Names the file in errors.

    Returns:
        The weights, and notes as of `ExtractedState`.

    Raises:
        CheckpointError: A tensor is sparse, quantised, complex, without data, ..., or all of them
            together declare more values than the file can hold.
    """
    for name, tensor in state.items():
        reason = _why_no_weights(tensor)
        if reason is not None:
            raise CheckpointError(f"{source} cannot be used: {name} {reason}.")
    declared = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if not fits_in_memory(declared, file_bytes=file_bytes):
        raise CheckpointError(
            f"{source} cannot be used: its tensors declare {declared:,} bytes, and the file has "
            f"only {file_bytes:,}."
        )
    kinds = Counter(str(t.dtype).removeprefix("torch.") for t in state.values())
    del kinds["float32"]
    notes = [f"tensors converted from {kind}: {number}" for kind, number in sorted(kinds.items())]
    return {name: tensor.float() for name, tensor in state.items()}, notes


def describe_other_model(names: Iterable[str]) -> str | None:
    """What the model with these parameter names is, if it is a known one that is no SAM 1."""
    names = list(names)
    for pattern, what in _OTHER_MODELS:
        if any(pattern.search(name) for name in names):
            return what
    return None


def _key_text(key: Any) -> str:
    # Others may nest so deeply that no text can be made of them.
    if isinstance(key, str | int | float | bytes | None):
        return str(key)[:40]
    return f"a value of the type {type(key).__name__}"


def _bare(key: str) -> str:
    return _WRAPPERS.sub("", key)


def _dicts_in(
    content: Any, path: tuple[str, ...] = (), seen: set[int] | None = None
) -> Iterator[tuple[tuple[str, ...], dict[Any, Any]]]:
    # Each once: a file may repeat one without end.
    seen = set() if seen is None else seen
    if isinstance(content, dict) and len(path) <= _MAX_DEPTH and id(content) not in seen:
        seen.add(id(content))
        yield path, content
        for key, value in content.items():
            yield from _dicts_in(value, (*path, _key_text(key)), seen)


def _find_candidates(content: Any) -> Iterator[_WrappedState]:
    for path, entries in _dicts_in(content):
        entries = _join_parts(entries)
        for name in sorted({_bare(key) for key in entries if isinstance(key, str)}):
            for positions in (POSITIONS, HUGGINGFACE_POSITIONS):
                prefix = name.removesuffix(positions)
                if name.endswith(positions) and (not prefix or prefix.endswith(".")):
                    yield _WrappedState(path, prefix, positions, entries)


def _join_parts(content: dict[Any, Any]) -> dict[Any, Any]:
    # One dict for each part of SAM, as programs write that train one part alone.
    parts = [part.rstrip(".") for part in _SAM_PARTS]
    if not all(isinstance(content.get(part), dict) for part in parts):
        return content
    return {f"{part}.{key}": value for part in parts for key, value in content[part].items()}


def _choose_candidate(candidates: list[_WrappedState], *, source: object) -> _WrappedState | None:
    # Beside the weights themselves, their moving average is left alone.
    plain = [one for one in candidates if not _AVERAGES.search(one.name)] or candidates
    if len(plain) > 1:
        names = ", ".join(repr(one.name) for one in plain[:4])
        raise CheckpointError(
            f"{source} holds {len(plain)} SAMs ({names}): save the one that you mean alone."
        )
    return plain[0] if plain else None


def _notes(chosen: _WrappedState, left_out: list[str]) -> list[str]:
    notes = []
    if chosen.path:
        notes.append(f"weights found under {'.'.join(chosen.path)!r}")
    wrapped = {key for key in chosen.entries if isinstance(key, str) and _WRAPPERS.search(key)}
    inserted = sorted({one for key in wrapped for one in _WRAPPERS.findall(key)})
    stripped = [chosen.prefix.rstrip(".")] * bool(chosen.prefix) + inserted
    if stripped:
        notes.append(f"{' and '.join(map(repr, stripped))} taken off their names")
    if left_out:
        shown = ", ".join(key[:60] for key in sorted(left_out)[:3]) + (
            ", ..." if len(left_out) > 3 else ""
        )
        notes.append(f"entries left out that are not SAM's: {len(left_out)} ({shown})")
    return notes


def _describe_without_sam(content: Any) -> str:
    if not isinstance(content, dict):
        return f"holds no flat dict of SAM's tensors but {_describe(content)}."
    names = max((_tensor_names(one) for _, one in _dicts_in(content)), key=len)
    names = [_bare(name) for name in names]
    if not names:
        keys = ", ".join(_key_text(key) for key in list(content)[:5])
        return f"holds no flat dict of SAM's tensors, only {keys or 'an empty dict'}."
    what = describe_other_model(names)
    if what is None and all(not name.startswith("image_encoder.") for name in names):
        parts = [part.rstrip(".") for part in _SAM_PARTS if any(n.startswith(part) for n in names)]
        what = f"the {' and the '.join(parts)} of a SAM without its image encoder" if parts else ""
    if what:
        return f"is {what}: {_WHAT_SAMFT_READS}"
    shown = ", ".join(name[:60] for name in sorted(names)[:3])
    return (
        f"holds no SAM image encoder ('{POSITIONS}' is missing) but {len(names)} other tensors "
        f"({shown}): {_WHAT_SAMFT_READS}"
    )


def _tensor_names(entries: dict[Any, Any]) -> list[str]:
    return [k for k, v in entries.items() if isinstance(k, str) and isinstance(v, Tensor)]


def _describe(value: Any) -> str:
    if isinstance(value, Unused):
        return f"an object of the class {type(value).__name__}"
    if isinstance(value, Tensor):
        return "a single tensor"
    return f"a value of the type {type(value).__name__}"


def _why_no_weights(tensor: Tensor) -> str | None:
    checks = (
        (tensor.is_meta, "has a shape but no data (a meta tensor)"),
        (tensor.is_nested, "is a nested tensor"),
        (tensor.layout is not torch.strided, f"is sparse ({tensor.layout})"),
        (tensor.is_quantized, f"is quantised ({tensor.dtype})"),
        (tensor.dtype not in _FLOATS, f"holds {tensor.dtype} values, which are no weights"),
    )
    reason = next((reason for applies, reason in checks if applies), None)
    if reason is None and not tensor.numel():
        reason = "is empty"
    if reason is None and not tensor.untyped_storage().data_ptr():
        reason = "has no data"
    return reason
