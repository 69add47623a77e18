"""Images that two splits share, and images that one gives away: held out, left out, warned of."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from samft.coco.subset import CocoSubset, find_shared, find_siblings, split_by_hash
from samft.images.names import group_of
from samft.runtime.logs import LOGGER


def hold_out_images(
    whole: CocoSubset, val_fraction: float, *, group_by: str
) -> tuple[CocoSubset, CocoSubset]:
    """`split_by_hash`, with what it did in the log."""
    train_subset, val_subset = split_by_hash(whole, val_fraction, group_by=group_by)
    groups = Counter(group_of(whole.file_name(i), group_by) for i in range(whole.num_images))
    del groups[None]
    groups = Counter({name: number for name, number in groups.items() if number > 1})
    if groups:
        LOGGER.info(
            "group_by %s: %d images are in %d groups, each of which stays on one side (%s: %d)",
            group_by,
            groups.total(),
            len(groups),
            *groups.most_common(1)[0],
        )
    LOGGER.info(
        "no validation split: %d of %d images are held out by the hash of their file name (%s%s)",
        val_subset.num_images,
        whole.num_images,
        ", ".join(val_subset.file_name(i) for i in range(min(val_subset.num_images, 5))),
        ", ..." if val_subset.num_images > 5 else "",
    )
    return train_subset, val_subset


def warn_of_siblings(train: CocoSubset, other: CocoSubset, *, group_by: str, split: str) -> None:
    """Warns where images of another split are of one group with training images.

    Args:
        train: The training images.
        other: The images of the other split.
        group_by: See `names.group_of`.
        split: `validation` or `test`.
    """
    if not (train.index.has_files and other.index.has_files):
        return
    # Folders of one name, as the splits have them, say nothing.
    siblings = find_siblings(train, other, group_by="none" if group_by == "folder" else group_by)
    if len(siblings):
        advice = ", or leave out the validation split and set val_fraction"
        LOGGER.warning(
            "%d training images are, by their names, of one group with %s images (%s, group_by "
            "%s): %s scores will be better than on new pictures; split the originals%s",
            len(siblings),
            split,
            train.file_name(int(siblings[0])),
            group_by,
            split,
            advice if split == "validation" else "",
        )


def remove_validated_images(train: CocoSubset, val: CocoSubset) -> CocoSubset:
    """The training images that are not validated on; all of them, where none would be left."""
    shared = find_shared(train, val)
    if len(shared) in (0, train.num_images):
        if len(shared):
            LOGGER.warning(
                "EVERY TRAINING IMAGE IS ALSO IN THE VALIDATION SPLIT: validation scores tell how "
                "well the model remembers these images, and nothing about new ones"
            )
        return train
    code = "image-in-train-and-val"
    names = ", ".join(train.file_name(i) for i in shared[:5])
    LOGGER.warning(
        "%d training images are also in the validation split, so they are not trained on (%s%s)",
        len(shared),
        names,
        ", ..." if len(shared) > 5 else "",
    )
    kept = train.select(np.setdiff1d(np.arange(train.num_images), shared))
    return replace(kept, counts={**train.counts, code: len(shared)})


def remove_seen_images(test: CocoSubset, train: CocoSubset, val: CocoSubset) -> CocoSubset | None:
    """The test images that are neither trained nor validated on; None where there are none."""
    seen = np.union1d(find_shared(test, train), find_shared(test, val))
    if not len(seen):
        return test
    LOGGER.warning(
        "%d of %d images of the test split are also trained or validated on, so they are not "
        "scored as test images (%s%s)",
        len(seen),
        test.num_images,
        ", ".join(test.file_name(i) for i in seen[:5]),
        ", ..." if len(seen) > 5 else "",
    )
    if len(seen) == test.num_images:
        return None
    kept = test.select(np.setdiff1d(np.arange(test.num_images), seen))
    return replace(kept, counts={**test.counts, "image-in-train-or-val": len(seen)})


def warn_of_known_images(general: CocoSubset, others: Mapping[str, CocoSubset]) -> None:
    """Warns where images of the general set are also in other splits.

    Args:
        general: The images of the general set.
        others: The other splits, by name.
    """
    for split, subset in others.items():
        shared = find_shared(general, subset)
        if len(shared):
            LOGGER.warning(
                "general_data_root: %s of its %d images are also in the %s split (%s%s): on these "
                "it says nothing of other data, which it is there for",
                "ALL" if len(shared) == general.num_images else len(shared),
                general.num_images,
                split,
                ", ".join(general.file_name(i) for i in shared[:5]),
                ", ..." if len(shared) > 5 else "",
            )
