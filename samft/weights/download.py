"""Finds the weights to start from: a file, Meta's (downloaded, checked, cached), or our own."""

import http.client
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from samft.errors import CheckpointError, RunStopped
from samft.runtime.checkpoint_paths import find_weights_file
from samft.runtime.files import CHUNK_BYTES, cache_folder, sha256_of, try_lock
from samft.runtime.logs import progress_bar

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
MAX_BYTES = {"vit_h": 2_700_000_000, "vit_l": 1_400_000_000, "vit_b": 450_000_000}
TIMEOUT_SECONDS = 60.0
MIN_BYTES = 64 << 10  # in that time, or the server is given up
POLL_SECONDS = 0.1


def find_weights(
    checkpoint_path: str, model_type: str, *, should_stop: Callable[[], bool] = lambda: False
) -> Path | None:
    """Turns `checkpoint_path` into a file, and downloads it if it is `auto` and not cached yet.

    Args:
        checkpoint_path: A path, `auto` or `random`.
        model_type: The model that the weights are for.
        should_stop: See `download_file`.

    Returns:
        The file; None for `random`.

    Raises:
        CheckpointError: There is no such file, or the download failed or has a wrong hash.
        RunStopped: See `download_file`.
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
    return download_file(
        f"{base.rstrip('/')}/{name}",
        cache_folder() / name,
        sha256=sha256,
        max_bytes=MAX_BYTES[model_type],
        should_stop=should_stop,
    )


def find_local_weights(checkpoint_path: str, model_type: str) -> Path | None:
    """As `find_weights`, without downloading: None for a file that is not on this machine."""
    path = Path(checkpoint_path).expanduser()
    if checkpoint_path == "auto":
        packaged = model_type == "vit_tiny"
        path = PACKAGED_TINY if packaged else cache_folder() / SAM_FILES[model_type][0]
    try:
        return find_weights_file(path)
    except CheckpointError:
        return None


def download_file(
    url: str,
    target: Path,
    *,
    sha256: str,
    max_bytes: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Downloads a file once per node, however many processes call this at once.

    Args:
        url: The file's address.
        target: Where to store it; a file there with the right hash is used, and nothing downloaded.
        sha256: The hash that its content must have.
        max_bytes: More than the file has: a server that sends more is cut off.
        should_stop: Whether a signal has asked to stop; asked several times a second.

    Returns:
        `target`.

    Raises:
        CheckpointError: It cannot be downloaded, or its hash is wrong; no partial file stays.
        RunStopped: `should_stop` said so; no partial file stays.
    """
    watch = _Watch(url, should_stop)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock_file(target.with_suffix(".lock"), watch):
            if target.is_file() and sha256_of(target) == sha256:
                return target
            part = target.with_suffix(".part")
            try:
                _fetch_url(url, part, max_bytes=max_bytes, watch=watch)
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


@dataclass
class _Watch:
    url: str
    should_stop: Callable[[], bool]

    def raise_if_stopped(self) -> None:
        if self.should_stop():
            raise RunStopped(
                f"stopped while {self.url} was downloaded or waited for: nothing has been kept; "
                "run the same command again."
            )


@contextmanager
def _lock_file(path: Path, watch: _Watch) -> Iterator[None]:
    # Not `file_lock`, whose wait goes on when a signal has been handled.
    while (file := try_lock(path)) is None:
        watch.raise_if_stopped()
        time.sleep(POLL_SECONDS)
    with file:
        yield


class _Transfer(threading.Thread):
    """Receives a file in the background: no signal can end a wait for a socket."""

    def __init__(self, url: str, file: BinaryIO, *, max_bytes: int) -> None:
        super().__init__(daemon=True)
        self.url, self.file, self.max_bytes = url, file, max_bytes
        self.size: int | None = None
        self.received = 0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._receive()
        except Exception as error:  # raised again by the thread that waits
            self.error = error

    def _receive(self) -> None:
        with urllib.request.urlopen(self.url, timeout=TIMEOUT_SECONDS) as response:
            self.size = int(response.headers.get("Content-Length") or 0) or None
            self._check_size(self.size or 0)
            while chunk := response.read1(CHUNK_BYTES):
                self._check_size(self.received + len(chunk))
                self.file.write(chunk)
                self.received += len(chunk)
        if self.size is not None and self.received < self.size:
            raise OSError(f"it ended after {self.received:,} of {self.size:,} bytes")

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self.max_bytes:
            raise OSError(f"the server sends more than the file's {self.max_bytes:,} bytes at most")


def _fetch_url(url: str, part: Path, *, max_bytes: int, watch: _Watch) -> None:
    with part.open("wb") as file:
        transfer = _Transfer(url, file, max_bytes=max_bytes)
        transfer.start()
        with progress_bar(unit="B", unit_scale=True, desc=f"download {part.stem}") as bar:
            _wait_for(transfer, watch, bar)
        if transfer.error is not None:
            raise transfer.error
        file.flush()
        os.fsync(file.fileno())


def _wait_for(transfer: _Transfer, watch: _Watch, bar: "tqdm[Any]") -> None:
    # A transfer that is given up ends with its next byte, since its file is closed.
    started, received = time.monotonic(), 0
    while transfer.is_alive():
        transfer.join(POLL_SECONDS)
        bar.total = transfer.size
        bar.update(transfer.received - bar.n)
        watch.raise_if_stopped()
        if time.monotonic() - started >= TIMEOUT_SECONDS and transfer.is_alive():
            if transfer.received - received < MIN_BYTES:
                raise OSError(
                    f"the server sent {transfer.received - received:,} bytes in "
                    f"{TIMEOUT_SECONDS:g} s"
                )
            started, received = time.monotonic(), transfer.received
