"""Fast attention against the stock image encoder: outputs, gradients, and no N x N tensor."""

import copy
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from samft.checkpoints.top_k import save_tensors
from samft.models.image_encoder import (
    AttentionGpu,
    FastBlock,
    _attention_gpu,
    attention,
    use_fast_attention,
    value_width,
)
from samft.models.sam import build_sam, load_sam

slow = pytest.mark.skipif(not os.environ.get("SAMFT_SLOW"), reason="slow: set SAMFT_SLOW=1")

TIGHT = 1e-10  # relative, in float64; any error in the algebra is far above it


def randomised(module: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    # Positions and biases are built as zeros, which would hide any error in their use.
    for name, parameter in module.named_parameters():
        if "pos" in name or "bias" in name:
            nn.init.normal_(parameter, std=0.5)
    return module.to(dtype)


def stock_encoder(
    image_size: int, dtype: torch.dtype = torch.float64, *, model_type: str = "vit_tiny"
) -> ImageEncoderViT:
    return randomised(build_sam(model_type, image_size).image_encoder, dtype)


def stock_block(width: int, num_heads: int, *, size: tuple[int, int], window_size: int) -> Block:
    block = Block(width, num_heads, use_rel_pos=True, window_size=window_size, input_size=size)
    return randomised(block)


def fast_copy(encoder: ImageEncoderViT) -> ImageEncoderViT:
    fast = copy.deepcopy(encoder)
    use_fast_attention(fast)
    return fast


def output_and_gradients(
    module: nn.Module, x: Tensor, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """The output, and the gradients of a weighted sum of it."""
    x = x.clone().requires_grad_()
    y = module(x)
    if weights is None:
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y)
    (y * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"output": y.detach(), "input": x.grad, **gradients}


def relative_error(ours: Tensor, stock: Tensor) -> float:
    assert ours.shape == stock.shape and stock.any()
    return ((ours - stock).abs().max() / stock.abs().max()).item()


def check_same(ours: nn.Module, stock: nn.Module, x: Tensor, *, output: float, grad: float) -> None:
    actual, expected = output_and_gradients(ours, x), output_and_gradients(stock, x)
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert errors.pop("output") < output
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < grad, worst
    with torch.no_grad():  # where attention over the whole map passes positions as a mask
        assert relative_error(ours(x), expected["output"]) < output


# Windows are 8 tokens, 128 px, wide: smaller maps than a window, whole windows, maps that stick out
# by a token (144) or by half a window (192), and both ways to treat the padding.
SIZES = [64, 80, 112, 128, 144, 192, 256]


@pytest.mark.parametrize("image_size", SIZES)
def test_encoder_equals_stock_in_float64_to_the_last_bits(image_size: int) -> None:
    stock = stock_encoder(image_size)
    images = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    check_same(fast_copy(stock), stock, images, output=TIGHT, grad=TIGHT)


@pytest.mark.parametrize("image_size", [64, 192, 256])
def test_encoder_equals_stock_in_float32(image_size: int) -> None:
    stock = stock_encoder(image_size, torch.float32)
    images = torch.randn(2, 3, image_size, image_size)
    check_same(fast_copy(stock), stock, images, output=1e-5, grad=1e-4)


@slow
@pytest.mark.parametrize("image_size", [256, 1024])
def test_vit_b_equals_stock(image_size: int) -> None:
    stock = stock_encoder(image_size, torch.float32, model_type="vit_b")
    images = torch.randn(1, 3, image_size, image_size)
    check_same(fast_copy(stock), stock, images, output=1e-5, grad=1e-4)


# Height, width, window (0: none). Maps need not be square.
MAPS = [(5, 9, 0), (7, 4, 4), (4, 7, 4), (2, 9, 4), (8, 8, 4), (9, 9, 4), (1, 1, 4), (3, 2, 2)]


@pytest.mark.parametrize(("height", "width", "window_size"), MAPS)
def test_block_equals_stock_on_maps_of_any_shape(height: int, width: int, window_size: int) -> None:
    stock = stock_block(24, 2, size=(height, width), window_size=window_size)
    fast = FastBlock(copy.deepcopy(stock))
    x = torch.randn(3, height, width, 24, dtype=torch.float64)
    check_same(fast, stock, x, output=TIGHT, grad=TIGHT)


@pytest.mark.parametrize(("width", "num_heads"), [(768, 12), (160, 2)])
@pytest.mark.parametrize("window_size", [0, 14])
def test_block_equals_stock_at_metas_head_widths(
    width: int, num_heads: int, window_size: int
) -> None:  # 64 channels a head in vit_b and vit_l, 80 in vit_h; 16 x 16 tokens are 256 px
    stock = stock_block(width, num_heads, size=(16, 16), window_size=window_size).float()
    fast = FastBlock(copy.deepcopy(stock))
    check_same(fast, stock, torch.randn(2, 16, 16, width), output=1e-5, grad=1e-4)


@pytest.mark.parametrize("window_size", [0, 4])
def test_tables_of_another_size_are_resampled_as_in_stock(window_size: int) -> None:
    stock = stock_block(24, 2, size=(6, 6), window_size=window_size)
    for table, length in (("rel_pos_h", 5), ("rel_pos_w", 19)):
        values = torch.randn(length, 12, dtype=torch.float64)
        setattr(stock.attn, table, nn.Parameter(values))
    fast = FastBlock(copy.deepcopy(stock))
    x = torch.randn(2, 6, 6, 24, dtype=torch.float64)
    check_same(fast, stock, x, output=TIGHT, grad=TIGHT)


def test_one_query_by_hand() -> None:
    # Two tokens side by side, one head, one channel: q = k = 0 + bias, v = x, table of columns t.
    attn = stock_block(1, 1, size=(1, 2), window_size=0).attn
    with torch.no_grad():
        attn.qkv.weight.copy_(torch.tensor([[0.0], [0.0], [1.0]]))
        attn.qkv.bias.copy_(torch.tensor([2.0, 3.0, 0.0]))
        attn.proj.weight.fill_(1.0)
        attn.proj.bias.zero_()
        attn.rel_pos_w.copy_(torch.tensor([[0.5], [0.0], [-0.25]]))  # of distances -1, 0 and 1
    y = attention(attn, torch.tensor([[[[1.0], [5.0]]]], dtype=torch.float64), 0)
    # The keys are alike; what differs is 2 x table[i - j]: of the left token, 0 and 1 for the two.
    first, second = torch.tensor([0.0, 1.0]).softmax(0), torch.tensor([-0.5, 0.0]).softmax(0)
    expected = torch.stack([first, second]) @ torch.tensor([1.0, 5.0])
    torch.testing.assert_close(y.flatten().float(), expected)


# An H100 with the first cuDNN that PyTorch asks before flash kernels; other GPUs and versions.
H100 = AttentionGpu((9, 0), 91501)


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        (H100, 128),
        (AttentionGpu((10, 0), 91900), 128),
        (AttentionGpu((10, 3), 92000), 128),
        (None, 192),
        (AttentionGpu((9, 0), None), 192),
        (AttentionGpu((9, 0), 91500), 192),
        (AttentionGpu((8, 0), 91900), 192),
        (AttentionGpu((12, 0), 91900), 192),
    ],
)
def test_values_are_narrow_where_cudnn_takes_them(gpu: AttentionGpu | None, expected: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert value_width(192, 64, dtype=dtype, gpu=gpu) == expected
    assert value_width(192, 64, dtype=torch.float32, gpu=gpu) == 192
    assert value_width(192, 160, dtype=torch.bfloat16, gpu=gpu) == 192
    for key_width in (96, 176, 208, 256):
        assert value_width(key_width, 64, dtype=torch.bfloat16, gpu=gpu) == key_width


def test_cudnn_counts_where_it_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    assert _attention_gpu(gpu) == H100
    assert _attention_gpu(torch.device("cpu")) is None
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        assert _attention_gpu(gpu) == ((9, 0), None)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert _attention_gpu(gpu) == ((9, 0), None)


@pytest.mark.parametrize(
    ("model_type", "gpu", "expected"),
    [
        ("vit_b", H100, {(96, 96), (192, 128)}),
        ("vit_b", None, {(96, 96), (192, 192)}),
        ("vit_l", H100, {(96, 96), (192, 128)}),
        ("vit_h", H100, {(112, 112), (208, 208)}),
    ],
)
def test_widths_of_keys_and_values_at_1024_px(
    model_type: str,
    gpu: AttentionGpu | None,
    expected: set[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    widths: set[tuple[int, int]] = set()
    kernel: Any = F.scaled_dot_product_attention

    def record_widths(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        assert q.shape[-1] == k.shape[-1]
        widths.add((k.shape[-1], v.shape[-1]))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record_widths)
    monkeypatch.setattr("samft.models.image_encoder._attention_gpu", lambda device: gpu)
    with torch.device("meta"):
        encoder = build_sam(model_type, 1024, attention="fast").image_encoder.bfloat16()
        images = torch.empty(1, 3, 1024, 1024, dtype=torch.bfloat16)
    assert encoder(images).shape == (1, 256, 64, 64)
    assert widths == expected


@pytest.mark.parametrize(("height", "width", "window_size"), MAPS)
def test_narrow_values_give_the_same_outputs_and_gradients(
    height: int, width: int, window_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow: Any = lambda key_width, num_channels, **_: num_channels + 4  # noqa: E731
    monkeypatch.setattr("samft.models.image_encoder.value_width", narrow)
    stock = stock_block(24, 2, size=(height, width), window_size=window_size)
    fast = FastBlock(copy.deepcopy(stock))
    x = torch.randn(2, height, width, 24, dtype=torch.float64)
    check_same(fast, stock, x, output=TIGHT, grad=TIGHT)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.num_elements = max(self.num_elements, *sizes, 0)
        return result


@contextmanager
def record_saved_sizes() -> Iterator[list[int]]:
    """Collects the number of elements of every tensor that is saved for backward."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def test_no_tensor_of_all_pairs_is_computed_or_saved() -> None:
    stock = stock_encoder(512, torch.float32)
    images = torch.randn(1, 3, 512, 512)
    pairs = (512 // 16) ** 4
    for encoder, is_smaller in ((stock, False), (fast_copy(stock), True)):
        with LargestTensor() as largest, record_saved_sizes() as saved:
            encoder(images).sum().backward()
        assert (max(saved) < pairs) is is_smaller
        assert (largest.num_elements < pairs) is is_smaller
        with LargestTensor() as largest, torch.no_grad():
            encoder(images)
        assert (largest.num_elements < pairs) is is_smaller


def test_without_gradients_positions_are_a_mask_for_some_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masks: list[list[int]] = []
    kernel: Any = F.scaled_dot_product_attention

    def record_mask(*args: Any, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        masks.append([*attn_mask.shape] if attn_mask is not None else [])
        return kernel(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record_mask)
    block = FastBlock(stock_block(24, 2, size=(12, 9), window_size=0))
    x = torch.randn(3, 12, 9, 24, dtype=torch.float64)
    block(x)
    assert masks == [[]]
    masks.clear()
    monkeypatch.setattr("samft.models.image_encoder._MASK_VALUES", 5 * 3 * 2 * 9 * (12 * 9))
    with torch.no_grad():
        block(x)
    assert masks == [[3, 2, rows * 9, 12 * 9] for rows in (5, 5, 2)]


@pytest.mark.parametrize("image_size", [80, 192])
def test_a_fused_kernel_accepts_the_inputs(image_size: int) -> None:
    stock = stock_encoder(image_size, torch.float32)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises if it does not
        images = torch.randn(1, 3, image_size, image_size)
        output_and_gradients(fast_copy(stock), images)
        with torch.no_grad():
            fast_copy(stock)(images)


@pytest.mark.parametrize("image_size", [80, 144, 192])
def test_projections_see_no_padding(image_size: int) -> None:
    encoder = fast_copy(stock_encoder(image_size, torch.float32))
    num_tokens: list[int] = []
    for block in encoder.blocks:
        for linear in (block.attn.qkv, block.attn.proj):
            linear.register_forward_hook(lambda m, x, y: num_tokens.append(y[..., 0].numel()))
    encoder(torch.randn(1, 3, image_size, image_size))
    assert num_tokens == [(image_size // 16) ** 2] * 8


def test_bf16_is_as_accurate_as_stock_bf16() -> None:
    exact = stock_encoder(144)
    images = torch.randn(2, 3, 144, 144)
    truth = output_and_gradients(exact, images.double())
    stock = copy.deepcopy(exact).float()
    errors = []
    for encoder in (stock, fast_copy(stock)):
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = output_and_gradients(encoder, images)
        differences = {name: rounded[name].double() - truth[name] for name in truth}
        errors.append({name: differences[name].norm() / truth[name].norm() for name in truth})
    stock_errors, fast_errors = errors
    assert 1e-3 < stock_errors["output"] < 0.1
    assert fast_errors["output"] < 1.1 * stock_errors["output"]
    # The rounding error of a single gradient is random; a lost digit would show in all of them.
    ratios = torch.stack([fast_errors[name] / stock_errors[name] for name in truth])
    assert ratios.log().mean().exp() < 1.15 and ratios.max() < 2


def test_parameters_stay_and_copies_and_pickles_work() -> None:
    stock = stock_encoder(64, torch.float32)
    fast = copy.deepcopy(stock)
    names = list(fast.state_dict())
    parameters = list(fast.parameters())
    use_fast_attention(fast)
    use_fast_attention(fast)
    assert list(fast.state_dict()) == names == list(stock.state_dict())
    assert all(a is b for a, b in zip(fast.parameters(), parameters, strict=True))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = fast(images)
        for duplicate in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert all(type(block) is FastBlock for block in duplicate.blocks)
            assert torch.equal(duplicate(images), expected)


def test_the_compiler_sees_one_graph() -> None:
    block = FastBlock(stock_encoder(80, torch.float32).blocks[0])
    x = torch.randn(1, 5, 5, 128)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("missing", [{"use_rel_pos": False}, {"qkv_bias": False}])
def test_other_encoders_are_refused(missing: dict[str, bool]) -> None:
    kind = {"use_rel_pos": True, "qkv_bias": True, **missing}
    encoder = ImageEncoderViT(64, embed_dim=16, depth=1, num_heads=2, **kind)
    with pytest.raises(ValueError, match="relative positions and a bias"):
        use_fast_attention(encoder)
    assert type(encoder.blocks[0]) is Block


def test_load_sam_returns_stock_blocks(tmp_path: Path) -> None:
    fast = build_sam("vit_tiny", 64, attention="fast")
    assert {type(block) for block in fast.image_encoder.blocks} == {FastBlock}
    save_tensors(tmp_path / "fast.ckpt", fast.state_dict())
    for sam in (load_sam(tmp_path / "fast.ckpt"), build_sam("vit_tiny", 64)):
        assert {type(block) for block in sam.image_encoder.blocks} == {Block}
    with pytest.raises(ValueError, match="'fast' or 'stock'"):
        build_sam("vit_tiny", 64, attention="flash")
