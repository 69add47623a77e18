"""Runs with a cache of embeddings, and how many images they encoded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from helpers.short_runs import arguments, command_here
from samft.models.prompted_sam import PromptedSam


@contextmanager
def counted_encodings(at: Any = None) -> Iterator[list[int]]:
    """Collects the number of images of each call of the image encoder.

    Args:
        at: Called before each with the number of images encoded before it.
    """
    counts: list[int] = []
    preprocess = PromptedSam.preprocess

    def counted(self: PromptedSam, images: Tensor, sizes: Tensor | None) -> Tensor:
        if at is not None:
            at(sum(counts))
        counts.append(len(images))
        return preprocess(self, images, sizes)

    with mock.patch.object(PromptedSam, "preprocess", counted):
        yield counts


def cached_arguments(data: Path, folder: Path, **changes: Any) -> list[str]:
    """The command line of a short run with a frozen encoder and a cache."""
    settings = {"freeze_image_encoder": True, "cache_embeddings": "on", **changes}
    return arguments(data, folder, **settings)


def encodings_of(argv: list[str]) -> tuple[int, int]:
    """Runs a command; its exit code, and how many images this process encoded."""
    with counted_encodings() as counts:
        code = command_here(argv)
    return code, sum(counts)
