"""`--device` on a host with GPUs: with `cpu` nothing starts CUDA; a refusal is written down."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.short_runs import arguments, write_data
from samft import evaluate, export, predict
from samft.errors import ConfigError, RunStopped
from samft.train import main

# All that allocates on a GPU, waits for one, or page-locks memory, comes by one of these.
ENTRIES = ("_lazy_init", "init", "synchronize", "current_stream", "mem_get_info", "empty_cache")


@pytest.fixture
def gpus_not_to_be_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs that are there; whoever makes a CUDA context fails. Loader workers inherit this."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("CUDA is started in spite of --device cpu")

    for name in ENTRIES:
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    for module in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(module, "is_available", lambda: True)
        monkeypatch.setattr(module, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.run
@pytest.mark.usefixtures("gpus_not_to_be_touched")
def test_no_command_starts_cuda_for_the_cpu(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", num_train=4, num_val=2)
    run = tmp_path / "run"
    settings: dict[str, Any] = {"steps": 2, "metrics_interval": 2, "num_workers": 1}
    with pytest.raises(RunStopped):
        main(arguments(data, run, **settings, amp="bf16", stop_after=1, probe_memory=True))
    main(arguments(data, run, **settings, amp="bf16"))  # resumed
    main(arguments(data, tmp_path / "cached", **settings, freeze_image_encoder=True))
    main(arguments(data, tmp_path / "dry", **settings, dry_run=True))
    checkpoint = next(run.glob("*-*.ckpt"))
    shared = ["--checkpoint", str(checkpoint), "--device", "cpu", "--num_workers", "1"]
    evaluate.main([*shared, "--data_root", str(data)])
    predict.main(
        [*shared, "--images", str(data / "val"), "--box=1,1,9,9"]
        + ["--output_dir", str(tmp_path / "predicted")]
    )
    export.main(
        ["--checkpoint", str(checkpoint), "--format", "safetensors"]
        + ["--output", str(tmp_path / "exported.safetensors")]
    )


@pytest.mark.run
def test_a_refused_device_is_in_the_status_that_launch_sh_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without it, launch.sh would take torchrun's exit code, which is 0 for what no restart changes.
    status = tmp_path / "status.json"
    monkeypatch.setenv("SAMFT_STATUS_FILE", str(status))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    data = write_data(tmp_path / "data", num_train=1, num_val=1)
    with pytest.raises(ConfigError, match="'cuda' was asked for"):
        main(arguments(data, tmp_path / "run", device="cuda"))
    written = json.loads(status.read_text())
    assert written["exit_code"] == 2 and "'cuda' was asked for" in written["reason"]
    assert not (tmp_path / "run").exists()
