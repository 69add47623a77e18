"""A frozen encoder's copy for autocast: the same bits without a cast of any weight."""

import copy
import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.trainers import make_sample
from samft.data.dataset import collate
from samft.models.frozen_encoder import CastEncoder, cast_frozen_weights
from samft.models.image_encoder import checkpoint_activations, compile_blocks
from samft.models.prompted_sam import PromptedSam
from samft.models.prompts import Prompts
from samft.models.sam import build_sam
from samft.models.trainable import freeze
from samft.training.engine import Trainer
from samft.training.losses import mask_losses
from samft.training.optim import build_optimizer

HALVES = [torch.bfloat16, torch.float16]
SIZE = 64


def frozen_model(
    image_size: int = SIZE, *, attention: str = "fast", checkpointing: str = "none"
) -> PromptedSam:
    torch.manual_seed(0)
    sam = build_sam("vit_tiny", image_size, attention=attention)
    for name, parameter in sam.image_encoder.named_parameters():
        if "pos" in name or "bias" in name:  # built as zeros, which would hide an error
            nn.init.normal_(parameter, std=0.5)
    freeze(sam, ["image_encoder"])
    sam.image_encoder = checkpoint_activations(sam.image_encoder, checkpointing)
    return PromptedSam(sam)


def images_of(model: PromptedSam, count: int = 2) -> Tensor:
    size = model.sam.image_encoder.img_size
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def cast_at_each_use(model: PromptedSam, images: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype):
        return model.sam.image_encoder(model.preprocess(images, None))


def embed(model: PromptedSam, images: Tensor, dtype: torch.dtype | None) -> Tensor:
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        return model.embed(images)


# 64 px are less than a window, 144 stick out by a token; at 288, a CPU takes positions as a mask.
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("image_size", "options"),
    [
        (64, {}),
        (144, {}),
        (288, {}),
        (144, {"attention": "stock"}),
        (144, {"checkpointing": "blocks"}),
        (144, {"checkpointing": "full", "attention": "stock"}),
    ],
)
def test_embeddings_are_those_of_weights_cast_at_each_use(
    image_size: int, options: dict[str, str], dtype: torch.dtype
) -> None:
    model = frozen_model(image_size, **options)
    images = images_of(model)
    expected = cast_at_each_use(model, images, dtype)
    for _ in range(2):
        assert torch.equal(embed(model, images, dtype), expected)


class Reads(TorchDispatchMode):
    """Records which tensors are cast, and how often vectors are made of tables of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.cast: set[int] = set()  # addresses
        self.table_operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_to_copy":
            self.cast.add(args[0].data_ptr())
        if name in ("flip", "unfold"):
            self.table_operations[name] += 1
        return func(*args, **(kwargs or {}))


def test_weights_are_cast_and_tables_read_once() -> None:
    model = frozen_model()
    images = images_of(model)
    weights = {parameter.data_ptr() for parameter in model.sam.image_encoder.parameters()}
    with Reads() as plain:
        cast_at_each_use(model, images, torch.bfloat16)
    # Of each block 4 matrices with their biases, 4 of convolutions; 2 tables of each block.
    assert len(plain.cast & weights) == 4 * 4 * 2 + 4
    assert plain.table_operations == {"flip": 4 * 2 * 2, "unfold": 4 * 2}
    embed(model, images, torch.bfloat16)
    with Reads() as second:
        embed(model, images, torch.bfloat16)
    assert not second.cast & weights and not second.table_operations


def test_float32_runs_the_encoder_itself() -> None:
    model = frozen_model()
    encoder = model.sam.image_encoder
    assert CastEncoder().select(encoder, "cpu") is encoder
    images = images_of(model)
    embed(model, images, torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(embed(model, images, None), encoder(model.preprocess(images, None)))


def change_in_place(module: nn.Module, name: str = "blocks.0.attn.qkv.weight") -> None:
    with torch.no_grad():
        module.get_parameter(name).mul_(1.5)


def load(encoder: nn.Module, *, assign: bool) -> None:
    state = {name: tensor * 1.5 for name, tensor in encoder.state_dict().items()}
    encoder.load_state_dict(state, assign=assign)
    encoder.requires_grad_(False)


def replace_weight(encoder: nn.Module) -> None:
    linear = encoder.blocks[3].mlp.lin2
    linear.weight = nn.Parameter(linear.weight.detach() * 1.5, requires_grad=False)


def replace_module(encoder: nn.Module) -> None:
    encoder.blocks[3].mlp = copy.deepcopy(encoder.blocks[2].mlp)


def move_storage(encoder: nn.Module) -> None:
    for parameter in encoder.parameters():
        parameter.data = parameter.data * 1.5


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        lambda encoder: load(encoder, assign=False),
        lambda encoder: load(encoder, assign=True),
        replace_weight,
        replace_module,
        lambda encoder: change_in_place(encoder, "blocks.1.attn.rel_pos_w"),
        move_storage,
        lambda encoder: encoder.requires_grad_(True),
    ],
    ids=["in place", "load", "load, assign", "weight", "module", "table", "move", "train"],
)
def test_the_copy_follows_its_weights(change: Any) -> None:
    model = frozen_model()
    images = images_of(model)
    before = embed(model, images, torch.bfloat16)
    change(model.sam.image_encoder)
    after = embed(model, images, torch.bfloat16)
    assert torch.equal(after, cast_at_each_use(model, images, torch.bfloat16))
    trained = next(model.sam.image_encoder.parameters()).requires_grad
    assert after.requires_grad is trained and torch.equal(after, before) is trained


def test_a_step_of_the_trained_part_leaves_the_copy() -> None:
    encoder = frozen_model().sam.image_encoder
    cast = CastEncoder()
    with torch.autocast("cpu", torch.bfloat16):
        encoder.neck.requires_grad_(True)
        first = cast.select(encoder, "cpu")
        change_in_place(encoder.neck, "0.weight")
        assert cast.select(encoder, "cpu") is first is not encoder
        encoder.requires_grad_(True)
        assert cast.select(encoder, "cpu") is encoder


@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
def test_behind_a_frozen_prefix_gradients_are_the_same(checkpointing: str) -> None:
    model = frozen_model(144, checkpointing=checkpointing)
    encoder = model.sam.image_encoder
    for part in (encoder.blocks[2:], encoder.neck):
        part.requires_grad_(True)
    x = model.preprocess(images_of(model), None)
    results = []
    for module in (encoder, cast_frozen_weights(encoder, torch.bfloat16)):
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = module(x)
        output.square().sum().backward()
        gradients = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
        results.append((output, gradients))
    (output, gradients), (output_of_copy, gradients_of_copy) = results
    assert torch.equal(output, output_of_copy)
    assert len(gradients) == len([p for p in encoder.parameters() if p.requires_grad])
    assert gradients.keys() == gradients_of_copy.keys()
    assert all(torch.equal(gradients[name], gradients_of_copy[name]) for name in gradients)


def test_training_is_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [collate([make_sample(number)]) for number in (1, 2)]
    weights = []
    for with_copy in (True, False):
        if not with_copy:
            monkeypatch.setattr(CastEncoder, "select", lambda _, encoder, device_type: encoder)
        model = frozen_model()
        optimizer = build_optimizer(model, learning_rate=1e-3, weight_decay=0.01)
        trainer = Trainer(
            model,
            optimizer,
            learning_rate_at=lambda step: 1e-3,
            loss=mask_losses,
            amp_dtype=torch.bfloat16,
        )
        assert all(trainer.train_step([batch]) for batch in batches)
        weights.append(model.sam.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_model_is_as_it_was_but_for_the_copy() -> None:
    model = frozen_model()
    images = images_of(model)
    names = [name for name, _ in model.named_parameters()]
    expected = embed(model, images, torch.bfloat16)
    assert [name for name, _ in model.named_parameters()] == names
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    state = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert set(state.values()) == {torch.float32} and len(state) == len(names) + 1  # a buffer
    duplicate = copy.deepcopy(model)
    change_in_place(model.sam.image_encoder)
    assert torch.equal(embed(duplicate, images, torch.bfloat16), expected)


def test_a_copy_made_in_inference_mode_serves_training() -> None:
    model = frozen_model()
    images = images_of(model)
    with torch.inference_mode():
        embed(model, images, torch.bfloat16)
    embeddings = embed(model, images, torch.bfloat16)
    boxes, index = torch.tensor([[4.0, 4.0, 40.0, 40.0]]), torch.tensor([1])
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model.decode(embeddings, Prompts(boxes=boxes), index)
    logits.float().sum().backward()
    with torch.inference_mode():  # weights that are inference tensors themselves
        other = frozen_model()
        assert torch.equal(embed(other, images, torch.bfloat16), embeddings)


def test_without_its_encoder_a_model_keeps_no_copy() -> None:
    model = frozen_model()
    encoder = model.sam.image_encoder
    with torch.autocast("cpu", torch.bfloat16):
        copies = [weakref.ref(model._cast_encoder.select(encoder, "cpu")) for _ in range(2)]
    assert copies[0]() is copies[1]() is not None
    model.unload_encoder()
    gc.collect()
    assert copies[0]() is None


def test_compiled_blocks_are_compiled_in_the_copy() -> None:
    encoder = frozen_model(80).sam.image_encoder
    assert cast_frozen_weights(encoder, torch.bfloat16).blocks[0]._compiled_call_impl is None
    compile_blocks(encoder)
    duplicate = cast_frozen_weights(encoder, torch.bfloat16)
    assert all(block._compiled_call_impl is not None for block in duplicate.blocks)
    block = duplicate.blocks[0]
    compiled = torch.compile(block.forward, backend="eager", fullgraph=True)
    x = torch.randn(1, 5, 5, 128)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), block.forward(x))
