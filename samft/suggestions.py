"""'Did you mean ...?': the name that was meant by one that does not exist."""

import difflib
from collections.abc import Iterable

_MAX_NAMED = 3

# What other trainers call our flags and commands.
_OTHER_NAMES = {
    "learning_rate": "lr base_lr",
    "batch_size": "bs b batch",
    "steps": "epochs epoch num_epochs max_epochs iters iterations num_iterations max_iters",
    "num_workers": "j threads num_threads",
    "weight_decay": "wd",
    "data_root": "data dataset data_dir data_path dataset_dir root",
    "model_type": "arch backbone encoder architecture",
    "checkpoint_path": "weights pretrained ckpt load",
    "checkpoint": "weights ckpt model checkpoint_path",
    "output_dir": "out o output save_dir save_path work_dir logdir exp_dir",
    "image_size": "imgsz img_size input_size resolution",
    "metrics_interval": "eval_interval val_interval eval_every log_interval",
    "lr_schedule": "scheduler lr_scheduler sched",
    "accumulate_steps": "grad_accum gradient_accumulation_steps accumulate_grad_batches",
    "clip_grad_norm": "grad_clip max_grad_norm gradient_clip_val",
    "amp": "precision fp16 bf16 half dtype",
    "device": "gpu gpus cuda",
    "train": "tune finetune fine_tune fit",
    "evaluate": "val validate score test",
    "predict": "infer inference segment",
}


def suggest_nearest(name: str, options: Iterable[str]) -> str:
    """A sentence with the option that a name may stand for, after a space; empty if none is near.

    It is the one that is written alike but for dashes and capitals, the one of that meaning, the
    ones that have the same words, or the one with the most letters in common.

    Args:
        name: What was given.
        options: What could have been given.
    """
    plain = {option.strip("-").replace("-", "_"): option for option in options}
    wanted = name.strip("-").replace("-", "_").lower()
    near = [wanted] if wanted in plain else []
    near = near or [key for key in plain if wanted in _OTHER_NAMES.get(key, "").split()]
    near = near or [key for key in plain if _has_words(key, wanted)]
    if not 1 <= len(near) <= _MAX_NAMED:
        near = difflib.get_close_matches(wanted, plain, n=1)
    names = ", ".join(plain[key] for key in near)
    return f" Did you mean {' or '.join(names.rsplit(', ', 1))}?" if near else ""


def _has_words(option: str, wanted: str) -> bool:
    return bool(wanted) and set(wanted.split("_")) <= set(option.split("_"))
