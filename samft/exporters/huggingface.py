"""Writes the three files of `transformers`' SamModel: configuration, weights, preprocessor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide

from samft.exporters.verification import PredictFunction, Prediction, VerificationSample
from samft.exporters.weight_files import save_safetensors
from samft.models.sam import MODEL_SHAPES, PATCH_SIZE, PIXEL_MEAN, PIXEL_STD, identify_model
from samft.runtime.device import exact_float32
from samft.runtime.files import write_json
from samft.weights.huggingface_names import to_huggingface_names

CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"


def model_config(model_type: str, image_size: int) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        model_type: A key of `MODEL_SHAPES`.
        image_size: Side of the model input, px.
    """
    shape = MODEL_SHAPES[model_type]
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "torch_dtype": "float32",
        "vision_config": {
            "model_type": "sam_vision_model",
            "hidden_size": shape.encoder_width,
            "output_channels": shape.decoder_width,
            "num_hidden_layers": shape.encoder_depth,
            "num_attention_heads": shape.encoder_heads,
            "image_size": image_size,
            "patch_size": PATCH_SIZE,
            "window_size": shape.window_size,
            "global_attn_indexes": list(shape.global_attention_blocks),
            "num_pos_feats": shape.decoder_width // 2,
            "mlp_dim": 4 * shape.encoder_width,
        },
        "prompt_encoder_config": {
            "model_type": "sam_prompt_encoder",
            "hidden_size": shape.decoder_width,
            "image_size": image_size,
            "patch_size": PATCH_SIZE,
        },
        "mask_decoder_config": {
            "model_type": "sam_mask_decoder",
            "hidden_size": shape.decoder_width,
            "mlp_dim": shape.decoder_mlp_width,
            "iou_head_hidden_dim": shape.decoder_width,
            "layer_norm_eps": 1e-5,  # of SAM's decoder; transformers' default is 1e-6
        },
    }


def processor_config(image_size: int) -> dict[str, Any]:
    """The content of `preprocessor_config.json`.

    Args:
        image_size: Side of the model input, px.
    """
    return {
        "image_processor_type": "SamImageProcessor",
        "processor_class": "SamProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": image_size},
        "mask_size": {"longest_edge": image_size // 4},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / 255 for value in PIXEL_MEAN],
        "image_std": [value / 255 for value in PIXEL_STD],
        "do_pad": True,
        "pad_size": {"height": image_size, "width": image_size},
        "mask_pad_size": {"height": image_size // 4, "width": image_size // 4},
    }


def write_huggingface(sam: Sam, folder: Path, metadata: Mapping[str, str]) -> None:
    """Writes the three files.

    Args:
        sam: The model.
        folder: Where to write them; created here.
        metadata: Stored in the weights file.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    folder.mkdir()
    state = sam.state_dict()
    model_type, image_size = identify_model(state)
    save_safetensors(to_huggingface_names(state), folder / WEIGHTS, metadata)
    write_json(folder / CONFIG, model_config(model_type, image_size))
    write_json(folder / PROCESSOR, processor_config(image_size))


def open_huggingface(folder: Path) -> PredictFunction:
    """Loads the folder into `transformers`' SamModel.

    Args:
        folder: Holds the three files.

    Returns:
        A function from a sample to its prediction; it gives all boxes to the model in one call.
    """
    import transformers  # an extra, and its import takes four seconds

    transformers.utils.logging.disable_progress_bar()
    model = transformers.SamModel.from_pretrained(folder, local_files_only=True).eval()
    processor = transformers.SamProcessor.from_pretrained(folder, local_files_only=True)
    return lambda sample: _predict_sample(model, processor, sample)


@exact_float32()
def _predict_sample(model: Any, processor: Any, sample: VerificationSample) -> Prediction:
    size = sample.image.shape[:2]
    # Resized here as `SamPredictor` does it: the processor of transformers rounds differently, so
    # that logits would differ although the weights are right.
    resize = ResizeLongestSide(model.config.vision_config.image_size)
    boxes = resize.apply_boxes(sample.boxes, size).tolist()
    inputs = processor(resize.apply_image(sample.image), input_boxes=[boxes], return_tensors="pt")
    with torch.no_grad():
        outputs = model(
            pixel_values=inputs["pixel_values"],
            input_boxes=inputs["input_boxes"].float(),
            multimask_output=False,
        )
    (logits,) = processor.image_processor.post_process_masks(
        outputs.pred_masks, [size], inputs["reshaped_input_sizes"], binarize=False
    )
    return Prediction(logits[:, 0].numpy(), outputs.iou_scores[0, :, 0].numpy())
