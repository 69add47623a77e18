"""Building, reading, fitting and freezing SAM, and which checkpoints are refused."""

import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import Sam
from torch import Tensor, nn

import samft
from samft.checkpoints.top_k import save_tensors
from samft.errors import CheckpointError
from samft.models.prompted_sam import PromptedSam
from samft.models.sam import (
    MODEL_SHAPES,
    build_sam,
    fit_positions,
    identify_model,
    load_sam,
    load_state,
    open_checkpoint,
    read_state,
)
from samft.models.trainable import constant_names, freeze, unreached_by
from samft.runtime.files import sha256_of
from samft.weights.saved_settings import saved_prompts

slow = pytest.mark.skipif(not os.environ.get("SAMFT_SLOW"), reason="slow: set SAMFT_SLOW=1")

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def tiny() -> Sam:
    torch.manual_seed(2)
    sam = build_sam("vit_tiny", 128)
    for name, parameter in sam.named_parameters():
        if "pos" in name:  # built as zeros, which would hide a wrong resampling
            nn.init.normal_(parameter)
    return sam


@pytest.fixture
def state(tiny: Sam) -> State:
    return {name: tensor.clone() for name, tensor in tiny.state_dict().items()}


def shapes_of(sam: Sam) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in sam.state_dict().items()}


def forward_and_backward(sam: Sam) -> None:
    size = sam.image_encoder.img_size
    logits, iou = PromptedSam(sam)(
        torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8),
        torch.tensor([[0.0, 0.0, size / 2, size / 3]]),
        torch.zeros(1, dtype=torch.int64),
    )
    assert logits.shape == (1, size // 4, size // 4)
    (logits.mean() + iou.sum()).backward()
    gradient = sam.image_encoder.patch_embed.proj.weight.grad
    assert torch.isfinite(gradient).all() and gradient.any()


@pytest.mark.parametrize("model_type", ["vit_h", "vit_l", "vit_b"])
def test_metas_types_have_metas_keys_and_shapes(model_type: str) -> None:
    with torch.device("meta"):
        ours, stock = build_sam(model_type), sam_model_registry[model_type]()
    assert shapes_of(ours) == shapes_of(stock)
    assert not ours.training


def test_the_package_offers_what_builds_and_loads() -> None:
    assert (samft.build_sam, samft.load_sam) == (build_sam, load_sam)
    assert {"build_sam", "load_sam"} < set(samft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        samft.load  # noqa: B018


def test_tiny_is_about_two_million_parameters(tiny: Sam) -> None:
    assert 1.5e6 < sum(parameter.numel() for parameter in tiny.parameters()) < 2.5e6


@pytest.mark.parametrize("model_type", MODEL_SHAPES)
@pytest.mark.parametrize("image_size", [256, 512, 768, 1024])
def test_type_and_image_size_are_identified(model_type: str, image_size: int) -> None:
    with torch.device("meta"):
        sam = build_sam(model_type, image_size)
    assert identify_model(sam.state_dict()) == (model_type, image_size)
    assert sam.prompt_encoder.image_embedding_size == (image_size // 16, image_size // 16)


def test_vit_b_at_256_trains() -> None:
    forward_and_backward(build_sam("vit_b", 256))


@slow
@pytest.mark.parametrize("image_size", [256, 512, 768, 1024])
def test_vit_b_trains_at_every_image_size(image_size: int) -> None:
    sam = build_sam("vit_b", image_size)
    load_state(sam, build_sam("vit_b", 1024).state_dict())
    forward_and_backward(sam)


@pytest.mark.parametrize("image_size", [64, 80, 128, 192])
def test_tiny_trains_at_every_image_size(state: State, image_size: int) -> None:
    sam = build_sam("vit_tiny", image_size)
    load_state(sam, state)
    forward_and_backward(sam)


def test_the_stock_registry_reads_a_saved_model(tmp_path: Path) -> None:
    sam = build_sam("vit_b")
    save_tensors(tmp_path / "ours.ckpt", sam.state_dict())
    stock = sam_model_registry["vit_b"](checkpoint=str(tmp_path / "ours.ckpt"))
    torch.testing.assert_close(stock.state_dict(), sam.state_dict(), rtol=0, atol=0)


def test_a_saved_model_is_loaded_bit_identical(tmp_path: Path, tiny: Sam) -> None:
    path = tmp_path / "tiny.ckpt"
    save_tensors(path, tiny.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = samft.load_sam(path)
    assert loaded.image_encoder.img_size == 128 and not loaded.training
    torch.testing.assert_close(loaded.state_dict(), tiny.state_dict(), rtol=0, atol=0)


def test_the_model_is_read_from_a_training_state(tmp_path: Path, state: State) -> None:
    save_tensors(tmp_path / "last.ckpt", {"format": 1, "model": state, "step": 3})
    torch.testing.assert_close(read_state(tmp_path / "last.ckpt"), state, rtol=0, atol=0)


def test_a_loaded_sam_works_in_the_stock_predictor(tmp_path: Path, tiny: Sam) -> None:
    save_tensors(tmp_path / "tiny.ckpt", tiny.state_dict())
    predictor = SamPredictor(load_sam(str(tmp_path / "tiny.ckpt")))
    predictor.set_image(np.zeros((50, 90, 3), np.uint8))
    masks, iou, _ = predictor.predict(box=np.array([3, 4, 60, 40]), multimask_output=False)
    assert masks.shape == (1, 50, 90) and iou.shape == (1,)


def test_loading_a_squashed_model_warns(tmp_path: Path, tiny: Sam) -> None:
    save_tensors(tmp_path / "tiny.ckpt", tiny.state_dict())
    (tmp_path / "tiny.json").write_text(json.dumps({"resize_mode": "squash"}))
    with pytest.warns(UserWarning, match="squash"):
        load_sam(tmp_path / "tiny.ckpt")


def test_relative_positions_are_resized_as_attention_does_at_run_time(state: State) -> None:
    # The stock attention interpolates a table of another length on every call.
    images = torch.randn(1, 3, 192, 192)
    fitted, unfitted = build_sam("vit_tiny", 192), build_sam("vit_tiny", 192)
    load_state(fitted, state)
    load_state(unfitted, state)
    num_replaced = 0
    for number, block in enumerate(unfitted.image_encoder.blocks):
        for table in ("rel_pos_h", "rel_pos_w"):
            original = state[f"image_encoder.blocks.{number}.attn.{table}"]
            num_replaced += original.shape != getattr(block.attn, table).shape
            setattr(block.attn, table, nn.Parameter(original))
    assert num_replaced == 4  # two tables of two blocks with global attention
    with torch.no_grad():
        ours, stock = fitted.image_encoder(images), unfitted.image_encoder(images)
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("image_size", [64, 192])
def test_only_positions_are_resampled(state: State, image_size: int) -> None:
    sam = build_sam("vit_tiny", image_size)
    grid = image_size // 16
    rows = torch.linspace(-1, 1, 8)[None, :, None, None]
    state["image_encoder.pos_embed"] = rows.expand(1, 8, 8, 128).clone()
    fitted = fit_positions(state, sam)
    assert {name: tensor.shape for name, tensor in fitted.items()} == shapes_of(sam)
    positions = fitted["image_encoder.pos_embed"][0]
    # Constant along columns and channels as before, and still a ramp along rows.
    flat = positions[:, :1, :1].expand(grid, grid, 128)
    torch.testing.assert_close(positions, flat, atol=1e-5, rtol=0)
    assert (positions[1:, 0, 0] > positions[:-1, 0, 0]).all()
    torch.testing.assert_close(positions.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    changed = [name for name in state if fitted[name] is not state[name]]
    assert changed == [
        "image_encoder.pos_embed",
        "image_encoder.blocks.1.attn.rel_pos_h",
        "image_encoder.blocks.1.attn.rel_pos_w",
        "image_encoder.blocks.3.attn.rel_pos_h",
        "image_encoder.blocks.3.attn.rel_pos_w",
    ]


def test_half_precision_weights_are_read(state: State) -> None:
    sam = build_sam("vit_tiny", 64)
    load_state(sam, {name: tensor.half() for name, tensor in state.items()})
    assert {parameter.dtype for parameter in sam.parameters()} == {torch.float32}


def without(state: State, *names: str) -> State:
    return {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: without(s, "mask_decoder.iou_token.weight"),
            "1 missing (mask_decoder.iou_token.weight)",
        ),
        (lambda s: {}, " missing (image_encoder.pos_embed, image_encoder.patch_embed.proj.weight"),
        (lambda s: {**s, "adapter.weight": torch.ones(1)}, "1 unknown (adapter.weight)"),
        (
            lambda s: {**s, "mask_decoder.iou_token.weight": torch.ones(1, 256)},
            "1 of another shape (mask_decoder.iou_token.weight)",
        ),
        (
            lambda s: {**s, "image_encoder.blocks.1.attn.rel_pos_h": torch.ones(32)},
            "1 of another shape (image_encoder.blocks.1.attn.rel_pos_h)",
        ),
        (
            lambda s: {**s, "image_encoder.neck.1.weight": torch.full((128,), torch.nan)},
            "not finite, in 1 tensors (image_encoder.neck.1.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(state: State, change: Any, message: str) -> None:
    sam = build_sam("vit_tiny", 128)
    before = {name: tensor.clone() for name, tensor in sam.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_state(sam, change(state), source="the.ckpt")
    assert str(caught.value).startswith("the.ckpt ")
    assert message in str(caught.value)
    torch.testing.assert_close(sam.state_dict(), before, rtol=0, atol=0)


def test_weights_of_another_type_are_refused(state: State) -> None:
    with torch.device("meta"):
        other = build_sam("vit_b", 128)
    with pytest.raises(CheckpointError, match="of another shape"):
        load_state(build_sam("vit_tiny", 128), other.state_dict())


@pytest.mark.parametrize(
    "state, message",
    [
        ({}, "no SAM image encoder"),
        ({"image_encoder.trunk.pos_embed": torch.zeros(1, 8, 8, 96)}, "no SAM image encoder"),
        ({"image_encoder.pos_embed": torch.zeros(64)}, "no SAM image encoder"),
        ({"image_encoder.pos_embed": torch.zeros(1, 64, 64, 96)}, "96 wide"),
    ],
)
def test_a_state_dict_of_another_model_is_refused(state: State, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        identify_model(state, source="the.ckpt")
    assert str(caught.value).startswith("the.ckpt ")


def assert_refused(path: Path, *messages: str) -> None:
    for read in (read_state, load_sam):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        for message in (str(path), *messages):
            assert message in str(caught.value)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent.pth", "there is no file")
    assert_refused(tmp_path, "is a folder: name a file in it")


def test_a_file_cut_short_is_refused(tmp_path: Path, state: State) -> None:
    path = tmp_path / "a.pth"
    save_tensors(path, state)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert_refused(path, "not a readable checkpoint", "cut short")


def test_a_file_with_another_hash_than_its_sidecars_is_refused(
    tmp_path: Path, state: State
) -> None:
    path, sidecar = tmp_path / "a.ckpt", tmp_path / "a.json"
    save_tensors(path, state)
    digest = sha256_of(path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    for recorded in (digest, ["0", digest]):
        sidecar.write_text(json.dumps({"sha256": recorded}))
        path.write_bytes(whole)
        torch.testing.assert_close(read_state(path), state, rtol=0, atol=0)
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        assert_refused(path, "is damaged: its SHA-256 is not the one in a.json", "Copy it again")


@pytest.mark.parametrize("sidecar", [None, {"resize_mode": "pad"}, {"sha256": []}])
def test_a_file_without_a_recorded_hash_is_read(
    tmp_path: Path, state: State, sidecar: dict[str, Any] | None
) -> None:
    path = tmp_path / "a.ckpt"
    save_tensors(path, state)
    if sidecar is not None:
        (tmp_path / "a.json").write_text(json.dumps(sidecar))
    torch.testing.assert_close(read_state(path), state, rtol=0, atol=0)


def test_a_json_file_beside_one_of_metas_is_not_a_sidecar(tmp_path: Path, state: State) -> None:
    save_tensors(tmp_path / "a.pth", state)
    (tmp_path / "a.json").write_text(json.dumps({"sha256": "0"}))
    torch.testing.assert_close(read_state(tmp_path / "a.pth"), state, rtol=0, atol=0)


def test_a_file_of_other_content_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_text("<html>404</html>\n")
    assert_refused(path, "not a readable checkpoint")
    for content in ([torch.ones(1)], {"step": 3}, {"model": {"lr": 0.1}}, torch.ones(2)):
        torch.save(content, path)
        assert_refused(path, "holds no flat dict of SAM's tensors")


class Bomb:
    """Unpickling it would run a command."""

    def __init__(self, planted: Path) -> None:
        self.planted = planted

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.planted}'",)


def test_a_checkpoint_that_would_run_a_command_is_refused(tmp_path: Path, state: State) -> None:
    planted, path = tmp_path / "planted", tmp_path / "bomb.pth"
    torch.save({**state, "extra": Bomb(planted)}, path)
    assert_refused(path, "not a readable checkpoint")
    path.write_bytes(pickle.dumps(Bomb(planted), protocol=2))
    assert_refused(path, "not a readable checkpoint")
    assert not planted.exists()
    pickle.loads(path.read_bytes())  # to show that the bomb was live
    assert planted.exists()


UNREACHABLE_IN_PROMPT_ENCODER = [
    "point_embeddings.0.weight",
    "point_embeddings.1.weight",
    "not_a_point_embed.weight",
    *[f"mask_downscaling.{n}.{kind}" for n in (0, 1, 3, 4, 6) for kind in ("weight", "bias")],
]
UNREACHABLE_IN_MASK_DECODER = [
    f"output_hypernetworks_mlps.{number}.layers.{layer}.{kind}"
    for number in (1, 2, 3)
    for layer in range(3)
    for kind in ("weight", "bias")
]


def test_exactly_the_parameters_that_boxes_cannot_reach_are_frozen() -> None:
    sam = build_sam("vit_tiny", 64)
    prompt = [f"prompt_encoder.{name}" for name in UNREACHABLE_IN_PROMPT_ENCODER]
    decoder = [f"mask_decoder.{name}" for name in UNREACHABLE_IN_MASK_DECODER]
    assert (len(prompt), len(decoder)) == (13, 18)
    assert freeze(sam, []) == prompt + decoder
    frozen = {name for name, p in sam.named_parameters() if not p.requires_grad}
    assert frozen == set(prompt + decoder)
    # By experiment: all other parameters get a gradient that is not zero, and these get none.
    forward_and_backward(sam.requires_grad_(True))
    idle = {n for n, p in sam.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == frozen


MASK_PROMPTS = [name for name in UNREACHABLE_IN_PROMPT_ENCODER if name.startswith("mask_")]
NEGATIVE, POSITIVE, PADDING = UNREACHABLE_IN_PROMPT_ENCODER[:3]
CORNERS = ["point_embeddings.2.weight", "point_embeddings.3.weight"]
FIRST_MASK = [name.replace("mlps.1", "mlps.0") for name in UNREACHABLE_IN_MASK_DECODER[:6]]


@pytest.mark.parametrize(
    ("prompts", "in_prompt_encoder", "in_mask_decoder"),
    [
        ({"prompts": "box"}, UNREACHABLE_IN_PROMPT_ENCODER, UNREACHABLE_IN_MASK_DECODER),
        # Rounds without a mask prompt, and with; the box is there in every round.
        ({"prompts": "box", "corrections": 2}, [PADDING, *MASK_PROMPTS], None),
        ({"prompts": "box", "corrections": 2, "mask_prompt": 0.1}, [PADDING], None),
        ({"prompts": "box", "mask_prompt": 1.0}, UNREACHABLE_IN_PROMPT_ENCODER, None),
        ({"prompts": "point"}, [NEGATIVE, *CORNERS, *MASK_PROMPTS], None),
        ({"prompts": "point", "corrections": 1}, [*CORNERS, *MASK_PROMPTS], None),
        # One point only, three masks of it: no prompt asks for the first mask.
        (
            {"prompts": "point", "multimask": "best"},
            [NEGATIVE, *CORNERS, *MASK_PROMPTS],
            FIRST_MASK,
        ),
        (
            {"prompts": "point", "corrections": 1, "multimask": "best"},
            [*CORNERS, *MASK_PROMPTS],
            [],
        ),
        ({"prompts": "mixed"}, [NEGATIVE, *MASK_PROMPTS], None),
        ({"prompts": "mixed", "multimask": "best"}, [NEGATIVE, *MASK_PROMPTS], []),
        ({"prompts": "mixed", "corrections": 7, "mask_prompt": 0.5}, [], None),
        ({"prompts": "mixed", "corrections": 7, "mask_prompt": 0.5, "multimask": "best"}, [], []),
    ],
)
def test_what_is_frozen_follows_from_the_prompts(
    prompts: dict[str, Any], in_prompt_encoder: list[str], in_mask_decoder: list[str] | None
) -> None:
    sam = build_sam("vit_tiny", 64)
    if in_mask_decoder is None:  # one mask of each prompt
        in_mask_decoder = UNREACHABLE_IN_MASK_DECODER
    expected = {f"prompt_encoder.{name}" for name in in_prompt_encoder}
    expected |= {f"mask_decoder.{name}" for name in in_mask_decoder}
    assert set(freeze(sam, [], unreached=unreached_by(**prompts))) == expected
    assert {name for name, p in sam.named_parameters() if not p.requires_grad} == expected


@pytest.mark.parametrize("part", ["image_encoder", "prompt_encoder", "mask_decoder"])
def test_a_part_is_frozen_as_a_whole(part: str) -> None:
    sam = build_sam("vit_tiny", 64)
    everything = freeze(sam, [])
    unreachable = freeze(sam, [part])
    assert unreachable == [name for name in everything if not name.startswith(part)]
    frozen = {name for name, p in sam.named_parameters() if not p.requires_grad}
    whole = {f"{part}.{name}" for name, _ in getattr(sam, part).named_parameters()}
    assert frozen == whole | set(unreachable)
    freeze(sam, [])  # unfreezes what the last call froze
    assert {n for n, p in sam.named_parameters() if not p.requires_grad} == set(everything)


@pytest.mark.parametrize("parts", [[], ["image_encoder"], ["image_encoder", "prompt_encoder"]])
def test_constant_names_are_all_but_the_trained_ones(parts: list[str]) -> None:
    sam = build_sam("vit_tiny", 64)
    freeze(sam, parts)
    constant = constant_names(sam)
    trained = [name for name, p in sam.named_parameters() if p.requires_grad]
    assert sorted([*constant, *trained]) == sorted(sam.state_dict())
    assert any(name.startswith("image_encoder.") for name in constant) == ("image_encoder" in parts)
    # A buffer, which no optimizer ever sees.
    assert "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix" in constant


@pytest.mark.parametrize(
    ("sidecar", "resize_mode"),
    [
        (None, "pad"),
        ('{"resize_mode": "squash"}', "squash"),
        ('{"resize_mode": "pad"}', "pad"),
        ('{"resize_mode": 7}', "pad"),
        ("[]", "pad"),
        ("no JSON", "pad"),
    ],
)
def test_a_checkpoint_is_opened_with_its_resize_mode(
    tmp_path: Path, sidecar: str | None, resize_mode: str
) -> None:
    path = tmp_path / "tiny.pth"
    torch.save(build_sam("vit_tiny", 64).state_dict(), path)
    if sidecar is not None:
        path.with_suffix(".json").write_text(sidecar)
    opened = open_checkpoint(path, attention="fast")
    sam = opened.sam
    assert (opened.resize_mode, sam.image_encoder.img_size) == (resize_mode, 64)
    assert not sam.training
    assert type(sam.image_encoder.blocks[0]).__module__ == "samft.models.image_encoder"


RUN = {"checkpoint_path": "auto", "model_type": "vit_tiny"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (RUN, (True, False)),
        ({**RUN, "prompts": "box", "correction_rounds": None}, (True, False)),
        ({**RUN, "prompts": "box", "correction_rounds": 2}, (False, False)),
        ({**RUN, "prompts": "point", "multimask": "best"}, (False, True)),
        ({**RUN, "prompts": "mixed", "multimask": "off"}, (False, False)),
        ({}, None),
        ("no configuration", None),
    ],
)
def test_the_prompts_of_a_training_are_read_from_wherever_they_are(
    config: Any, expected: Any, tmp_path: Path, state: State
) -> None:
    torch.save(state, tmp_path / "a.ckpt")
    (tmp_path / "a.json").write_text(json.dumps({"model_type": "vit_tiny", "config": config}))
    assert saved_prompts(tmp_path / "a.ckpt") == expected
    if isinstance(config, dict):
        torch.save({"format": 2, "config": config, "model": state}, tmp_path / "last.ckpt")
        assert saved_prompts(tmp_path / "last.ckpt") == expected
        # As `samft export` writes it; of a checkpoint without a run it knows no step.
        metadata = {"step": "30"} if config else {}
        metadata |= {name: str(value) for name, value in config.items() if value is not None}
        save_file(state, tmp_path / "a.safetensors", metadata | {"model_type": "vit_tiny"})
        (tmp_path / "a.json").unlink()
        assert saved_prompts(tmp_path / "a.safetensors") == expected
    torch.save(state, tmp_path / "metas.pth")
    assert saved_prompts(tmp_path / "metas.pth") is None
