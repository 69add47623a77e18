"""PromptedSam: SAM driven by prompts, the module that is trained and wrapped for data parallelism.

Beside it, SAM's own pre- and postprocessing for many images at once: which part of the model frame
is image (`inside_image`), and masks at the original resolution (`original_masks`).
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from samft.annotations.boxes import CELL
from samft.annotations.segmentation import CroppedMask
from samft.models.chunked_loss import (
    BoxDecoder,
    DecoderInputs,
    ImageInputs,
    LossInputs,
    LossRounds,
    RoundInputs,
    auto_mask_chunk,
)
from samft.models.cuda_graphs import ChunkGraphs, CudaGraphs, RecordingPlace
from samft.models.frozen_encoder import (
    CastEncoder,
    count_frozen_blocks,
    encode_first_blocks,
    encode_last_blocks,
    move_first_blocks,
    version_of,
)
from samft.models.mask_decoder import choose_decoder
from samft.models.prompts import DenseEmbedding, PromptEmbeddings, Prompts
from samft.models.two_way_transformer import Tensors
from samft.runtime.device import (
    exact_float32,
    free_memory_bytes,
    full_precision,
    total_memory_bytes,
)
from samft.runtime.logs import LOGGER


class PromptedSam(nn.Module):
    """SAM driven by prompts: images and prompts in, mask logits and predicted IoU out.

    Attributes:
        sam: The wrapped `segment_anything` model; its state dict is what is saved.
        decoder: `fast`, or `stock` for the package's own modules; see `choose_decoder`.
        mask_chunk: Boxes decoded at once; None: as many as `boxes_at_once` chooses.
        chunk_graphs: Replays chunks of boxes as CUDA graphs where losses are wanted on a GPU.
        encoder_graphs: Replays a frozen encoder as a CUDA graph where the rest is trained.
    """

    def __init__(
        self,
        sam: Sam,
        *,
        decoder: str = "fast",
        mask_chunk: int | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        """Wraps a SAM without copying it.

        Args:
            sam: See above.
            decoder: See above.
            mask_chunk: See above.
            cuda_graphs: Whether training on a GPU replays chunks of boxes, and a frozen image
                encoder, as CUDA graphs.
        """
        super().__init__()
        self.sam, self.decoder, self.mask_chunk = sam, decoder, mask_chunk
        place = RecordingPlace()
        self.chunk_graphs = ChunkGraphs(place) if cuda_graphs else None
        self.encoder_graphs = CudaGraphs(place) if cuda_graphs else None
        self._auto_mask_chunk: int | None = None
        self._cast_encoder = CastEncoder()
        self._cached_pe: tuple[Tensor, int, Tensor] | None = None

    def preprocess(self, images: Tensor, input_sizes: Tensor | None) -> Tensor:
        """Normalises images on the device; the padding becomes zero, as in `Sam.preprocess`.

        Args:
            images: uint8 [N, 3, H, W] RGB in the model frame, padded right and bottom; floating
                point images count as preprocessed and are returned unchanged.
            input_sizes: int [N, 2], height and width of the image inside the frame, in pixels;
                None where the images fill it.

        Returns:
            float32 [N, 3, H, W].
        """
        if images.is_floating_point():
            return images
        normalised = (images.float() - self.sam.pixel_mean) / self.sam.pixel_std
        if input_sizes is None:
            return normalised
        # SAM pads after normalising, with zeros. The padding in `images` is black, so not zero now.
        height, width = images.shape[-2:]
        return normalised * inside_image(input_sizes, height, width)[:, None]

    @property
    def frame_size(self) -> tuple[int, int]:
        """H, W of the model frame, px: those of the images that it takes."""
        height, width = self.sam.prompt_encoder.mask_input_size
        return height * CELL, width * CELL

    @property
    def embedding_shape(self) -> tuple[int, int, int]:
        """The shape of an image's embedding: C, H/16, W/16."""
        encoder = self.sam.prompt_encoder
        return (encoder.embed_dim, *encoder.image_embedding_size)

    @property
    def encoder_is_frozen(self) -> bool:
        """Whether no parameter of the image encoder is trained."""
        weights = self._cast_encoder.weights_of(self.sam.image_encoder)
        return not any(weight.requires_grad for weight in weights)

    @property
    def num_frozen_blocks(self) -> int | None:
        """The frozen blocks at the start of the image encoder; see `count_frozen_blocks`."""
        weights = self._cast_encoder.weights_of(self.sam.image_encoder)
        if weights[0].requires_grad:  # most often: the whole encoder is trained
            return None
        return count_frozen_blocks(self.sam.image_encoder)

    @property
    def frozen_shape(self) -> tuple[int, int, int] | None:
        """The shape of what `encode_frozen` returns of an image; None if nothing is frozen."""
        if self.encoder_is_frozen:
            return self.embedding_shape
        if self.num_frozen_blocks is None:
            return None
        width = self.sam.image_encoder.patch_embed.proj.out_channels
        return (*self.embedding_shape[1:], width)

    def embed(
        self, images: Tensor, input_sizes: Tensor | None = None, *, cached: Tensor | None = None
    ) -> Tensor:
        """Encodes images; without a gradient where the whole encoder is frozen.

        Args:
            images: See `preprocess`.
            input_sizes: See `preprocess`.
            cached: float [N, *frozen_shape], from `encode_frozen` earlier; images are not used.

        Returns:
            float [N, C, H/16, W/16].
        """
        if self.encoder_is_frozen:
            return self.encode_frozen(images, input_sizes) if cached is None else cached.float()
        encoder = self._cast_encoder.select(self.sam.image_encoder, self.sam.device.type)
        num_blocks = self.num_frozen_blocks
        if num_blocks is None:
            embeddings: Tensor = encoder(self.preprocess(images, input_sizes))
            return embeddings
        tokens = self.encode_frozen(images, input_sizes) if cached is None else cached.float()
        return encode_last_blocks(encoder, tokens, num_blocks)

    def encode_frozen(self, images: Tensor, input_sizes: Tensor | None = None) -> Tensor:
        """What the frozen part of the image encoder makes of images, which training cannot change.

        Args:
            images: See `preprocess`.
            input_sizes: See `preprocess`.

        Returns:
            float [N, *frozen_shape], without a gradient: embeddings, or the tokens that enter the
            first block that is trained.
        """
        in_training, num_blocks = torch.is_grad_enabled(), self.num_frozen_blocks
        frozen = self.encoder_is_frozen
        with torch.no_grad():
            encoder = self._cast_encoder.select(self.sam.image_encoder, self.sam.device.type)

            def encode(images: Tensor, input_sizes: Tensor | None = None) -> Tensors:
                preprocessed = self.preprocess(images, input_sizes)
                if frozen or num_blocks is None:
                    return (encoder(preprocessed),)
                return (encode_first_blocks(encoder, preprocessed, num_blocks),)

            encoded, graphs = None, self.encoder_graphs
            if graphs and in_training and images.is_cuda:
                inputs = (images,) if input_sizes is None else (images, input_sizes)
                weights = self._cast_encoder.weights_of(self.sam.image_encoder)
                places = tuple(weight.data_ptr() for weight in weights)
                encoded = graphs.run(encode, inputs, key=(encoder, places))
            return (encoded or encode(images, input_sizes))[0]

    def unload_encoder(self) -> None:
        """Moves what is frozen of the image encoder to the CPU, for a run that has it cached."""
        self._cast_encoder.drop()
        if self.encoder_graphs is not None:
            self.encoder_graphs = CudaGraphs()  # those of the pass that encoded keep its weights
        if self.encoder_is_frozen:
            self.sam.image_encoder.cpu()
        elif (num_blocks := self.num_frozen_blocks) is not None:
            move_first_blocks(self.sam.image_encoder, num_blocks, torch.device("cpu"))
        if self.sam.device.type == "cuda":
            torch.cuda.empty_cache()

    def decode(
        self,
        embeddings: Tensor,
        prompts: Prompts,
        image_index: Tensor,
        *,
        multimask: bool = False,
        mask_chunk: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predicts the mask of each prompt, or three of them, from image embeddings.

        Args:
            embeddings: float [N, C, H/16, W/16].
            prompts: M of them, see `Prompts`.
            image_index: int64 [M], the image of each prompt.
            multimask: Whether to predict stock's three masks of an ambiguous prompt
                (`multimask_output=True`), instead of the one.
            mask_chunk: Prompts decoded at once in this call; None: `boxes_at_once`.

        Returns:
            Mask logits [M, H/4, W/4] (positive inside the object) and predicted IoU [M]; with
            `multimask` [M, 3, H/4, W/4] and [M, 3].

        Raises:
            ValueError: There are not as many prompts as `image_index` has entries, or masks are not
                of the decoder's resolution.
        """
        if len(prompts) != len(image_index):
            raise ValueError(
                f"{len(prompts)} prompts with the images of {len(image_index)}: image_index has "
                "the number of an image for each prompt."
            )
        prompt_encoder = self.sam.prompt_encoder
        tokens = prompts.embed_tokens(prompt_encoder)

        def embed(chunk: slice) -> PromptEmbeddings:
            # Not of all prompts at once: masks are embedded at a fourth of the frame's resolution.
            features = prompts.rows(chunk).embed_masks(prompt_encoder)
            return PromptEmbeddings(tokens[chunk], features)

        decoder = self._box_decoder(image_index, mask_chunk or self.boxes_at_once())
        return decoder.decode(self._image_inputs(embeddings, prompts), embed, multimask=multimask)

    def boxes_at_once(self) -> int:
        """`mask_chunk`, or else what fits into the memory that was free at the first call.

        Chosen once, because the chunk decides in which order sums over boxes are added up: all
        steps of a run round alike.
        """
        if self.mask_chunk is not None:
            return self.mask_chunk
        if self._auto_mask_chunk is None:
            device, num_values = self.sam.device, math.prod(self.embedding_shape)
            free = self._free_memory_bytes()
            self._auto_mask_chunk = auto_mask_chunk(num_values, device.type, free_memory=free)
            LOGGER.info("mask_chunk auto: %d boxes decoded at once", self._auto_mask_chunk)
        return self._auto_mask_chunk

    def _clicks_at_once(self) -> int:
        # An object with clicks takes more memory than one with a box (1.4 times, with vit_tiny at
        # 1024 px on a CPU): it has more tokens, and a point three masks.
        return self.mask_chunk or max(1, self.boxes_at_once() // 2)

    def _free_memory_bytes(self) -> float:
        device = self.sam.device
        if not torch.are_deterministic_algorithms_enabled():
            return free_memory_bytes(device)
        # What is free differs from start to start, and a resumed run has to round alike. This is
        # what weights, gradients and two moments leave, in float32.
        return total_memory_bytes(device) - 16 * sum(p.numel() for p in self.parameters())

    def _box_decoder(self, image_index: Tensor, mask_chunk: int) -> BoxDecoder:
        implementation = choose_decoder(self.decoder)
        return BoxDecoder(self.sam.mask_decoder, implementation, image_index, mask_chunk)

    def _decoder_inputs(self, embeddings: Tensor, prompts: Prompts) -> DecoderInputs:
        embedded = prompts.embed(self.sam.prompt_encoder)
        return DecoderInputs(*self._image_inputs(embeddings, prompts), embedded)

    def _image_inputs(self, embeddings: Tensor, prompts: Prompts) -> ImageInputs:
        with full_precision(embeddings.device):
            image_pe = self._dense_pe()
        all_masked, encoder = prompts.masks is not None, self.sam.prompt_encoder
        return embeddings, image_pe, DenseEmbedding.of(encoder, all_masked=all_masked)

    def _dense_pe(self) -> Tensor:
        # A function of one matrix, computed again only when that matrix was moved (another tensor)
        # or loaded in place (another version).
        matrix = self.sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
        cached = self._cached_pe
        if cached is None or cached[0] is not matrix or cached[1] != version_of(matrix):
            # Also if first wanted in inference mode: such a tensor could not be used in training.
            with torch.inference_mode(False):
                cached = (matrix, version_of(matrix), self._compute_dense_pe())
            self._cached_pe = cached
        return cached[2]

    def _compute_dense_pe(self) -> Tensor:
        # Stock's `get_dense_pe` to the bit. That counts pixels with a cumsum of floats, which has
        # no deterministic kernel on a GPU. Of a `RectangleSam`, the part of the square.
        prompt_encoder = self.sam.prompt_encoder
        height, width = prompt_encoder.image_embedding_size
        side = max(height, width)
        rows, columns = (torch.arange(n, device=self.sam.device) + 0.5 for n in (height, width))
        centres = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
        encoded: Tensor = prompt_encoder.pe_layer.forward_with_coords(centres, (side, side))
        return encoded.permute(2, 0, 1)[None]

    def forward(
        self,
        images: Tensor,
        boxes: Tensor,
        image_index: Tensor,
        *,
        input_sizes: Tensor | None = None,
        embeddings: Tensor | None = None,
        loss: Callable[..., Tensors] | None = None,
        targets: Tensor | None = None,
        windows: Tensor | None = None,
        gradient: Tensor | None = None,
        rounds: LossRounds | None = None,
    ) -> tuple[Tensor, Any]:
        """Predicts the mask of each box; with a loss, returns the losses instead of the masks.

        See `preprocess` and `decode` for shapes and frames. With a loss, no more than
        `boxes_at_once` masks are in memory at a time (`chunked_loss`).

        Args:
            images: uint8 [N, 3, H, W], or float already preprocessed.
            boxes: float32 [M, 4], x0 y0 x1 y1 in pixels of the model frame.
            image_index: int64 [M].
            input_sizes: int [N, 2], or None where the images fill the frame.
            embeddings: float [N, C, H/16, W/16], used instead of encoding the images.
            loss: `losses.mask_losses` with its weights set, or a like function.
            targets: uint8 [M, G, G], for the loss.
            windows: float32 [M, 4], the rectangles that the targets cover, for the loss.
            gradient: float32 scalar, what the sum of the loss is going to be multiplied by before
                backward; None: 1. Any is right, but in float16 small gradients could be lost.
            rounds: For a loss that is a mean over several rounds, or that begins with points;
                None: one round, with the boxes.

        Returns:
            Mask logits [M, H/4, W/4] and predicted IoU [M]; or, with a loss, the sum of its first
            tensor, and the tensors that it returns, [M] each, without a gradient. With `rounds`,
            these are weighted means over the rounds, followed by those of the first and the last.
        """
        embeddings = self.embed(images, input_sizes, cached=embeddings)
        if loss is None:
            return self.decode(embeddings, Prompts(boxes=boxes), image_index)
        assert targets is not None and windows is not None and input_sizes is not None

        gradient = boxes.new_ones(()) if gradient is None else gradient
        at_once = self.boxes_at_once() if rounds is None else self._clicks_at_once()
        decoder = self._box_decoder(image_index, at_once)
        loss_inputs = LossInputs(targets, windows, image_index, input_sizes)
        of_losses: Any = {"loss": loss, "loss_inputs": loss_inputs, "gradient": gradient}
        if rounds is not None:
            with full_precision(embeddings.device):
                image_pe = self._dense_pe()
            prompt_encoder = self.sam.prompt_encoder
            given = RoundInputs(decoder, prompt_encoder, embeddings, image_pe, boxes)
            return rounds.sum_losses(given, **of_losses)
        inputs = self._decoder_inputs(embeddings, Prompts(boxes=boxes))
        graphs = self.chunk_graphs
        add_chunk = graphs.add_chunk if graphs and boxes.is_cuda else None
        return decoder.sum_losses(inputs, add_chunk=add_chunk, **of_losses)


def inside_image(input_sizes: Tensor, height: int, width: int) -> Tensor:
    """Which pixels of the model frame are image, not padding: float32 [N, height, width], 1 or 0.

    Args:
        input_sizes: int [N, 2], height and width of the image in the frame.
        height: Of the frame.
        width: Of the frame.
    """
    pixels = torch.arange(max(height, width), device=input_sizes.device)
    rows, columns = (pixels < input_sizes[..., None]).float().unbind(1)
    return rows[:, :height, None] * columns[:, None, :width]


@lru_cache(maxsize=64)
def upsampling_matrix(low: int, frame: int, inside: int, original: int) -> Tensor:
    """`Sam.postprocess_masks` along one axis, as a matrix.

    SAM upsamples logits bilinearly to the model frame, cuts the padding off, and resizes bilinearly
    to the original image. Each step is linear and separable, so along one axis all three are one
    matrix, and `rows @ logits @ columns.T` gives any rectangle of the result without the rest.

    Args:
        low: Logits along the axis, a fourth of `frame`.
        frame: Pixels of the model frame.
        inside: Pixels of the frame that are image.
        original: Pixels of the original image.

    Returns:
        float32 [original, low].

    Source: `segment_anything/modeling/sam.py`, `postprocess_masks`.
    """
    # The images of unit vectors are the columns of a linear map (here as rows, hence the `.T`).
    to_frame = F.interpolate(torch.eye(low)[None], size=frame, mode="linear")[0]
    to_original = F.interpolate(to_frame[None, :, :inside], size=original, mode="linear")[0]
    return to_original.T.contiguous()


def original_masks(
    mask_logits: Tensor,
    *,
    input_size: tuple[int, int],
    original_size: tuple[int, int],
    origin: tuple[int, int] = (0, 0),
) -> Iterator[CroppedMask]:
    """The masks of one image, or of a window of it, at its original resolution.

    Equal to thresholding `Sam.postprocess_masks` at 0, but only the rectangle that can have
    positive logits is computed: bilinear resizing makes no positive value of negative ones.

    Args:
        mask_logits: float [M, H/4, W/4], masks of one image.
        input_size: Height and width of the image in the model frame.
        original_size: Height and width of the original image, or of the window.
        origin: y, x of the window in the image, px.

    Yields:
        M masks, each cropped to a rectangle that contains it; [0, 0] where no logit is positive.
    """
    device = mask_logits.device
    rows, columns = (
        upsampling_matrix(low, low * CELL, inside, original).to(device)
        for low, inside, original in zip(
            mask_logits.shape[1:], input_size, original_size, strict=True
        )
    )
    positive = mask_logits > 0
    row_spans = _output_spans(positive.any(2), rows)
    column_spans = _output_spans(positive.any(1), columns)
    spans = torch.stack([row_spans, column_spans], dim=1)
    for logits, span in zip(mask_logits.float(), spans.tolist(), strict=True):
        (top, bottom), (left, right) = span
        with exact_float32():
            mask = (rows[top:bottom] @ logits @ columns[left:right].T > 0).cpu().numpy()
        yield CroppedMask(origin[0] + top, origin[1] + left, mask)


@exact_float32()
def _output_spans(positive: Tensor, matrix: Tensor) -> Tensor:
    """Where outputs can be positive: the first, and one past the last; 0, 0 if nowhere.

    Args:
        positive: bool [M, low], which rows (columns) of the logits have a positive value.
        matrix: float32 [original, low], see `upsampling_matrix`.

    Returns:
        int64 [M, 2].
    """
    # An output can be positive if it draws on a positive input: has a weight that is not 0 for it.
    reached = (positive.float() @ (matrix != 0).float().T) > 0
    # The largest number of a reached output, from 1 up; counted from the other end for the first.
    numbers = torch.arange(1, reached.shape[1] + 1, device=reached.device)
    last = (reached * numbers).amax(1)
    first_from_end = (reached * numbers.flip(0)).amax(1)
    first = torch.where(last > 0, reached.shape[1] - first_from_end, 0)
    return torch.stack([first, last], dim=1)
