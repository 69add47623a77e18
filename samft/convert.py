"""Makes a COCO dataset from the layouts of other tools, or the reverse.

    samft convert --from labels --source MASKS --images DIR --output_dir OUT
    samft convert --from yolo --source DATASET --output_dir OUT
    samft convert --to labels --source COCO.json --images DIR --output_dir OUT

--from writes OUT/SPLIT/_annotations.coco.json with the images beside it, and reads

    labels   label images, in each pixel the number of its object: PNG or TIFF
             of 8, 16 or 32 bits, named as the images (Cellpose, QuPath)
    masks    a folder for each image, with a picture of each object's mask
    yolo     data.yaml, images, and text files of outlines
    labelme  its JSON files
    voc      JPEGImages, SegmentationObject, SegmentationClass, ImageSets

--to reads a COCO file, and writes

    labels   a TIFF for each image; pixel value k is its k-th object
    yolo     data.yaml, images, and text files of outlines

Objects that are left out, or that the layout cannot hold wholly, are named.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from samft.cli import CommandParser, run_command, user_path
from samft.coco.index import index_file
from samft.coco.subset import raise_for_errors
from samft.commands import shell_command
from samft.errors import ConfigError, DataError, escape_unprintable, fold_for_terminal
from samft.interchange.layouts import NEED_IMAGES, READERS
from samft.interchange.writers import Converted, write_dataset, write_label_images, write_yolo
from samft.runtime.files import staging_path
from samft.runtime.output_dir import create_writable_dir

_TARGETS = ("labels", "yolo")


def main(argv: list[str]) -> dict[str, Any]:
    """Parses the command line, converts, and says what was written.

    Args:
        argv: The arguments after the program's name; `--help` lists them.

    Returns:
        `images` and `objects` by split, and `notes`.

    Raises:
        UserError: A flag, the source or the output folder cannot be used.
    """
    options = _parse_options(argv)
    output: Path = options.output_dir
    create_writable_dir(output.parent)
    try:
        with staging_path(output) as part:
            part.mkdir()
            converted = _convert(options, part)
    except OSError as error:
        if _is_of_source(error, output):
            raise DataError(
                f"--source: {error.filename} cannot be read ({error.strerror})."
            ) from error
        raise ConfigError(f"--output_dir: {output} cannot be written ({error}).") from error
    for note in converted.notes:
        print(fold_for_terminal(escape_unprintable(note), sys.stderr), file=sys.stderr)
    for split in converted.images:
        counts = f"{converted.images[split]:,} images, {converted.objects[split]:,} objects"
        print(escape_unprintable(f"{output}: {split}: {counts}"))
    if options.origin:
        print(f"Next, look at it:\n  {shell_command('check', '--data_root', output)}")
    return vars(converted) | {
        "images": dict(converted.images),
        "objects": dict(converted.objects),
    }


def _is_of_source(error: OSError, output: Path) -> bool:
    # Of two names, as of a copy, the second is what was written.
    name = Path(error.filename2 or error.filename or output)
    staging = str(output.parent / f".{output.name}.")  # see `staging_path`
    return not name.is_relative_to(output) and not str(name).startswith(staging)


def _parse_options(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser("convert", __doc__)
    add = parser.add_argument
    add("--from", dest="origin", choices=tuple(READERS), help="layout of --source")
    add("--to", choices=_TARGETS, help="layout to write of a COCO file")
    add(
        "--source",
        type=user_path,
        required=True,
        metavar="PATH",
        help="folder to read; with --to a COCO file",
    )
    add("--images", type=user_path, metavar="DIR", help="images, for labels, masks and --to")
    add("--output_dir", type=user_path, required=True, metavar="DIR", help="new folder to write")
    add("--link", action="store_true", help="make hard links of images, not copies")
    add("--debug", action="store_true", help="show tracebacks of user errors too")
    options = parser.parse_args(argv)
    _check_options(options)
    return options


def _check_options(options: argparse.Namespace) -> None:
    if bool(options.origin) == bool(options.to):
        raise ConfigError(
            f"give --from ({', '.join(READERS)}) to make a dataset of samft, or --to "
            f"({', '.join(_TARGETS)}) to make something else of a COCO file."
        )
    needs_images = options.to or options.origin in NEED_IMAGES
    if needs_images and not options.images:
        raise ConfigError("--images: name the folder of the images.")
    if options.images and not needs_images:
        raise ConfigError(f"--images: {options.origin} says itself where its images are.")
    source, output = options.source, options.output_dir
    may_be_file = options.to or options.origin == "yolo"  # its data.yaml
    if not (source.is_dir() and not options.to) and not (source.is_file() and may_be_file):
        what = "COCO file" if options.to else "folder"
        raise DataError(f"--source: there is no {what} {source}: check the path.")
    if options.images and not options.images.is_dir():
        raise DataError(f"--images: there is no folder {options.images}: check the path.")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"--output_dir: {output} is not an empty folder: name a new one.")


def _convert(options: argparse.Namespace, part: Path) -> Converted:
    if options.origin:
        folders = [options.images] if options.images else []
        images = READERS[options.origin](options.source, *folders)
        converted = write_dataset(images, part, link=options.link)
        if not converted.images:
            raise DataError(f"--source: {options.source} has no image.")
        if not sum(converted.objects.values()):
            notes = "".join(f"; {note}" for note in converted.notes[:1])
            raise DataError(f"--source: no image of {options.source} has an object{notes}.")
        return converted
    index = index_file(options.source, options.images)
    raise_for_errors(index.problems, options.source)
    if options.to == "labels":
        return write_label_images(index, part)
    return write_yolo(index, part, link=options.link)


if __name__ == "__main__":
    sys.exit(run_command(main))
