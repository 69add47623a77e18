"""Finds the weights to start from: a file, Meta's (downloaded, checked, cached), or our own."""

import http.client
import os
import urllib.request
from pathlib import Path

from tqdm import tqdm

from samft.errors import CheckpointError
from samft.runtime.checkpoint_paths import find_weights_file
from samft.runtime.files import CHUNK_BYTES, cache_folder, file_lock, sha256_of

# Where Meta publishes the files, with their SHA-256; SAMFT_SAM_URL can name a mirror.
SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything"
SAM_FILES = {
    "vit_h": (
        "sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    "vit_l": (
        "sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_b": (
        "sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
}
PACKAGED_TINY = Path(__file__).parent.parent / "pretrained" / "vit_tiny.pth"
TIMEOUT_SECONDS = 60


def find_weights(checkpoint_path: str, model_type: str) -> Path | None:
    """Turns `checkpoint_path` into a file, and downloads it if it is `auto` and not cached yet.

    Args:
        checkpoint_path: A path, `auto` or `random`.
        model_type: The model that the weights are for.

    Returns:
        The file; None for `random`.

    Raises:
        CheckpointError: There is no such file, or the download failed or has a wrong hash.
    """
    if checkpoint_path == "random":
        return None
    if checkpoint_path != "auto":
        path = Path(checkpoint_path).expanduser()
        if not os.path.lexists(path):
            raise CheckpointError(
                f"checkpoint_path: there is no file {path}. Give a SAM .pth, .ckpt or .safetensors "
                "file, a folder of transformers, 'auto' (the packaged file for vit_tiny, else a "
                "download) or 'random'."
            )
        return find_weights_file(path, field="checkpoint_path")
    if model_type == "vit_tiny":
        return PACKAGED_TINY
    name, sha256 = SAM_FILES[model_type]
    base = os.environ.get("SAMFT_SAM_URL", SAM_URL)
    return download_file(f"{base.rstrip('/')}/{name}", cache_folder() / name, sha256=sha256)


def find_local_weights(checkpoint_path: str, model_type: str) -> Path | None:
    """As `find_weights`, without downloading: None for a file that is not on this machine."""
    path = Path(checkpoint_path).expanduser()
    if checkpoint_path == "auto":
        packaged = model_type == "vit_tiny"
        path = PACKAGED_TINY if packaged else cache_folder() / SAM_FILES[model_type][0]
    return path if path.is_file() else None


def download_file(url: str, target: Path, *, sha256: str) -> Path:
    """Downloads a file once per node, however many processes call this at once.

    Args:
        url: The file's address.
        target: Where to store it; a file there with the right hash is used, and nothing downloaded.
        sha256: The hash that its content must have.

    Returns:
        `target`.

    Raises:
        CheckpointError: It cannot be downloaded, or its hash is wrong; no partial file stays.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(target.with_suffix(".lock")):
            if target.is_file() and sha256_of(target) == sha256:
                return target
            part = target.with_suffix(".part")
            try:
                _fetch_url(url, part)
                digest = sha256_of(part)
                if digest != sha256:
                    raise CheckpointError(
                        f"{url} is not the file that it should be: its SHA-256 is {digest}, not "
                        f"{sha256}. It has been deleted; try again, or give checkpoint_path a file."
                    )
                os.replace(part, target)
            finally:
                part.unlink(missing_ok=True)
    except CheckpointError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no URL at all
        raise CheckpointError(
            f"{url} could not be downloaded to {target} ({error}). Fetch it by other means and "
            "give its path as checkpoint_path, or set SAMFT_SAM_URL to a mirror."
        ) from error
    return target


def _fetch_url(url: str, part: Path) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response, part.open("wb") as file:
        size = int(response.headers.get("Content-Length") or 0) or None
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"download {part.stem}") as bar:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
