"""Prompts of SAM for many objects at once: boxes, points, and masks of an earlier prediction.

`Prompts` holds them in pixels; `Prompts.embed` computes what stock's `PromptEncoder` computes of
them. The decoder takes the result, `PromptEmbeddings`.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from segment_anything.modeling import PromptEncoder
from torch import Tensor
from torch.nn import functional as F

from samft.runtime.device import full_precision

OBJECT, NOT_THIS, PADDING = 1, 0, -1  # labels of points


class PromptEmbeddings(NamedTuple):
    """Embedded prompts, as a mask decoder takes them.

    Attributes:
        sparse: float [M, T, C], the tokens of the points and of the box of each prompt.
        mask_features: float [M, F, h, w], of the mask of each prompt, what enters the last layer of
            its embedding, see `DenseEmbedding`; None where prompts have no masks.
    """

    sparse: Tensor
    mask_features: Tensor | None = None

    def rows(self, chunk: slice) -> "PromptEmbeddings":
        """Those of some of the prompts."""
        features = None if self.mask_features is None else self.mask_features[chunk]
        return PromptEmbeddings(self.sparse[chunk], features)


class DenseEmbedding(NamedTuple):
    """What prompts add to image embeddings: all the same constant, and those with masks more.

    The last layer of stock's `mask_downscaling` is a convolution of kernel 1, at each place a
    matrix W of F = 16 features f, and a bias b. A mask adds W f + b, which is the constant c of no
    mask, and [W, b - c] times the features and a one.

    Attributes:
        no_mask: float [C], c.
        mask_matrix: float [C, F + 1], [W, b - c].
    """

    no_mask: Tensor
    mask_matrix: Tensor

    @classmethod
    def of(cls, prompt_encoder: PromptEncoder, *, all_masked: bool = False) -> "DenseEmbedding":
        """That of a prompt encoder, a function of its parameters.

        Args:
            prompt_encoder: The stock module.
            all_masked: Whether all prompts have masks, so that c is not reached: it is taken as a
                number, as its gradient would be zero but for rounding.
        """
        no_mask, last = prompt_encoder.no_mask_embed.weight[0], prompt_encoder.mask_downscaling[-1]
        no_mask = no_mask.detach() if all_masked else no_mask
        return cls(no_mask, torch.cat([last.weight[..., 0, 0], (last.bias - no_mask)[:, None]], 1))


@dataclass(frozen=True, eq=False)
class Prompts:
    """M prompts of the same kinds, one for each mask that is wanted.

    Coordinates are in pixels of the model frame, as SAM's are: the centre of the first pixel is 0.

    Attributes:
        boxes: float32 [M, 4], x0 y0 x1 y1.
        points: float32 [M, P, 2], x y.
        labels: int64 [M, P], of the points: 1 on the object, 0 not on it, -1 for no point at all.
        masks: float [M, H/4, W/4], logits of an earlier prediction of the same objects.
    """

    boxes: Tensor | None = None
    points: Tensor | None = None
    labels: Tensor | None = None
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        """Checks that all are of the same M prompts.

        Raises:
            ValueError: There is nothing, points without labels, or a shape does not fit.
        """
        shapes = {name: list(tensor.shape) for name, tensor in self._given().items()}
        points = (shapes.get("points", []) + [0, 0])[:2]
        ends = {"boxes": [4], "points": [points[1], 2], "labels": [points[1]]}
        fits = [
            shape[:1] == next(iter(shapes.values()))[:1]
            and (shape[1:] == ends[name] if name in ends else len(shape) == 3)
            for name, shape in shapes.items()
        ]
        if not fits or not all(fits) or ("points" in shapes) != ("labels" in shapes):
            raise ValueError(
                f"prompts of the shapes {shapes}: they can be boxes [M, 4], points [M, P, 2] with "
                "labels [M, P], masks [M, H/4, W/4], or several of these, for the same M masks."
            )

    def __len__(self) -> int:
        """M, the number of prompts."""
        return len(next(iter(self._given().values())))

    def rows(self, chunk: slice) -> "Prompts":
        """Some of the prompts."""
        return replace(self, **{name: tensor[chunk] for name, tensor in self._given().items()})

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Prompts":
        """The same prompts on a device."""
        return replace(
            self,
            **{
                name: tensor.to(device, non_blocking=non_blocking)
                for name, tensor in self._given().items()
            },
        )

    def add_points(self, points: Tensor, labels: Tensor) -> "Prompts":
        """The prompts with more points each, after those that they have.

        Args:
            points: float32 [M, p, 2].
            labels: int64 [M, p].
        """
        if self.points is not None and self.labels is not None:
            points = torch.cat([self.points, points], 1)
            labels = torch.cat([self.labels, labels], 1)
        return replace(self, points=points, labels=labels)

    def embed(self, prompt_encoder: PromptEncoder) -> PromptEmbeddings:
        """What stock's prompt encoder gives, to the bit; in full precision under any autocast.

        Args:
            prompt_encoder: The stock module, whose parameters are used.
        """
        features = self.embed_masks(prompt_encoder)
        return PromptEmbeddings(self.embed_tokens(prompt_encoder), features)

    def embed_tokens(self, prompt_encoder: PromptEncoder) -> Tensor:
        """The tokens of points and boxes, float [M, T, C]; see `embed`.

        As in stock, points without a box are followed by one more token, of no point.
        """
        weight = prompt_encoder.no_mask_embed.weight
        tokens = []
        with full_precision(weight.device):
            if self.points is not None and self.labels is not None:
                pad = 1 if self.boxes is None else 0
                points = F.pad(self.points.float(), (0, 0, 0, pad))
                labels = F.pad(self.labels.long(), (0, pad), value=PADDING)  # bool has no -1
                tokens.append(_embed_points(prompt_encoder, points, labels))
            if self.boxes is not None:
                tokens.append(prompt_encoder(points=None, boxes=self.boxes.float(), masks=None)[0])
        if not tokens:  # masks alone
            return weight.new_empty(len(self), 0, prompt_encoder.embed_dim)
        return tokens[0] if len(tokens) == 1 else torch.cat(tokens, 1)

    def embed_masks(self, prompt_encoder: PromptEncoder) -> Tensor | None:
        """The features of the masks, float [M, F, h, w]; see `PromptEmbeddings`.

        Raises:
            ValueError: They are not of the resolution that the decoder predicts.
        """
        if self.masks is None:
            return None
        size = tuple(prompt_encoder.mask_input_size)
        if self.masks.shape[1:] != size:
            raise ValueError(
                f"masks of the shape {list(self.masks.shape)} as prompts: give the logits that the "
                f"model has predicted, [M, {size[0]}, {size[1]}], not masks of the image's size."
            )
        weight = prompt_encoder.no_mask_embed.weight
        with full_precision(weight.device):
            layers = prompt_encoder.mask_downscaling[:-1]  # of the last, see `DenseEmbedding`
            features: Tensor = layers(self.masks[:, None].to(weight.dtype))
        return features

    def _given(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in values.items() if tensor is not None}


def _embed_points(prompt_encoder: PromptEncoder, points: Tensor, labels: Tensor) -> Tensor:
    """The tokens of points, float [M, P, C].

    Stock's `PromptEncoder._embed_points` without its masked assignments, for which a GPU would have
    to tell the host how many points there are of each label.

    Source: `segment_anything/modeling/prompt_encoder.py`.
    """
    centres = points + 0.5  # a pixel's centre, in coordinates that begin at its corner
    size = prompt_encoder.input_image_size
    positions = prompt_encoder.pe_layer.forward_with_coords(centres, size)
    labels = labels[..., None]
    not_this, on_object = (prompt_encoder.point_embeddings[label].weight for label in (0, 1))
    embedded = torch.where(labels == NOT_THIS, positions + not_this, positions)
    embedded = torch.where(labels == OBJECT, positions + on_object, embedded)
    return torch.where(labels == PADDING, prompt_encoder.not_a_point_embed.weight, embedded)
