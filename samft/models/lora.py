"""Low-rank adapters (LoRA): a frozen weight W becomes W + (alpha / r) B A, and B and A are trained.

An adapted layer stays what it was to everything that reads its `weight`: PyTorch's parametrization
computes the sum wherever it is read. So the fast attention, the absorbed projections of the decoder
and activation checkpointing know nothing of adapters, and the merged weights, which are saved, are
the very ones that were validated.

SAM's image encoder projects queries, keys and values by one fused matrix. Each third of its rows
has an adapter of its own, as it would have in a model that keeps three matrices.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685. A begins as
`torch.nn.Linear` initialises its weights, B as zeros.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from segment_anything.modeling import Sam, TwoWayTransformer
from segment_anything.modeling.common import MLPBlock
from segment_anything.modeling.transformer import Attention
from torch import Tensor, nn
from torch.nn.utils import parametrize

from samft.config_checks import ADAPTER_TARGETS
from samft.errors import CheckpointError
from samft.runtime.files import sha256_of

TARGETS = ADAPTER_TARGETS
_MARK = ".parametrizations.weight."
_ORIGINAL = f"{_MARK}original"
_WHOLE = (1, (0,))  # one part, which is adapted


class AdapterSettings(NamedTuple):
    """What adapters a model has.

    Attributes:
        rank: r.
        alpha: The updates are scaled by alpha / r.
        targets: Of `TARGETS`, what is adapted in an attention (`q`, `k`, `v`, `proj`, its output)
            and in the MLP after it.
        last_blocks: Of the image encoder, only the last so many blocks; None: all.
        encoder: Whether the image encoder has any.
        decoder: Whether the mask decoder's attentions and MLPs are adapted, too.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS
    last_blocks: int | None = None
    encoder: bool = True
    decoder: bool = False


class LowRankUpdate(nn.Module):
    """Adds (alpha / r) B A to some of the equal parts that the rows of a weight consist of.

    Attributes:
        down: float [K, r, in], A of each of the K adapted parts.
        up: float [K, out / parts, r], B.
    """

    def __init__(
        self, weight: Tensor, *, num_parts: int, adapted: Sequence[int], rank: int, alpha: float
    ) -> None:
        """Makes an update that is zero.

        Args:
            weight: float [out, in], whose device and type the update gets.
            num_parts: Equal parts of the rows: 3 for fused queries, keys and values.
            adapted: Which of the parts.
            rank: r.
            alpha: See the class.
        """
        super().__init__()
        self.num_parts, self.adapted, self.scale = num_parts, tuple(adapted), alpha / rank
        height, width = weight.shape[0] // num_parts, weight.shape[1]
        self.down = nn.Parameter(weight.new_empty(len(adapted), rank, width))
        self.up = nn.Parameter(weight.new_zeros(len(adapted), height, rank))
        for matrix in self.down.unbind():
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """W + (alpha / r) B A: float [out, in] to the same."""
        updates = dict(zip(self.adapted, (self.up @ self.down * self.scale).unbind(), strict=True))
        parts = weight.unflatten(0, (self.num_parts, -1)).unbind()
        return torch.cat(
            [part + updates[i] if i in updates else part for i, part in enumerate(parts)]
        )


def add_adapters(sam: Sam, settings: AdapterSettings) -> None:
    """Adds adapters to a model, in place, and trains them; whatever else is trained stays so.

    Args:
        sam: With its frozen parts frozen.
        settings: Which adapters.
    """
    for layer, parts in _adapted_layers(sam, settings):
        num_parts, adapted = parts
        update = LowRankUpdate(
            layer.weight.detach(),
            num_parts=num_parts,
            adapted=adapted,
            rank=settings.rank,
            alpha=settings.alpha,
        )
        layer.weight.requires_grad_(False)
        parametrize.register_parametrization(layer, "weight", update)


def _adapted_layers(
    sam: Sam, settings: AdapterSettings
) -> Iterator[tuple[nn.Linear, tuple[int, tuple[int, ...]]]]:
    # Each layer, with the number of equal parts of its rows and which of them are adapted.
    blocks, targets = list(sam.image_encoder.blocks), settings.targets
    if settings.encoder:
        first = 0 if settings.last_blocks is None else len(blocks) - settings.last_blocks
        for block in blocks[first:]:
            if in_fused := _parts_of_fused(targets):
                yield block.attn.qkv, (3, in_fused)
            if "proj" in targets:
                yield block.attn.proj, _WHOLE
            if "mlp" in targets:
                yield block.mlp.lin1, _WHOLE
                yield block.mlp.lin2, _WHOLE
    if settings.decoder:
        for layer in _decoder_layers(sam.mask_decoder.transformer, targets):
            yield layer, _WHOLE


def _parts_of_fused(targets: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(i for i, name in enumerate("qkv") if name in targets)


def _decoder_layers(
    transformer: TwoWayTransformer, targets: tuple[str, ...]
) -> Iterator[nn.Linear]:
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "out_proj"}
    for module in transformer.modules():
        if isinstance(module, Attention):
            yield from (getattr(module, names[name]) for name in targets if name in names)
        elif isinstance(module, MLPBlock) and "mlp" in targets:
            yield from (module.lin1, module.lin2)


def merged_state(sam: Sam) -> dict[str, Tensor]:
    """The state dict with SAM's own keys: adapted weights are the sums, without a gradient."""
    state = {}
    for name, tensor in sam.state_dict().items():
        if name.endswith(_ORIGINAL):
            layer = name.removesuffix(_ORIGINAL)
            state[f"{layer}.weight"] = sam.get_submodule(layer).weight.detach()
        elif _MARK not in name:
            state[name] = tensor
    return state


def adapter_state(sam: Sam) -> dict[str, Tensor]:
    """All that a merged state does not have: A and B of each layer, and the weight beneath."""
    return {name: tensor for name, tensor in sam.state_dict().items() if _MARK in name}


def is_down_projection(name: str) -> bool:
    """Whether a parameter of a model with adapters is A of one: with B zero, it has no effect."""
    return _MARK in name and name.endswith(".down")


def load_adapter_state(sam: Sam, state: Mapping[str, Tensor]) -> None:
    """Loads what `adapter_state` gave into a model with the same adapters."""
    sam.load_state_dict({**sam.state_dict(), **state})


def merge_adapters(sam: Sam) -> None:
    """Makes an ordinary model of one with adapters, in place: the sums become its weights.

    They count as trained, as the adapters were: for the rest of the run the same is frozen.
    """
    for module in list(sam.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            module.get_parameter("weight").requires_grad_(True)


def adapter_tensors(
    merged: Mapping[str, Tensor], adapters: Mapping[str, Tensor], *, constant: Collection[str]
) -> dict[str, Tensor]:
    """What an adapter file holds: all that training has changed, without the base.

    Args:
        merged: From `merged_state`.
        adapters: From `adapter_state`; empty for a model without adapters.
        constant: The names of tensors that are not trained, see `trainable.constant_names`.

    Returns:
        `LAYER.down` and `LAYER.up` of each adapted layer, and by SAM's own keys whatever else is
        trained, such as the decoder; nothing for a model without adapters.
    """
    adapted = {f"{n.removesuffix(_ORIGINAL)}.weight" for n in adapters if n.endswith(_ORIGINAL)}
    if not adapted:
        return {}
    low_rank = {
        name.replace(f"{_MARK}0.", "."): tensor
        for name, tensor in adapters.items()
        if not name.endswith(_ORIGINAL)
    }
    others = {n: t for n, t in merged.items() if n not in constant and n not in adapted}
    return {**low_rank, **others}


def read_adapter(path: Path, *, base: Path) -> tuple[dict[str, Tensor], AdapterSettings]:
    """Reads an adapter file that a run has left beside a checkpoint.

    Args:
        path: The file.
        base: The checkpoint that it is to be merged into.

    Raises:
        CheckpointError: It is no adapter file, or was trained on another base.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        settings = AdapterSettings(
            rank=int(metadata["rank"]),
            alpha=float(metadata["alpha"]),
            targets=tuple(metadata["targets"].split(",")),
        )
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no adapter file of samft ({error}): give the .adapter.safetensors beside a "
            "checkpoint."
        ) from error
    wanted, actual = metadata.get("base_sha256", "unknown"), sha256_of(base)
    if wanted not in ("unknown", actual):
        raise CheckpointError(
            f"{path} was trained on another base than {base}: on the file with the SHA-256 "
            f"{wanted[:16]}..., and this one has {actual[:16]}.... Merged into other weights it "
            "would give masks that nobody has measured."
        )
    return tensors, settings


def apply_adapter(
    state: dict[str, Tensor], adapter: Mapping[str, Tensor], settings: AdapterSettings
) -> dict[str, Tensor]:
    """Merges an adapter into the weights that it was trained on.

    Args:
        state: Of the base, with SAM's own keys.
        adapter: From `adapter_tensors`; what is not of a low rank replaces the base's.
        settings: That the adapter was trained with.

    Returns:
        The merged state.

    Raises:
        CheckpointError: The adapter does not fit the base.
    """
    low_rank = {name for name in adapter if name.endswith((".down", ".up"))}
    merged = {**state, **{name: t for name, t in adapter.items() if name not in low_rank}}
    for layer in sorted({name.rpartition(".")[0] for name in low_rank}):
        weight = state.get(f"{layer}.weight")
        down, up = adapter.get(f"{layer}.down"), adapter.get(f"{layer}.up")
        if weight is None or down is None or up is None:
            raise CheckpointError(f"the adapter has a part for {layer}, which does not fit.")
        num_parts = 3 if layer.endswith(".qkv") else 1
        adapted = _parts_of_fused(settings.targets) if num_parts == 3 else (0,)
        shapes = (len(adapted), settings.rank, weight.shape[1]), weight.shape[0] // num_parts
        if down.shape != shapes[0] or up.shape != (len(adapted), shapes[1], settings.rank):
            raise CheckpointError(
                f"the adapter's {layer} is for weights of another shape than {tuple(weight.shape)}."
            )
        update = LowRankUpdate(
            weight,
            num_parts=num_parts,
            adapted=adapted,
            rank=settings.rank,
            alpha=settings.alpha,
        )
        update.load_state_dict({"down": down, "up": up})
        with torch.no_grad():
            merged[f"{layer}.weight"] = update(weight)
    return merged
