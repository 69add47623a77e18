"""The few masks of a validation that are kept to be looked at; the others are scored and let go."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from samft.coco.masks import decode_encoded, encode_cropped
from samft.data.targets import CroppedMask
from samft.distributed import all_gather

Key = tuple[int, int]  # the ids of an image and of one of its objects


@dataclass(frozen=True, order=True)
class KeptMask:
    """A mask that a model predicted; ordered by how bad it is."""

    iou_actual: float
    key: Key
    iou_predicted: float = field(compare=False)
    rle: dict[str, Any] = field(compare=False)  # at the original resolution

    @property
    def mask(self) -> CroppedMask:
        """The mask, cropped tightly."""
        top, left, crop = decode_encoded(self.rle)
        return CroppedMask(top, left, crop.astype(bool))


class MaskKeeper:
    """Keeps the masks of certain objects, and the worst; in memory never more than those.

    Args:
        fixed: The objects whose masks are kept whatever they are.
        num_worst: How many of the worst.
    """

    def __init__(self, fixed: Iterable[Key], *, num_worst: int) -> None:
        self._wanted, self._num_worst = frozenset(fixed), num_worst
        self.fixed: dict[Key, KeptMask] = {}
        self.worst: list[KeptMask] = []
        # The best of the worst first: what a worse one pushes out.
        self._heap: list[tuple[float, int, int]] = []
        self._encoded: dict[Key, KeptMask] = {}

    def offer(
        self, key: Key, mask: CroppedMask, *, ious: tuple[float, float], size: tuple[int, int]
    ) -> None:
        """Keeps a mask if it is to be kept.

        Args:
            key: Of its object.
            mask: At the original resolution.
            ious: Actual and predicted.
            size: H, W of the image.
        """
        entry = (-ious[0], -key[0], -key[1])
        has_room = len(self._heap) < self._num_worst
        is_bad = has_room or (self._num_worst > 0 and entry > self._heap[0])
        if key not in self._wanted and not is_bad:
            return
        height, width = size
        rle = encode_cropped(mask.top, mask.left, mask.mask, height=height, width=width)
        kept = KeptMask(ious[0], key, ious[1], rle)
        if key in self._wanted:
            self.fixed[key] = kept
        if is_bad:
            heapq.heappush(self._heap, entry)
            self._encoded[key] = kept
            if len(self._heap) > self._num_worst:
                _, image_id, object_id = heapq.heappop(self._heap)
                del self._encoded[-image_id, -object_id]

    def gather(self) -> None:
        """Puts those of all ranks into `fixed` and `worst`, the same on each. Collective."""
        found = all_gather((self.fixed, list(self._encoded.values())))
        self.fixed = {key: kept for fixed, _ in found for key, kept in fixed.items()}
        self.worst = sorted(kept for _, some in found for kept in some)[: self._num_worst]
