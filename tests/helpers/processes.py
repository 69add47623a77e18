"""Processes of this machine, from /proc."""

from pathlib import Path


def _parents() -> dict[int, int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # gone meanwhile
                continue
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    return parents


def children_of(pid: int) -> list[int]:
    """The living children of a process, in order of their numbers."""
    return sorted(child for child, parent in _parents().items() if parent == pid)


def descendants_of(pid: int) -> list[int]:
    """All living processes that a process started, directly or not."""
    parents, family = _parents(), [pid]
    for ancestor in family:
        family += [child for child, parent in parents.items() if parent == ancestor]
    return family[1:]


def processes_with(word: str) -> list[int]:
    """Living processes that have a word in their command line."""
    pids = []
    for pid in _parents():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if word.encode() in command:
            pids.append(pid)
    return sorted(pids)


def has_signal_handler(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
