import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from coco_files import write_coco
from gloo_pool import GlooPool
from samft import assemble
from samft.attention import FastBlock
from samft.checkpoint import LAST_NAME, save_tensors
from samft.config import TrainConfig, parse_config
from samft.errors import CheckpointError, ConfigError, DataError, SharedError
from samft.sam import build_sam
from short_runs import arguments, write_data

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def a_config(data_root: Path, output_dir: Path = Path("nowhere"), **changes: Any) -> TrainConfig:
    return parse_config(arguments(data_root, output_dir, **changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def one_split(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("one_split")
    write_coco(root, 20)
    return root


# together


def fail_on_ranks(ranks: tuple[int, ...]) -> Any:
    rank = torch.distributed.get_rank()

    def build() -> int:
        if rank in ranks:
            raise DataError(f"rank {rank} cannot read its disk")
        return 10 + rank

    try:
        return assemble.together(build)
    except SharedError as error:
        return str(error)


def test_together_gives_each_rank_its_own_result(gloo2: GlooPool):
    assert gloo2.run(fail_on_ranks, ()) == [10, 11]


@pytest.mark.parametrize(("ranks", "said"), [((0,), 0), ((1,), 1), ((0, 1), 0)])
def test_together_tells_all_ranks_what_the_first_to_fail_found(gloo2: GlooPool, ranks, said):
    assert gloo2.run(fail_on_ranks, ranks) == [f"rank {said} cannot read its disk"] * 2


def test_together_without_a_group_passes_the_error_on():
    def fail() -> None:
        raise CheckpointError("no such file")

    with pytest.raises(CheckpointError, match="no such file"):
        assemble.together(fail)
    assert assemble.together(lambda: 3) == 3


# Precision


@pytest.mark.parametrize(
    ("amp", "device", "gpu_has_bf16", "dtype"),
    [
        ("off", GPU, True, None),
        ("bf16", CPU, False, torch.bfloat16),
        ("fp16", GPU, True, torch.float16),
        ("auto", CPU, True, None),
        ("auto", GPU, True, torch.bfloat16),
        ("auto", GPU, False, None),
    ],
)
def test_amp_dtype(amp, device, gpu_has_bf16, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: gpu_has_bf16)
    assert assemble.pick_amp_dtype(amp, device) is dtype


# Data


def test_splits_are_counted_with_what_was_left_out(data):
    splits = assemble.load_splits(a_config(data))
    objects = (1, 4, 2, 7, 3)
    assert splits.counts == {
        "train": {
            "images": 13,
            "masks": 2 * sum(objects) + sum(objects[:3]),
            "skipped": {},
            "bad_images": {},
        },
        "val": {
            "images": 5,
            "masks": sum(objects),
            "skipped": {"annotation-orphan": 1, "crowd": 1, "mask-missing": 1},
            "bad_images": {},
        },
    }
    assert splits.train.training and not splits.val.training


def test_skipped_objects_of_real_data(data_root):
    coco = assemble.load_splits(a_config(data_root / "coco_open104")).counts
    assert sum(split["skipped"]["crowd"] for split in coco.values()) == 13
    assert coco["val"]["images"] + coco["val"]["skipped"]["image-without-objects"] == 57
    flakes = assemble.load_splits(a_config(data_root / "hbn_flakes", val_split="test")).counts
    assert flakes["val"]["skipped"] == {"mask-missing": 1}


def test_valid_is_found_for_val(data_root):
    splits = assemble.load_splits(a_config(data_root / "hbn_flakes"))
    assert splits.val.index.file.image_folder.name == "valid"


def test_announcement_names_what_was_left_out(data, caplog):
    splits = assemble.load_splits(a_config(data))
    with caplog.at_level(logging.INFO, logger="samft"):
        splits.announce()
    words = [" ".join(message.split()) for message in caplog.messages]
    assert words[0] == "train: 13 images, 41 masks"
    val = words.index(
        "val: 5 images, 17 masks; left out: annotation-orphan 1, mask-missing 1, crowd 1"
    )
    assert [line.split()[:3] for line in words[val + 1 : val + 4]] == [
        ["warning", "annotation-orphan", "1"],
        ["warning", "mask-missing", "1"],
        ["note", "image-unused-bad", "1"],
    ]
    assert "images left out" not in caplog.text


def test_broken_images_are_named_one_by_one(tmp_path, caplog):
    for split in ("train", "val"):
        annotations = write_coco(tmp_path, 4, split=split)
        (annotations.parent / "image_1.png").unlink()
        (annotations.parent / "image_2.png").write_bytes(b"")
    with pytest.raises(DataError, match="image-missing, 1"):
        assemble.load_splits(a_config(tmp_path))
    splits = assemble.load_splits(a_config(tmp_path, on_bad_image="skip", val_split="train"))
    assert splits.counts["train"]["images"] == 2
    bad = {"image_1.png": "image-missing", "image_2.png": "image-empty"}
    assert splits.counts["train"]["bad_images"] == bad
    with caplog.at_level(logging.INFO, logger="samft"):
        splits.announce()
    assert "images left out: image_1.png (image-missing), image_2.png (image-empty)" in caplog.text


def test_images_of_the_validation_split_are_not_trained_on(tmp_path, caplog):
    write_coco(tmp_path, 6)
    write_coco(tmp_path, 3, split="val")  # the first three
    splits = assemble.load_splits(a_config(tmp_path))
    assert names(splits.train) == {"image_3.png", "image_4.png", "image_5.png"}
    assert splits.counts["train"]["skipped"] == {"image-in-train-and-val": 3}
    assert splits.counts["val"]["images"] == 3
    assert "3 training images are also in the validation split" in caplog.text


def test_one_split_for_both_is_said_loudly(data, caplog):
    splits = assemble.load_splits(a_config(data, val_split="train"))
    assert len(splits.train) == len(splits.val) == 13
    assert "EVERY TRAINING IMAGE IS ALSO IN THE VALIDATION SPLIT" in caplog.text


def test_classes_and_small_masks_are_chosen(data_root):
    config = a_config(data_root / "coco_open104", category_names="person, dog", min_mask_area=100)
    splits = assemble.load_splits(config)
    for dataset in (splits.train, splits.val):
        file, objects = dataset.index.file, dataset.index.objects
        chosen = {file.category_names[k] for k in file.categories[objects].tolist()}
        assert chosen <= {"person", "dog"} and file.areas[objects].min() >= 100
    assert splits.counts["train"]["skipped"]["objects-not-chosen"] > 100
    with pytest.raises(DataError, match=r"no class 'persons'.*Did you mean 'person'"):
        assemble.load_splits(a_config(data_root / "coco_open104", category_names="persons"))


def test_rare_classes_are_repeated(data_root, caplog):
    caplog.set_level(logging.INFO, logger="samft")
    index = assemble.load_splits(a_config(data_root / "coco_open104")).train.index
    assert assemble.count_repeats(index, None) is None
    repeats = assemble.count_repeats(index, 0.1)
    assert repeats is not None and len(repeats) == 47
    # A class in one of 47 images asks for sqrt(0.1 * 47) of them.
    assert repeats.max() == pytest.approx((0.1 * 47) ** 0.5)
    assert "come more than once" in caplog.text


def names(dataset: Any) -> set[str]:
    return {dataset.index.file_name(i) for i in range(dataset.index.num_images)}


def test_held_out_images_are_a_share_by_file_name_and_are_said(one_split, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="samft"):
        splits = assemble.load_splits(a_config(one_split, val_fraction=0.2, seed=1))
    train, val = names(splits.train), names(splits.val)
    assert (len(train), len(val)) == (16, 4) and not train & val
    said = next(text for text in caplog.messages if "held out" in text)
    assert "4 of 20" in said and all(name in said for name in val)

    # Neither the seed nor the order of the file, nor what else is in it, decides.
    document = json.loads((one_split / "train" / "_annotations.coco.json").read_text())
    document["images"].reverse()
    document["annotations"].reverse()
    shuffled = tmp_path / "shuffled.json"
    shuffled.write_text(json.dumps(document))
    again = assemble.load_splits(
        a_config(
            None,  # type: ignore[arg-type]
            train_annotations=shuffled,
            train_images=one_split / "train",
            val_fraction=0.2,
            seed=2,
        )
    )
    assert names(again.val) == val and names(again.train) == train


def test_larger_share_contains_the_smaller(one_split):
    shares = [assemble.load_splits(a_config(one_split, val_fraction=s)).val for s in (0.2, 0.5)]
    assert names(shares[0]) < names(shares[1])


def test_validation_split_wins_over_val_fraction(data, caplog):
    splits = assemble.load_splits(a_config(data, val_fraction=0.5))
    assert splits.counts["val"]["images"] == 5
    assert "val_fraction is not used" in caplog.text


def test_without_a_validation_split_the_way_out_is_named(one_split):
    with pytest.raises(DataError, match="set val_fraction"):
        assemble.load_splits(a_config(one_split))


def test_broken_validation_split_is_not_replaced_by_val_fraction(one_split, tmp_path):
    (tmp_path / "train").symlink_to(one_split / "train")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "_annotations.coco.json").write_text('{"images": [')
    with pytest.raises(DataError, match="not valid JSON") as caught:
        assemble.load_splits(a_config(tmp_path, val_fraction=0.2))
    assert "set val_fraction" not in str(caught.value)


def test_fingerprint_changes_with_the_training_objects_only(data, tmp_path):
    before = assemble.load_splits(a_config(data)).fingerprint
    assert assemble.load_splits(a_config(data, val_split="train")).fingerprint == before
    document = json.loads((data / "train" / "_annotations.coco.json").read_text())
    document["annotations"][0]["bbox"][2] += 1
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(document))
    config = a_config(data, train_annotations=changed, train_images=data / "train")
    assert assemble.load_splits(config).fingerprint != before


# Weights and model


@pytest.mark.parametrize("attention", ["fast", "stock"])
def test_the_encoder_has_the_attention_that_was_asked_for(data, attention):
    config = a_config(data, checkpoint_path="random", attention=attention)
    blocks = assemble.build_model(config, None, CPU).sam.image_encoder.blocks
    assert {isinstance(block, FastBlock) for block in blocks} == {attention == "fast"}


def test_the_decoder_is_the_one_that_was_asked_for(data):
    config = a_config(data, checkpoint_path="random", decoder="stock", mask_chunk=3)
    model = assemble.build_model(config, None, CPU)
    assert (model.decoder, model.mask_chunk) == ("stock", 3)


def test_random_weights_are_said_loudly(data, caplog):
    assert assemble.load_weights(a_config(data, checkpoint_path="random")) is None
    assert [r.levelno for r in caplog.records if "RANDOM" in r.getMessage()] == [logging.WARNING]


def test_random_weights_depend_on_the_seed_only(data):
    def weights(seed: int) -> torch.Tensor:
        config = a_config(data, checkpoint_path="random", seed=seed)
        torch.rand(3)
        model = assemble.build_model(config, None, CPU)
        return model.sam.mask_decoder.mask_tokens.weight

    assert torch.equal(weights(5), weights(5))
    assert not torch.equal(weights(5), weights(6))


def test_checkpoint_of_another_model_type_names_both(data, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 64, 64, 768)}, path)
    with pytest.raises(CheckpointError, match="is a vit_b, but model_type is vit_tiny"):
        assemble.load_weights(a_config(data, checkpoint_path=path))


def test_weights_are_loaded_and_parts_frozen_as_asked(data, tmp_path, caplog):
    state = build_sam("vit_tiny", 64).state_dict()
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    config = a_config(data, checkpoint_path=path, freeze_image_encoder=True)
    with caplog.at_level(logging.INFO, logger="samft"):
        model = assemble.build_model(config, assemble.load_weights(config), CPU)
    loaded = model.sam.state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    training = {name.split(".")[0] for name, p in model.sam.named_parameters() if p.requires_grad}
    assert training == {"prompt_encoder", "mask_decoder"}
    frozen = next(text for text in caplog.messages if "box prompts cannot reach" in text)
    assert "prompt_encoder.not_a_point_embed.weight" in frozen
    assert "mask_decoder.output_hypernetworks_mlps.3.layers.2.bias" in frozen


# Resume


def a_state(config: TrainConfig, **changes: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "config": vars(config),
        "global_batch": 2,
        "fingerprint": "abc",
        **changes,
    }


def find(config: TrainConfig, folder: Path, state: dict[str, Any]) -> dict[str, Any] | None:
    save_tensors(folder / LAST_NAME, state)
    return assemble.find_resume(config, folder, "abc")


def test_resume_takes_up_a_run_of_the_same_configuration(data, tmp_path):
    config = a_config(data)
    assert find(config, tmp_path, a_state(config)) == {**a_state(config), "folder": tmp_path}


def test_resume_never_and_an_empty_folder_start_afresh(data, tmp_path):
    assert assemble.find_resume(a_config(data), tmp_path, "abc") is None
    config = a_config(data, resume="never")
    assert find(config, tmp_path, a_state(config)) is None


def test_resume_of_a_path_that_is_not_there_is_an_error(data, tmp_path):
    config = a_config(data, resume=tmp_path / "gone.ckpt")
    with pytest.raises(CheckpointError, match="gone.ckpt"):
        assemble.find_resume(config, tmp_path, "abc")


@pytest.mark.parametrize(
    ("asked", "saved", "shown"),
    [
        ({"learning_rate": 2e-3}, {}, ("learning_rate", "0.001", "0.002")),
        ({"image_size": 128}, {}, ("image_size", "64", "128")),
        ({"batch_size": 4}, {}, ("images per step", "2", "4")),
        ({}, {"fingerprint": "xyz"}, ("training data", "xyz", "abc")),
    ],
    ids=lambda value: ",".join(value),
)
def test_resume_is_refused_with_a_table(asked, saved, shown, data, tmp_path):
    state = a_state(a_config(data), **saved)
    with pytest.raises(ConfigError, match="--resume never") as caught:
        find(a_config(data, **asked), tmp_path, state)
    header, row = str(caught.value).splitlines()[1:3]
    assert header.split() == ["field", "the", "run", "has", "asked", "for"]
    name, before, after = shown
    assert row.strip().startswith(name)
    assert row.removeprefix(f"  {name}").split() == [before, after]


def test_resume_allows_the_same_step_divided_otherwise(data, tmp_path):
    config = a_config(data, batch_size=1, accumulate_steps=2, num_workers=3, metrics_interval=7)
    assert find(config, tmp_path, a_state(a_config(data))) is not None
