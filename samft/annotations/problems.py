"""The problems that a COCO dataset can have, each with a severity and a code that never changes.

Imports no torch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

ERROR, WARNING, NOTE, FACT = "error", "warning", "note", "fact"
SEVERITIES = {
    ERROR: "training is refused",
    WARNING: "the entry is left out",
    NOTE: "repaired when read, or used unchanged",
    FACT: "nothing is wrong",
}
MAX_EXAMPLES = 20

# code: severity, and what is wrong and what is done about it.
KINDS = {
    # the file
    "json-missing": (ERROR, "there is no such annotation file"),
    "json-unreadable": (ERROR, "the annotation file cannot be read"),
    "json-invalid": (ERROR, "not valid JSON, or cut short"),
    "json-not-coco": (ERROR, "not an object with lists 'images' and 'annotations'"),
    "json-bom": (NOTE, "the file begins with a byte-order mark, which is skipped"),
    "json-not-utf8": (NOTE, "the text is not UTF-8 and is read as Windows-1252; check the names"),
    "json-not-standard": (NOTE, "holds values outside of standard JSON (NaN, Infinity)"),
    "no-objects": (ERROR, "no usable object"),
    "boxes-only": (ERROR, "boxes without masks: samft predict makes masks from boxes"),
    "keypoints-only": (ERROR, "keypoints, no masks: samft predict makes masks from boxes"),
    "panoptic-only": (
        ERROR,
        "panoptic: the masks are PNG files, which panopticapi converts to instances; samft predict "
        "makes masks from boxes",
    ),
    "captions-only": (ERROR, "captions, no masks: samft predict makes masks, also without boxes"),
    # images
    "image-malformed": (WARNING, "entry of 'images' without an id or a file_name"),
    "image-id-ambiguous": (ERROR, "one image id stands for several files"),
    "image-listed-twice": (NOTE, "the same file is listed again; the entries are merged"),
    "image-outside": (ERROR, "the file lies outside of the data folder; it is never opened"),
    "image-missing": (ERROR, "there is no such image file"),
    "image-ambiguous": (ERROR, "the name fits several files, or its file several names"),
    "image-not-a-file": (ERROR, "a pipe, socket or device instead of a file; it is never opened"),
    "image-empty": (ERROR, "the image file is empty"),
    "image-not-an-image": (ERROR, "the file is no image (HTML, text, a Git LFS pointer, ...)"),
    "image-truncated": (ERROR, "the image file is cut short"),
    "image-damaged": (ERROR, "the image file cannot be decoded"),
    "image-format": (ERROR, "an image of a kind that is not read; convert it to PNG, say"),
    "image-bands": (ERROR, "bands that are not red, green and blue; choose some with channels"),
    "image-pages": (ERROR, "several pages or frames in one image file; choose one with page"),
    "image-too-large": (ERROR, "the image has more than 179 million pixels"),
    "image-unreadable": (ERROR, "the image file cannot be read"),
    "image-unused-bad": (NOTE, "file of an image without objects is missing or broken"),
    "image-name-mended": (NOTE, "found under another spelling of its name"),
    "image-size-missing": (NOTE, "no usable width and height; the file's are used"),
    "image-size-differs": (NOTE, "width and height are not the file's; the file's are used"),
    "image-in-train-and-val": (WARNING, "also in the validation split, so not trained on"),
    "image-copies-in-train-and-val": (
        NOTE,
        "named as a copy of a picture that is in the validation split, too: scores are too good",
    ),
    "image-in-general-set": (WARNING, "also in another split: it says nothing of other data"),
    "image-exif-rotated": (FACT, "EXIF asks for a rotation; not applied, as in COCO's annotations"),
    "image-pixel-type": (FACT, "not 8 bits a value; mapped to 8 bits as pixel_range says"),
    "image-without-objects": (FACT, "no usable object; not trained on"),
    # the frame of outlines and boxes
    "frame-exif-turned": (NOTE, "outlines are on the view that EXIF turns; images are turned too"),
    "frame-scaled": (NOTE, "images were resized after labelling; outlines are scaled to them"),
    "frame-shares": (NOTE, "outlines are in shares of the images' sides; read as pixels"),
    "frame-unknown": (
        ERROR,
        "outlines lie outside of their images, and neither EXIF nor sizes in the JSON say why: "
        "give the images that were labelled, or their width and height in the JSON",
    ),
    "frame-y-first": (ERROR, "outlines have rows before columns (y, x): write x before y"),
    "rle-size-swapped": (NOTE, "RLE 'size' is width, height; read so"),
    "rle-by-rows": (NOTE, "RLE is counted along rows; read so"),
    "boxes-unlike-masks": (
        ERROR,
        "most boxes are not where their masks are, and no other reading of either explains both: "
        "export again, or remove 'bbox' if the masks are right",
    ),
    # categories
    "categories-missing": (NOTE, "no list 'categories'; classes are named by their ids"),
    "categories-table": (NOTE, "'categories' is a list or a table of names, not of entries; read"),
    "category-malformed": (NOTE, "entry of 'categories' without an id or a name"),
    "category-id-twice": (NOTE, "one category id is listed again; the first counts"),
    "category-name-twice": (NOTE, "several category ids have one name; they count as one class"),
    "category-placeholder": (FACT, "category id 0 has no objects: an exporter's placeholder"),
    "category-ids-not-contiguous": (FACT, "category ids have gaps"),
    # annotations
    "annotation-malformed": (WARNING, "entry of 'annotations' that is no object of JSON"),
    "annotation-image-missing": (WARNING, "no image_id"),
    "annotation-orphan": (WARNING, "its image_id is not among the images"),
    "annotation-duplicate": (WARNING, "the same entry with the same id again"),
    "object-twice": (FACT, "two objects of an image have the same mask and class; both are used"),
    "annotation-id-missing": (NOTE, "no id; a new one is given"),
    "annotation-id-twice": (NOTE, "different objects share an id; a new one is given"),
    "annotation-id-zero": (NOTE, "object id 0, which COCOeval takes for 'no match'"),
    "id-renumbered": (NOTE, "an id that is no whole number of 64 bits; it gets a free number"),
    "id-not-integer": (NOTE, "an id written as text or as 5.0, read as a whole number"),
    "category-missing": (NOTE, "no category_id; the object is used without a class"),
    "category-named": (NOTE, "its category_id is the name of a class; read as that class"),
    "category-unknown": (NOTE, "its category_id is not among the categories"),
    "iscrowd-missing": (NOTE, "no iscrowd; taken as 0"),
    "iscrowd-malformed": (NOTE, "iscrowd is neither 0 nor 1; read as the nearer of them"),
    "crowd-used": (NOTE, "iscrowd is 1, but it is used: no crowd by its looks, or --crowds use"),
    "crowd": (FACT, "crowd region; not trained on"),
    # boxes
    "box-missing": (NOTE, "no bbox; taken from the mask"),
    "box-malformed": (NOTE, "bbox is not four numbers; taken from the mask"),
    "box-not-finite": (NOTE, "bbox holds NaN or infinity; taken from the mask"),
    "box-empty": (NOTE, "bbox of zero or negative size; taken from the mask"),
    "box-outside": (NOTE, "bbox far outside of the image; taken from the mask"),
    "box-unlike-mask": (NOTE, "bbox is not where the mask is; taken from the mask"),
    "box-leaves-image": (NOTE, "bbox reaches beyond the image; used unchanged"),
    "box-thin": (FACT, "bbox less than 2 px wide or high"),
    "area-is-box": (NOTE, "'area' is width x height of the box; the mask's is used"),
    # masks
    "mask-missing": (WARNING, "no segmentation, or an empty one"),
    "mask-malformed": (WARNING, "segmentation is neither polygons nor RLE"),
    "mask-outside": (WARNING, "the mask lies outside of the image"),
    "mask-without-pixels": (WARNING, "the mask covers no pixel"),
    "mask-tiny": (FACT, "mask under 16 px"),
    "polygon-malformed": (WARNING, "polygon that is no list of numbers"),
    "polygon-too-short": (WARNING, "polygon of fewer than three points"),
    "polygon-odd": (WARNING, "polygon with an odd count of numbers"),
    "polygon-not-finite": (WARNING, "polygon with NaN or infinity"),
    "polygon-far-outside": (WARNING, "polygon with coordinates beyond 100,000 px"),
    "polygon-too-long": (WARNING, "polygons of more than 4 million px of outline"),
    "polygon-part-left-out": (NOTE, "a part of the mask is unusable; the others are used"),
    "mask-notation": (NOTE, "written in another way than COCO's (points, text, nesting); read"),
    "polygon-flat": (NOTE, "one flat list of numbers, read as one polygon"),
    "polygon-holes": (NOTE, "'area' says that polygons inside of others are holes; read as these"),
    "polygon-leaves-image": (FACT, "polygon reaches beyond the image by more than 1 px"),
    "polygon-parts": (FACT, "mask of several polygons"),
    "rle-malformed": (WARNING, "RLE that cannot be decoded, or does not fill its size"),
    "rle-empty": (WARNING, "RLE without a pixel"),
    "rle-too-large": (WARNING, "RLE of more than 1,074 million pixels"),
    "rle-size-foreign": (WARNING, "RLE of over 32 times the image's height or width"),
    "rle-size-differs": (NOTE, "RLE of another size than the image; cut or padded"),
    # the set
    "split-name": (FACT, "the validation split is not called 'val'"),
    "object-in-no-window": (FACT, "no window shows half of it, so not trained on; see tile_size"),
    "objects-not-chosen": (FACT, "left out by category_names or min_mask_area"),
}
# Errors that `on_bad_image skip` turns into images left out.
BAD_IMAGES = frozenset(
    """image-outside image-missing image-ambiguous image-not-a-file image-empty image-not-an-image
    image-truncated image-damaged image-format image-bands image-pages image-too-large
    image-unreadable""".split()
)
# Errors of files that have nothing to train on.
NO_MASKS = frozenset("no-objects boxes-only keypoints-only panoptic-only captions-only".split())


@dataclass
class Issue:
    """The occurrences of one kind of problem: how many, and the first of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)  # ids or names, MAX_EXAMPLES at most

    def shown(self, num_examples: int) -> str:
        """The first examples as text, with `...` where there are more occurrences."""
        shown = ", ".join(self.examples[:num_examples])
        return f"{shown}, ..." if shown and self.count > num_examples else shown


class Problems:
    """The problems of one annotation file, by code."""

    def __init__(self, issues: dict[str, Issue] | None = None) -> None:
        """Starts empty, or with the given issues by code."""
        self.issues: dict[str, Issue] = issues or {}

    def add(self, code: str, *examples: Any, count: int | None = None) -> None:
        """Records occurrences of a kind.

        Args:
            code: A key of `KINDS`.
            examples: Ids or names, one for each occurrence unless `count` says otherwise.
            count: Number of occurrences, where that is more than there are examples.
        """
        assert code in KINDS, code
        number = len(examples) if count is None else count
        if number:
            issue = self.issues.setdefault(code, Issue())
            issue.count += number
            room = MAX_EXAMPLES - len(issue.examples)
            issue.examples += [str(example) for example in examples[: max(room, 0)]]

    def add_ids(self, code: str, ids: Iterable[Any], *, noun: str) -> None:
        """Records one occurrence for each id, shown as `noun id`."""
        ids = list(ids)
        self.add(code, *(f"{noun} {one}" for one in ids[:MAX_EXAMPLES]), count=len(ids))

    @property
    def has_links_outside(self) -> bool:
        """Whether images lie behind links that `--allow_links` would open."""
        issue = self.issues.get("image-outside", Issue())
        return any("--allow_links" in example for example in issue.examples)

    def merge(self, other: "Problems") -> None:
        """Records all that another file's or reading's problems hold."""
        for code, issue in other.issues.items():
            self.add(code, *issue.examples, count=issue.count)

    def __getitem__(self, code: str) -> int:
        return self.issues[code].count if code in self.issues else 0

    def __iter__(self) -> Iterator[tuple[str, str, Issue]]:
        # Code, severity and issue: the most severe first, then in the order of KINDS.
        order = list(SEVERITIES)
        codes = list(KINDS)
        for code in sorted(self.issues, key=lambda c: (order.index(KINDS[c][0]), codes.index(c))):
            yield code, KINDS[code][0], self.issues[code]

    def count(self, severity: str) -> int:
        """Number of occurrences of a severity."""
        return sum(issue.count for _, kind, issue in self if kind == severity)

    def errors(self, *, on_bad_image: str = "error") -> dict[str, Issue]:
        """What makes training on the file impossible, by code.

        Args:
            on_bad_image: `skip` leaves bad images out of training, so they are no errors.
        """
        tolerated = BAD_IMAGES if on_bad_image == "skip" else frozenset()
        return {
            code: issue
            for code, severity, issue in self
            if severity == ERROR and code not in tolerated
        }

    def left_out(self) -> dict[str, int]:
        """Number of images and objects of the file that are not used, by code."""
        return {
            code: issue.count
            for code, severity, issue in self
            if severity == WARNING or code == "crowd" or code in BAD_IMAGES
        }

    def lines(self, *severities: str, num_examples: int = 3) -> list[str]:
        """One line for each kind: severity, code, count, meaning, examples.

        Args:
            severities: Of these only; all where none is given.
            num_examples: Shown at most.
        """
        lines = []
        for code, severity, issue in self:
            if severities and severity not in severities:
                continue
            shown = issue.shown(num_examples)
            where = f" ({shown})" if shown else ""
            lines.append(f"{severity:8}{code:28}{issue.count:>7,}  {KINDS[code][1]}{where}")
        return lines

    def frame_lines(self) -> list[str]:
        """What is said of the frame of outlines and boxes where it is not the plain one."""
        codes = ("frame-exif-turned", "frame-scaled", "rle-size-swapped", "rle-by-rows")
        return [
            f"{code}: {KINDS[code][1]} ({self.issues[code].shown(1)})"
            for code in codes
            if code in self.issues
        ]

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values, for reports and for `from_json`."""
        return [
            {
                "code": code,
                "severity": severity,
                "count": issue.count,
                "meaning": KINDS[code][1],
                "examples": issue.examples,
            }
            for code, severity, issue in self
        ]

    @classmethod
    def from_json(cls, items: list[dict[str, Any]]) -> "Problems":
        """The inverse of `to_json`."""
        return cls({item["code"]: Issue(item["count"], item["examples"]) for item in items})
