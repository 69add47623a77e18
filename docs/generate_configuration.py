"""Writes docs/configuration.md from the settings of samft.config: run by `make docs`."""

from pathlib import Path

from samft.config import TrainConfig
from samft.settings import default_text, help_sections

PAGE = Path(__file__).with_name("configuration.md")
INTRODUCTION = """\
<!-- Written by `make docs` from samft/config.py: edit the help texts there. -->

# Configuration

Each setting is a flag of `python -m samft.train` (and of `torchrun -m samft.train` and
`bash launch.sh`), a key of the YAML file named by `--config`, and an attribute of
`samft.config.TrainConfig`, all with the same name. A flag wins over its YAML key, and that over the
default. Switches are `--x` and `--no-x` on the command line, `true` and `false` in YAML; other
values are read as those of flags, so that `010` is 10. An unknown key is an error that names the
nearest one.

Every run writes its settings to `config.yaml` in its `output_dir`; `--config` of that file repeats
it. `configs/` has ready-made files.
"""
TABLE_HEAD = "| setting | default | meaning |\n|---|---|---|\n"


def configuration_page() -> str:
    """The text of docs/configuration.md."""
    parts = [INTRODUCTION]
    for title, fields in help_sections(TrainConfig).items():
        parts.append(f"\n## {title.capitalize()}\n\n{TABLE_HEAD}")
        for field in fields:
            default = default_text(field)
            choices = ", ".join(f"`{choice}`" for choice in field.metadata["choices"])
            meaning = field.metadata["help"] + (f" ({choices})" if choices else "")
            cell = f"`{default}`" if default else ""
            parts.append(f"| `{field.name}` | {cell} | {meaning} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(configuration_page())
