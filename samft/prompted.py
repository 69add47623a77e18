"""PromptedSam: the module that is trained, and that DistributedDataParallel wraps."""

import torch
from torch import Tensor, nn

import samft.torchvision_cure  # noqa: F401  (before all that imports torchvision)
from samft.decoder import decode_boxes

from segment_anything.modeling import Sam


class PromptedSam(nn.Module):
    """SAM driven by boxes: images and boxes in, mask logits and predicted IoU out.

    Attributes:
        sam: The wrapped `segment_anything` model; its state dict is what is saved.
    """

    def __init__(self, sam: Sam) -> None:
        """Wraps a SAM without copying it."""
        super().__init__()
        self.sam = sam

    def preprocess(self, images: Tensor, input_sizes: Tensor | None) -> Tensor:
        """Normalises images on the device; the padding becomes zero, as in `Sam.preprocess`.

        Args:
            images: uint8 [N, 3, S, S] RGB in the model frame, padded right and bottom; floating
                point images are taken as preprocessed already and pass through.
            input_sizes: int [N, 2], height and width of the image inside the frame, in pixels;
                None where the images fill it.

        Returns:
            float32 [N, 3, S, S].
        """
        if images.is_floating_point():
            return images
        normalised = (images.float() - self.sam.pixel_mean) / self.sam.pixel_std
        if input_sizes is None:
            return normalised
        return normalised * inside_image(input_sizes, images.shape[-1])[:, None]

    @property
    def encoder_is_frozen(self) -> bool:
        """Whether no parameter of the image encoder is trained."""
        return not any(p.requires_grad for p in self.sam.image_encoder.parameters())

    def embed(
        self, images: Tensor, input_sizes: Tensor | None = None, *, cached: Tensor | None = None
    ) -> Tensor:
        """Encodes images; without a gradient where the whole encoder is frozen.

        Args:
            images: See `preprocess`.
            input_sizes: See `preprocess`.
            cached: float [N, C, S/16, S/16], what this gave before: then nothing is encoded.

        Returns:
            float [N, C, S/16, S/16].
        """
        if cached is not None:
            return cached.float()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_is_frozen):
            return self.sam.image_encoder(self.preprocess(images, input_sizes))

    def decode(
        self, embeddings: Tensor, boxes: Tensor, image_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predicts the mask of each box from image embeddings.

        Args:
            embeddings: float [N, C, S/16, S/16].
            boxes: float32 [M, 4], x0 y0 x1 y1 in pixels of the model frame.
            image_index: int64 [M], the image of each box.

        Returns:
            Mask logits [M, S/4, S/4] (positive inside the object) and predicted IoU [M].
        """
        prompt_encoder = self.sam.prompt_encoder
        # Positions are a matrix product: in bf16, a corner would be off by pixels.
        with torch.autocast(boxes.device.type, enabled=False):
            sparse, _ = prompt_encoder(points=None, boxes=boxes.float(), masks=None)
            image_pe = prompt_encoder.get_dense_pe()
        return decode_boxes(
            self.sam.mask_decoder,
            embeddings,
            image_index=image_index,
            image_pe=image_pe,
            sparse_embeddings=sparse,
            dense_embedding=prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1),
        )

    def forward(
        self,
        images: Tensor,
        boxes: Tensor,
        image_index: Tensor,
        *,
        input_sizes: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predicts the mask of each box; see `preprocess` and `decode` for shapes and frames.

        Args:
            images: uint8 [N, 3, S, S], or float already preprocessed.
            boxes: float32 [M, 4], x0 y0 x1 y1 in pixels of the model frame.
            image_index: int64 [M].
            input_sizes: int [N, 2], or None where the images fill the frame.
            embeddings: float [N, C, S/16, S/16], to be used in the place of images.

        Returns:
            Mask logits [M, S/4, S/4] and predicted IoU [M].
        """
        embeddings = self.embed(images, input_sizes, cached=embeddings)
        return self.decode(embeddings, boxes, image_index)


def inside_image(input_sizes: Tensor, size: int, *, cell: int = 1) -> Tensor:
    """The share of each cell of the model frame that lies inside the image, not in the padding.

    Args:
        input_sizes: int [N, 2], height and width of the image in the frame, in pixels.
        size: Cells along each side.
        cell: Side of a cell in pixels of the model frame.

    Returns:
        float32 [N, size, size], 1 inside, 0 in the padding, between on cells that straddle.
    """
    starts = torch.arange(size, device=input_sizes.device, dtype=torch.float32) * cell
    shares = ((input_sizes[..., None] - starts) / cell).clamp(0, 1)
    return shares[:, 0, :, None] * shares[:, 1, None, :]
