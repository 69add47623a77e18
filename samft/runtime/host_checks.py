"""Checks before the first step: disk space, /dev/shm, the limit of open files, hidden GPUs."""

import os
import resource
import shutil
from pathlib import Path

import torch

from samft.errors import ConfigError
from samft.runtime.device import log_hidden_gpus
from samft.runtime.logs import LOGGER, format_gib

_SHARED_MEMORY = Path("/dev/shm")
_BATCHES_PER_WORKER = 3  # two prefetched, one being made
_MANY_OPEN_FILES = 4096
# Measured: 2 workers train with 72, and not with 64.
_FILES_OF_PROCESS, _FILES_PER_WORKER = 48, 12


def check_disk(folder: Path, needed: int) -> None:
    """Checks that the disk has space for the checkpoints of the whole run.

    Args:
        folder: The output folder.
        needed: Bytes that the run will write in addition to what exists.

    Raises:
        ConfigError: There is less space.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"output_dir: checkpoints will take {format_gib(needed)}, and {folder} has "
            f"{format_gib(free)} left: make room, lower save_top_k, or name another folder."
        )


def warn_of_shared_memory(*, num_workers: int, batch_bytes: int) -> None:
    """Warns if the batches of all loader workers of this host may not fit into /dev/shm.

    Args:
        num_workers: Loader workers of one process.
        batch_bytes: Size of the largest batch.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = processes * num_workers * _BATCHES_PER_WORKER * batch_bytes
    if not num_workers or not _SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if needed > free:
        LOGGER.warning(
            "WARNING: /dev/shm has %s left, and loader workers may need %s: a worker that gets "
            "none is killed by a bus error. Raise it (docker run --shm-size), or lower num_workers "
            "or batch_size",
            format_gib(free),
            format_gib(needed),
        )


def check_host(
    device: torch.device,
    folder: Path,
    *,
    needed: int,
    replaces_existing: bool = True,
    num_workers: int,
    batch_bytes: int,
) -> None:
    """Checks what a run will need of this host.

    Args:
        device: The device of this process.
        folder: The output folder.
        needed: Bytes that the run's checkpoints take up there.
        replaces_existing: Whether the checkpoints in the folder will be replaced by new ones; if
            not, they will be archived and keep their space.
        num_workers: Loader workers of one process.
        batch_bytes: Size of the largest batch.

    Raises:
        ConfigError: The disk has too little space, or too few files may be open.
    """
    check_open_files(num_workers)
    warn_of_shared_memory(num_workers=num_workers, batch_bytes=batch_bytes)
    log_hidden_gpus(device)
    existing = sum(
        path.stat().st_size
        for pattern in ("*.ckpt", "previous/*.ckpt")
        for path in folder.glob(pattern)
    )
    check_disk(folder, needed - existing if replaces_existing else needed)


def check_open_files(num_workers: int) -> None:
    """Raises the soft limit of open files to the hard limit, and makes do with a low one.

    Args:
        num_workers: Loader workers of one process.

    Raises:
        ConfigError: Loader workers cannot do with so few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (ValueError, OSError):  # some systems refuse the hard limit that they report
            pass
    if soft == resource.RLIM_INFINITY or soft >= _MANY_OPEN_FILES or not num_workers:
        return
    needed = _FILES_OF_PROCESS + _FILES_PER_WORKER * num_workers
    if soft < needed:
        raise ConfigError(
            f"num_workers: {num_workers} loader workers need {needed} open files, and this process "
            f"may have {soft}: raise the limit (`ulimit -n`), or lower num_workers."
        )
    # Else each tensor of a batch on its way holds a file open in two processes; a worker that may
    # open no more says so to nobody, and its batches never arrive.
    torch.multiprocessing.set_sharing_strategy("file_system")
