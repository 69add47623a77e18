"""Finding weights: paths, the packaged file, and downloads from a local server."""

import contextlib
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helpers.short_runs import arguments, command_here, write_data
from samft.errors import CheckpointError, RunStopped
from samft.runtime.files import cache_folder, sha256_of
from samft.weights import download
from samft.weights.download import PACKAGED_TINY, download_file, find_local_weights, find_weights

CONTENT = bytes(range(256)) * 8 * 1024  # two chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MAX = len(CONTENT)
FILE_NAME = "sam_vit_b_01ec64.pth"


class Server(ThreadingHTTPServer):
    """Serves CONTENT under any name but /absent; records the paths, waits for `may_answer`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.paths: list[str] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.closing = threading.Event()
        self.on_request: Callable[[], None] = lambda: None
        self.sent = CONTENT

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing of a client that hung up, which several tests are about."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self.server.may_answer.wait(60)
        if self.path.startswith("/absent"):
            self.send_error(404)
            return
        self.send_response(200)
        if self.path.startswith("/endless"):
            self.end_headers()
            with contextlib.suppress(OSError):  # cut off by the client, as it should
                while not self.server.closing.is_set():
                    self.wfile.write(CONTENT)
            return
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if self.path.startswith("/stalled"):
            self.wfile.write(b"a few bytes")
            self.server.on_request()
            self.server.closing.wait(60)
            return
        self.wfile.write(self.server.sent)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a vit_b whose published hash is that of CONTENT."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SAMFT_CACHE", str(folder))
    monkeypatch.setitem(download.SAM_FILES, "vit_b", (FILE_NAME, SHA256))
    return folder


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_a_download_is_checked_cached_and_not_repeated(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMFT_SAM_URL", f"{server.url}/mirror/")
    for _ in range(2):
        path = find_weights("auto", "vit_b")
        assert path == cache / FILE_NAME
        assert path.read_bytes() == CONTENT
    assert server.paths == [f"/mirror/{FILE_NAME}"]
    assert files_in(cache) == [FILE_NAME]


def test_a_damaged_file_in_the_cache_is_fetched_again(server: Server, cache: Path) -> None:
    cache.mkdir()
    (cache / FILE_NAME).write_bytes(CONTENT[:-1] + b"x")
    download_file(f"{server.url}/{FILE_NAME}", cache / FILE_NAME, sha256=SHA256, max_bytes=MAX)
    assert (cache / FILE_NAME).read_bytes() == CONTENT
    assert len(server.paths) == 1


def test_a_file_with_a_wrong_hash_is_deleted(server: Server, cache: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        download_file(
            f"{server.url}/{FILE_NAME}", cache / FILE_NAME, sha256="0" * 64, max_bytes=MAX
        )
    assert f"its SHA-256 is {SHA256}, not {'0' * 64}" in str(caught.value)
    assert files_in(cache) == []


def test_a_transfer_cut_short_leaves_nothing(server: Server, cache: Path) -> None:
    server.sent = CONTENT[: len(CONTENT) // 2]
    with pytest.raises(CheckpointError):
        download_file(f"{server.url}/{FILE_NAME}", cache / FILE_NAME, sha256=SHA256, max_bytes=MAX)
    assert files_in(cache) == []


@pytest.mark.parametrize("path", ["endless", "announced"])
def test_a_server_that_sends_more_than_the_file_is_cut_off(
    path: str, server: Server, cache: Path
) -> None:
    limit = len(CONTENT) - (path == "announced")
    with pytest.raises(CheckpointError, match=f"sends more than the file's {limit:,} bytes"):
        download_file(f"{server.url}/{path}", cache / "a.pth", sha256=SHA256, max_bytes=limit)
    assert files_in(cache) == []


def test_a_server_that_sends_next_to_nothing_is_given_up(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.3)
    with pytest.raises(CheckpointError, match=r"the server sent [\d,]+ bytes in 0.3 s|timed out"):
        download_file(f"{server.url}/stalled", cache / "a.pth", sha256=SHA256, max_bytes=MAX)
    assert files_in(cache) == []


def test_a_download_and_the_wait_for_another_are_stopped_at_once(
    server: Server, cache: Path
) -> None:
    asked = threading.Event()
    server.on_request = asked.set
    url, target = f"{server.url}/stalled", cache / "a.pth"
    with pytest.raises(RunStopped, match="run the same command again"):
        download_file(url, target, sha256=SHA256, max_bytes=MAX, should_stop=asked.is_set)
    assert asked.is_set() and files_in(cache) == []
    with target.with_suffix(".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another process does that downloads it
        with pytest.raises(RunStopped):
            download_file(url, target, sha256=SHA256, max_bytes=MAX, should_stop=lambda: True)


def test_a_signal_ends_a_training_that_is_downloading(
    server: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.on_request = lambda: os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setenv("SAMFT_SAM_URL", f"{server.url}/stalled")
    data = write_data(tmp_path / "data", num_train=1, num_val=1)
    argv = arguments(data, tmp_path / "run", model_type="vit_b", checkpoint_path="auto")
    assert command_here(argv) == 75
    assert files_in(cache) == ["index"]


def test_a_missing_file_and_a_missing_server(server: Server, cache: Path) -> None:
    closed = Server()
    closed.server_close()
    for url in (f"{server.url}/absent.pth", f"{closed.url}/a.pth"):
        with pytest.raises(CheckpointError) as caught:
            download_file(url, cache / FILE_NAME, sha256=SHA256, max_bytes=MAX)
        assert f"{url} could not be downloaded to {cache / FILE_NAME}" in str(caught.value)
        assert "SAMFT_SAM_URL" in str(caught.value)
    assert files_in(cache) == []


def test_an_invalid_url_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMFT_SAM_URL", "no-address")
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        find_weights("auto", "vit_b")


def test_a_cache_that_cannot_be_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAMFT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        find_weights("auto", "vit_b")


def test_two_processes_at_once_download_once(server: Server, cache: Path) -> None:
    target = cache / FILE_NAME
    code = (
        "import sys; from pathlib import Path; from samft.weights.download import download_file\n"
        "print('ready', flush=True)\n"
        f"path, options = Path(sys.argv[1]), dict(sha256='{SHA256}', max_bytes={MAX})\n"
        f"print(download_file('{server.url}/f', path, **options))"
    )
    server.may_answer.clear()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(target)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    server.may_answer.set()
    for process in processes:
        assert process.communicate(timeout=60)[0] == f"{target}\n"
        assert process.returncode == 0
    assert server.paths == ["/f"]
    assert target.read_bytes() == CONTENT


def test_the_lock_is_released_after_a_failure(server: Server, cache: Path) -> None:
    with pytest.raises(CheckpointError):
        download_file(f"{server.url}/absent", cache / FILE_NAME, sha256=SHA256, max_bytes=MAX)
    with (cache / FILE_NAME).with_suffix(".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_path_is_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my.pth").write_bytes(b"x")
    assert find_weights(str(tmp_path / "my.pth"), "vit_b") == tmp_path / "my.pth"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_weights("~/my.pth", "vit_tiny") == tmp_path / "my.pth"


def test_a_path_without_a_file_is_refused(tmp_path: Path) -> None:
    for path, why in ((tmp_path, "is a folder: name"), (tmp_path / "absent.pth", "'auto'")):
        with pytest.raises(CheckpointError) as caught:
            find_weights(str(path), "vit_b")
        assert str(path) in str(caught.value) and why in str(caught.value)


def test_random_has_no_file() -> None:
    assert find_weights("random", "vit_b") is None


def test_tiny_comes_in_the_package_without_a_download(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "download_file", None)
    path = find_weights("auto", "vit_tiny")
    assert path is not None and path.parent.parent == Path(download.__file__).parent.parent
    assert not cache.exists()


def test_metas_files_are_downloaded_by_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    urls = []
    monkeypatch.delenv("SAMFT_SAM_URL", raising=False)
    monkeypatch.setenv("SAMFT_CACHE", str(tmp_path))
    monkeypatch.setattr(download, "download_file", lambda url, target, **_: urls.append(url))
    for model_type in ("vit_h", "vit_l", "vit_b"):
        find_weights("auto", model_type)
    base = "https://dl.fbaipublicfiles.com/segment_anything"
    names = ("sam_vit_h_4b8939.pth", "sam_vit_l_0b3195.pth", "sam_vit_b_01ec64.pth")
    assert urls == [f"{base}/{name}" for name in names]


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAMFT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "samft"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "samft"
    monkeypatch.setenv("SAMFT_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_sha256_of_a_known_string(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "abc") == expected


def test_local_weights_are_found_without_a_download(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SAMFT_CACHE", str(tmp_path))
    monkeypatch.setattr(download, "download_file", None)  # a call would fail
    assert find_local_weights("auto", "vit_tiny") == PACKAGED_TINY
    assert find_local_weights("auto", "vit_b") is None
    assert find_local_weights("random", "vit_b") is None
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/model.safetensors").touch()
    found_in_folder = find_local_weights(str(tmp_path / "tuned"), "vit_b")
    assert found_in_folder == tmp_path / "tuned/model.safetensors"
    (tmp_path / FILE_NAME).touch()
    assert find_local_weights("auto", "vit_b") == tmp_path / FILE_NAME
    assert find_local_weights(str(tmp_path / FILE_NAME), "vit_b") == tmp_path / FILE_NAME
