"""Settings for a dataset and a machine, each with its reason: `samft check --suggest`.

A pure function of numbers: equal numbers give equal settings. What no paper and no measurement of
samft's stands behind says so in its reason. Imports no torch.

Sources, by author and year:
    Archit et al., Segment Anything for Microscopy, Nature Methods, 2025.
    Gu et al., How to build the best medical image segmentation algorithm using foundation models,
        MELBA, 2025.
    Ravi et al., SAM 2: Segment Anything in Images and Videos, 2024.
    Teuber et al., Parameter Efficient Fine-Tuning of Segment Anything Model for Biomedical Imaging,
        MIDL, 2025 (PMLR 301).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from samft.step_costs import (
    ALL,
    COSTS,
    DECODER,
    LAST_HALF,
    LORA,
    VIT_B_ENCODING,
    StepCosts,
    justified_steps,
    memory_gib,
)

SMALLEST_IMAGE_SIZE = 256  # px; that of vit_tiny's pre-training, from which on sizes are asked for

_LORA_RANK = 8
# Images from which on more is trained: halfway, as factors, between 5, 50, 500 and 5,000.
_MORE_TRAINED = {LORA: 16, LAST_HALF: 158, ALL: 1581}
_OBJECTS_OF_AN_IMAGE = 4  # fewer an image count as fewer images
_MAX_VAL_IMAGES, _VAL_SHARE = 500, 0.2
_NUM_VALIDATIONS, _NUM_VALIDATIONS_CPU, _PATIENCE = 20, 6, 5

# Shares of memory and disk that a run may take by an estimate.
_USABLE_MEMORY, _USABLE_DISK = 0.6, 0.5
_EMBEDDING_MIB = 2.0  # of an image at 1024 px in float16: docs/training.md

# A CPU: seconds that a run may take, and what steps take, in seconds of a core.
_CPU_SECONDS = 120  # as long as the demo takes on an idle one
_FEWEST_STEPS = 50
_FEW_IMAGES_STEPS = 300  # of vit_tiny on 14 images, as measured in docs/experiments.md
_MASKS_ON_A_CPU = 16
_VIT_B_CORES, _VIT_B_GIB = 8, 16
_VIT_B_ENCODING_SECONDS = 3600


class Windows(NamedTuple):
    """Windows of the images, instead of images.

    Attributes:
        kind: `tiles` or `objects`.
        per_image: Their mean number.
    """

    kind: str
    per_image: float


@dataclass(frozen=True)
class Facts:
    """What settings are suggested from.

    Attributes:
        num_images: Training images with objects, those to be held out included.
        num_objects: Of these images.
        num_val_images: Of the validation split; 0: there is none.
        most_masks: `max_masks_per_image` that suffices for 99 % of the images.
        image_size: The smallest model input that keeps most objects large enough, px; see
            `annotations.boxes.find_small_objects` from `SMALLEST_IMAGE_SIZE` on.
        num_gpus: 0: a CPU trains.
        gpu_gib: Memory of the smallest of them.
        memory_gib: Of the host.
        cores: CPU cores that may be used.
        disk_gib: Free where the run will write.
        views: By a model's own input size, px: the windows of that size that are better than
            shrunken images, if any; see `coco.statistics.suggest_view`.
    """

    num_images: int
    num_objects: int
    num_val_images: int
    most_masks: int
    image_size: int
    num_gpus: int
    gpu_gib: float
    memory_gib: float
    cores: int
    disk_gib: float
    views: Mapping[int, Windows] = field(default_factory=dict)

    @property
    def num_train_images(self) -> int:
        """Those that are left when a part is held out."""
        if self.num_val_images:
            return self.num_images
        return max(1, self.num_images - max(1, round(self.num_images * self.val_fraction)))

    @property
    def val_fraction(self) -> float:
        """Share to hold out: a fifth, or less where that would be more than 500 images."""
        share = min(_VAL_SHARE, _MAX_VAL_IMAGES / max(self.num_images, 1))
        return float(f"{share:.2g}")

    @property
    def recipe_images(self) -> int:
        """Training images by which the recipe is chosen: fewer where there are few objects."""
        return max(1, min(self.num_train_images, self.num_objects // _OBJECTS_OF_AN_IMAGE))


class Suggestion(NamedTuple):
    """One line of a configuration, and why."""

    setting: str
    value: Any
    reason: str


def suggest_settings(facts: Facts) -> list[Suggestion]:
    """Settings for a training of a dataset on a machine.

    Args:
        facts: What is known of both; at least two images, one to validate on.

    Returns:
        Fields of `TrainConfig` with their reasons; those that are left out keep their defaults.
    """
    return _CpuPlan(facts).suggestions() if not facts.num_gpus else _Plan(facts).suggestions()


class _Plan:
    """The settings for GPUs, decided one after the other, as the later ones need the earlier."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        wanted = max(
            (kind for kind, least in _MORE_TRAINED.items() if facts.recipe_images >= least),
            default=DECODER,
        )
        self.model_type = self._pick_model(wanted)
        self.windows = facts.views.get(self.model.image_size)
        self.image_size = self._pick_image_size()
        self.trained = self._pick_trained(wanted)
        self.wanted = wanted
        self.batch_size, self.accumulate_steps = self._pick_batch()
        self.steps = self._pick_steps()

    @property
    def model(self) -> StepCosts:
        return COSTS[self.model_type]

    @property
    def images_per_step(self) -> int:
        return self.batch_size * self.accumulate_steps * max(self.facts.num_gpus, 1)

    @property
    def num_inputs(self) -> int:
        # Training images, or their windows.
        return round(self.facts.num_train_images * (self.windows.per_image if self.windows else 1))

    @property
    def num_validations(self) -> int:
        return _NUM_VALIDATIONS

    def suggestions(self) -> list[Suggestion]:
        """All of them, in the order of `TrainConfig`."""
        return [
            *self._suggest_validation(),
            *self._suggest_view(),
            *self._suggest_model(),
            *self._suggest_trained(),
            *self._suggest_prompts(),
            *self._suggest_steps(),
            *self._suggest_batch(),
            *self._suggest_rates(),
            *self._suggest_cache(),
            *self._suggest_validations(),
        ]

    @property
    def total_gib(self) -> float:
        return self.facts.gpu_gib

    def _fits(self, model_type: str, trained: int, image_size: int, batch_size: int = 1) -> bool:
        need = memory_gib(model_type, trained, image_size=image_size, batch_size=batch_size)
        return need <= _USABLE_MEMORY * self.total_gib

    def _pick_model(self, wanted: int) -> str:
        size = 1024 if 1024 in self.facts.views else max(1024, self.facts.image_size)
        for model_type in ("vit_h", "vit_l"):
            if self._fits(model_type, wanted, size):
                return model_type
        return "vit_b" if self._fits("vit_b", DECODER, 1024) else "vit_tiny"

    def _pick_image_size(self) -> int:
        wanted = self.model.image_size
        if self.windows is None:  # windows show the pixels as they are
            wanted = max(wanted, self.facts.image_size)
        sizes = range(wanted, SMALLEST_IMAGE_SIZE - 1, -64)
        fitting = (size for size in sizes if self._fits(self.model_type, DECODER, size))
        return next(fitting, SMALLEST_IMAGE_SIZE)

    def _pick_trained(self, wanted: int) -> int:
        order = [wanted, *(kind for kind in (LAST_HALF, DECODER) if kind < wanted)]
        fitting = (kind for kind in order if self._fits(self.model_type, kind, self.image_size))
        return next(fitting, DECODER)

    def _pick_batch(self) -> tuple[int, int]:
        # A sixteenth of the images in a step, up to 8 of them, but one on each GPU.
        images = min(8, max(1, self.facts.recipe_images // 16))
        each = max(1, 2 ** int(math.log2(images)) // self.facts.num_gpus)
        return self._divide_batch(each)

    def _divide_batch(self, images: int) -> tuple[int, int]:
        # The largest half, quarter, ... that fits, and how often it takes.
        batch_size = images
        while batch_size > 1 and not self._fits(
            self.model_type, self.trained, self.image_size, batch_size
        ):
            batch_size //= 2
        return batch_size, images // batch_size

    def _pick_steps(self) -> int:
        return justified_steps(self.num_inputs, self.images_per_step)

    def _suggest_validation(self) -> list[Suggestion]:
        facts = self.facts
        if facts.num_val_images:
            return []
        share = facts.val_fraction
        why = "there is no validation split, so a part of the images is held out"
        if share < _VAL_SHARE:
            why += f"; about {_MAX_VAL_IMAGES} are enough"
        return [
            Suggestion("val_fraction", share, why),
            Suggestion(
                "group_by",
                "auto",
                "keeps Roboflow's copies of an image on one side; for frames of videos, folder or "
                "a pattern of their names",
            ),
        ]

    def _suggest_view(self) -> list[Suggestion]:
        if self.windows is None:
            return []
        why = (
            f"over a quarter of the objects are too small in an image of {self.image_size} px; "
            f"{self.windows.per_image:.1f} windows an image show them as they are, which gained "
            "vit_tiny .04 to .24 IoU on real data (docs/experiments.md)"
        )
        return [Suggestion("view", self.windows.kind, why)]

    def _suggest_model(self) -> list[Suggestion]:
        return [
            Suggestion("model_type", self.model_type, self._model_reason()),
            Suggestion("checkpoint_path", "auto", "the weights of model_type"),
            Suggestion("image_size", self.image_size, self._image_size_reason()),
        ]

    def _model_reason(self) -> str:
        reason = f"the smallest GPU has {self.facts.gpu_gib:.0f} GiB; estimated from a CPU's steps"
        if self.model_type in ("vit_l", "vit_h"):
            reason += (
                ", which hold it. vit_b is faster, and tuned on 17 radiology datasets the size "
                "mattered little (Gu et al., 2025)"
            )
        return reason

    def _image_size_reason(self) -> str:
        kept, own = self.facts.image_size, self.model.image_size
        if self.windows is not None:
            return f"{self.model_type} was pre-trained at this size"
        if self.image_size < kept:
            return f"{kept} px would keep the small objects, but memory or time are short"
        if self.image_size > own:
            return (
                f"at {own} px, over a quarter of the objects have sides of under two cells of the "
                "decoder's masks, where masks tend to be worse than boxes (docs/experiments.md)"
            )
        return f"{self.model_type} was pre-trained at this size, and the objects are large enough"

    def _suggest_trained(self) -> list[Suggestion]:
        images, objects = self.facts.num_train_images, self.facts.num_objects
        count = f"{images:,} training images, {objects:,} objects"
        less = "; more would not fit" if self.trained < self.wanted else ""
        if self.trained == DECODER:
            why = (
                f"{count}{less}: the decoder alone, whose steps are many times faster, as each "
                "image is encoded only once (docs/benchmarks.md)"
            )
            return [Suggestion("freeze_image_encoder", True, why)]
        if self.trained == LORA:
            why = f"{count}: adapters in all blocks of the encoder, beside the decoder; both, with "
            why += "adapters, did best on 17 radiology datasets (Gu et al., 2025)"
            return [Suggestion("lora_rank", _LORA_RANK, why)]
        if self.trained == LAST_HALF:
            why = f"{count}{less}: the last half of the encoder's blocks, {self._half_reason()}"
            return [Suggestion("train_blocks", self.model.blocks // 2, why)]
        why = (
            f"{count}: everything is trained; each block at .9 of the rate of the next, as SAM 2 "
            "was (Ravi et al., 2024)"
        )
        return [Suggestion("layer_decay", 0.9, why)]

    def _half_reason(self) -> str:
        return (
            "which took 14 GB where all took 20.5 (Teuber et al., 2025); what comes before is "
            "computed only once"
        )

    def _suggest_prompts(self) -> list[Suggestion]:
        masks = self.facts.most_masks
        return [
            Suggestion(
                "prompts",
                "box",
                "for boxes, and fastest; for points, clicks or automatic masks: mixed "
                "(docs/training.md)",
            ),
            Suggestion("max_masks_per_image", masks, "enough for 99 % of the images"),
        ]

    def _suggest_steps(self) -> list[Suggestion]:
        times = self.steps * self.images_per_step / self.num_inputs
        why = (
            f"each is seen {times:.3g} times. vit_b on 1 to 10 images was best after 150 to 2,150 "
            "steps, on LIVECell after 25,000 (Archit et al., 2025); between, images seen grow with "
            "the square root of their number (not measured)"
        )
        return [Suggestion("steps", self.steps, why)]

    def _suggest_batch(self) -> list[Suggestion]:
        gpus = self.facts.num_gpus
        where = f"{gpus} GPU{'s' * (gpus != 1)}" if gpus else "the CPU"
        images = self.images_per_step
        why = f"{images} image{'s' * (images != 1)} a step on {where}"
        lines = [Suggestion("batch_size", self.batch_size, f"{why}, which should fit")]
        if self.accumulate_steps > 1:
            why = "the rest of these images, one micro-batch after the other"
            lines.append(Suggestion("accumulate_steps", self.accumulate_steps, why))
        return lines

    def _suggest_rates(self) -> list[Suggestion]:
        if self.model_type == "vit_tiny":
            why = "short runs of vit_tiny gained more at 3e-4 than at 1e-4 (docs/experiments.md)"
            return [Suggestion("learning_rate", 3e-4, why), *self._suggest_average()]
        lines = [Suggestion("learning_rate", 1e-4, "the default, of the decoder")]
        if self.trained in (LAST_HALF, ALL):
            why = (
                "vit_b on LIVECell scored .667 to .674 from 5e-6 to 1e-4, and .599 at 5e-4 (Archit "
                "et al., 2025)"
            )
            lines.append(Suggestion("encoder_learning_rate", 2e-5, why))
        return lines + self._suggest_average()

    def _suggest_average(self) -> list[Suggestion]:
        # A mean over the last 100 steps or so is no use where they are the whole run.
        if self.steps < 1000:
            return []
        why = "a moving average (0 to +.006 IoU in 100 steps of vit_tiny: docs/experiments.md)"
        return [Suggestion("ema_decay", 0.99, why)]

    def _suggest_cache(self) -> list[Suggestion]:
        if self.trained not in (DECODER, LAST_HALF):
            return []
        room = max(1, math.floor(_USABLE_DISK * self.facts.disk_gib))
        free, taken = self.facts.disk_gib, self._cache_gib()
        why = f"half of the {free:,.0f} GiB that are free; the images take about {taken:.2g} GiB"
        return [Suggestion("cache_max_gib", float(min(room, 100)), why)]

    def _cache_gib(self) -> float:
        # Both mirror images of a training image or window, one of a validation image
        images = self.num_inputs * (2 + self.facts.num_val_images / self.facts.num_train_images)
        tokens = self.model.width / 256 if self.trained == LAST_HALF else 1.0
        mib = _EMBEDDING_MIB * tokens * (self.image_size / 1024) ** 2
        return images * mib / 1024

    def _suggest_validations(self) -> list[Suggestion]:
        number = min(self.num_validations, self.steps)
        why = f"{number} validations; the best checkpoint is kept"
        lines = [Suggestion("metrics_interval", -(-self.steps // number), why)]
        if number > 2 * _PATIENCE:
            why = f"the run ends after {_PATIENCE} validations that are no better than the best"
            lines.append(Suggestion("patience", _PATIENCE, why))
        return lines


class _CpuPlan(_Plan):
    """The settings for a CPU, whose time is short: by what a step takes."""

    @property
    def num_validations(self) -> int:
        return _NUM_VALIDATIONS_CPU

    @property
    def total_gib(self) -> float:
        return self.facts.memory_gib

    def _fits(self, model_type: str, trained: int, image_size: int, batch_size: int = 1) -> bool:
        if not super()._fits(model_type, trained, image_size, batch_size):
            return False
        budget, seconds = self._seconds(model_type, trained, image_size)
        return seconds * _FEWEST_STEPS <= budget

    def _seconds(self, model_type: str, trained: int, image_size: int) -> tuple[float, float]:
        # Core seconds for all steps, and for a step of one image: docs/benchmarks.md
        model = COSTS[model_type]
        pixels = (image_size / model.image_size) ** 2
        encoding = model.encoder_seconds * pixels * {DECODER: 0, LAST_HALF: 2}.get(trained, 3)
        seconds = encoding + model.box_seconds * pixels * self._masks_of_a_step()
        return _CPU_SECONDS * self.facts.cores, seconds

    def _masks_of_a_step(self) -> float:
        objects = self.facts.num_objects * self.facts.num_train_images / self.num_inputs
        return min(_MASKS_ON_A_CPU, objects / max(self.facts.num_images, 1))

    def _pick_model(self, wanted: int) -> str:
        facts = self.facts
        encoding = 2 * VIT_B_ENCODING * facts.num_images / facts.cores
        large = facts.cores >= _VIT_B_CORES and facts.memory_gib >= _VIT_B_GIB
        return "vit_b" if large and encoding <= _VIT_B_ENCODING_SECONDS else "vit_tiny"

    def _pick_batch(self) -> tuple[int, int]:
        budget, seconds = self._seconds(self.model_type, self.trained, self.image_size)
        affordable = max(1, int(budget / seconds / 100))  # with 100 steps
        images = min(4, affordable, max(1, self.facts.recipe_images // 16))
        return self._divide_batch(2 ** int(math.log2(images)))

    def _pick_steps(self) -> int:
        budget, seconds = self._seconds(self.model_type, self.trained, self.image_size)
        affordable = int(budget / (seconds * self.images_per_step))
        steps = min(super()._pick_steps(), max(affordable, _FEWEST_STEPS))
        return min(steps, _FEW_IMAGES_STEPS) if self._has_few_images(self.wanted) else steps

    def _model_reason(self) -> str:
        facts = self.facts
        have = (
            f"no GPU, {facts.cores} CPU core{'s' * (facts.cores != 1)}, {facts.memory_gib:.0f} GiB"
        )
        if self.model_type == "vit_b":
            return f"{have}: vit_b, each image of which takes 19 s of a core to encode"
        return (
            f"{have}: the small model in the package; a step of Meta's takes seconds to half a "
            "minute of a CPU (docs/benchmarks.md)"
        )

    def _pick_trained(self, wanted: int) -> int:
        if self._has_few_images(wanted):
            return super()._pick_trained(ALL)
        # Adapters take as long as all blocks, and need what the first block is given.
        return super()._pick_trained(LAST_HALF if wanted == LORA else wanted)

    def _has_few_images(self, wanted: int) -> bool:
        # Measured on 14 images: see the reasons
        return self.model_type == "vit_tiny" and wanted == DECODER

    def _suggest_trained(self) -> list[Suggestion]:
        if not (self._has_few_images(self.wanted) and self.trained == ALL):
            return super()._suggest_trained()
        count = f"{self.facts.num_train_images:,} training images"
        why = (
            f"{count}: everything is trained, which on 14 images of fruits_nuts went from .853 to "
            ".871; the decoder alone at 3e-4 fell to .836 (docs/experiments.md)"
        )
        return [Suggestion("freeze_image_encoder", False, why)]

    def _suggest_rates(self) -> list[Suggestion]:
        if not self._has_few_images(self.wanted):
            return super()._suggest_rates()
        why = "the default; of few images, 3e-4 was too much (docs/experiments.md)"
        return [Suggestion("learning_rate", 1e-4, why)]

    def _half_reason(self) -> str:
        return "as measured (docs/experiments.md); what comes before is computed only once"

    def _suggest_prompts(self) -> list[Suggestion]:
        prompts, masks = super()._suggest_prompts()
        if masks.value > _MASKS_ON_A_CPU:
            why = "of the objects of an image, others in each epoch: a CPU's time is short"
            masks = Suggestion("max_masks_per_image", _MASKS_ON_A_CPU, why)
        return [prompts, masks]

    def _suggest_steps(self) -> list[Suggestion]:
        if self._has_few_images(self.wanted) and self.steps == _FEW_IMAGES_STEPS:
            return [Suggestion("steps", self.steps, "as many as were measured with 14 images")]
        if self.steps >= super()._pick_steps():
            return super()._suggest_steps()
        why = (
            f"about {_CPU_SECONDS // 60} minutes of this CPU if it is idle, without validation, by "
            "the times in docs/benchmarks.md; the data justify up to "
            f"{super()._pick_steps():,} steps"
        )
        return [Suggestion("steps", self.steps, why)]
