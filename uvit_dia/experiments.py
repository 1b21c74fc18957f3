"""Grids of runs: every combination of some settings' values, each trained and scored by the scripts."""

import json
import re
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml

from uvit_dia.checkpoint import RunFolder
from uvit_dia.config import SECTIONS, Config, load, plain, provenance, run_parser, save, to_config
from uvit_dia.errors import UserError


@dataclass(frozen=True)
class Run:
    """One combination: the name of its folder, a label of its value by axis, and its config."""

    name: str
    labels: dict[str, str]
    config: Config

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.output_dir)

    @property
    def card_path(self) -> Path:
        return self.folder.evaluation / f"step_{self.config.train.num_steps:08d}.json"

    def is_trained(self) -> bool:
        try:
            about = json.loads((self.folder.pipeline / "training.json").read_text())
        except OSError:  # none yet, or just being replaced
            return False
        return about["step"] == self.config.train.num_steps

    def card(self) -> dict[str, Any] | None:
        """The score after the last step, as the config asks for it; None before that."""
        if not (self.is_trained() and self.card_path.is_file()):
            return None
        card, wanted = json.loads(self.card_path.read_text()), self.config.evaluate
        found = (card["num_generated"], card["extractor"]["name"])
        return card if found == (wanted.num_images, wanted.extractor) else None

    def last_words(self) -> str:
        """What the log of its processes says of how it ended: the error, else the last line."""
        log = self.folder.root / "log.txt"
        text = log.read_text(errors="replace").strip() if log.is_file() else ""
        errors = re.findall(r"\w*error: .+", text, re.IGNORECASE)  # a progress bar may stand before it
        return (errors or text.splitlines() or ["not started"])[-1]


def label(value: Any) -> str:
    """A value as people read it: none, 32, `dia_lstm gate_scale=4`."""
    if isinstance(value, dict):
        return " ".join(f"{key}={label(item)}".removeprefix("kind=") for key, item in value.items())
    return "none" if value is None else str(value)


def make_runs(base: Config, axes: dict[str, list[Any]], equal: Literal["steps", "images"]) -> list[Run]:
    """Every combination, the last axis fastest, in folders of base.output_dir; UserError where one can't be.

    A value of model.unit replaces the base's whole, and may be `none` or a kind's bare name; mappings
    elsewhere merge. `equal` images: all that counts steps is scaled, so that all see as many images.
    """
    parser, runs = run_parser(""), {}
    if odd := [key for key in axes if key.split(".")[0] not in ("model", *SECTIONS)]:
        raise UserError(f"axis {odd[0]}: no config field, such as train.batch_size or model.unit")
    if "model.unit" in axes:
        base = replace(base, model=base.model | {"unit": None})
    for values in product(*axes.values()):
        settings, changes = plain(asdict(base)), plain(dict(zip(axes, values, strict=True)))
        if isinstance(unit := changes.get("model.unit"), str):
            changes["model.unit"] = None if unit == "none" else {"kind": unit}
        labels = {key: label(value) for key, value in changes.items()}
        parts = (f"{key.split('.')[-1]}-{text}" for key, text in labels.items())
        name = re.sub(r"[^\w.]+", "-", "_".join(parts))
        if name in runs:
            raise UserError(f"two runs of the grid have one name, {name}; does an axis have a value twice?")
        settings["output_dir"] = str(Path(base.output_dir) / name)
        config = to_config(parser, parser.parse_object(changes, parser.parse_object(settings)))
        by = base.train.batch_size / config.train.batch_size if equal == "images" else 1
        config = replace(config, train=scaled(config.train, by), evaluate=scaled(config.evaluate, by))
        runs[name] = Run(name, labels, config)
    return list(runs.values())


def scaled(settings: Any, factor: float) -> Any:
    """The settings with all that counts steps multiplied, to the nearest step."""
    counts_steps = re.compile(r"num_steps|warmup_steps|(\w+_)?every").fullmatch
    counts = {key: n for key, n in vars(settings).items() if counts_steps(key) and n}
    return replace(settings, **{key: max(1, round(n * factor)) for key, n in counts.items()})


def write_grid(root: Path, runs: list[Run], facts: dict[str, Any]) -> None:
    """Write each run's cell.yaml, the config that it is to have, and grid.yaml: the facts and the runs."""
    made_with = provenance()
    for run in runs:
        save(run.config, run.folder.root / "cell.yaml", made_with)
    whole = facts | made_with | {"runs": {run.name: run.labels for run in runs}}
    (root / "grid.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))


def read_grid(root: Path) -> tuple[dict[str, Any], list[Run]]:
    """What `write_grid` wrote, the facts and the runs, wherever the folder has gone since."""
    facts, parser = yaml.safe_load((root / "grid.yaml").read_text()), run_parser("")
    configs = {name: load(root / name / "cell.yaml", parser) for name in facts["runs"]}
    moved = {name: replace(config, output_dir=str(root / name)) for name, config in configs.items()}
    return facts, [Run(name, labels, moved[name]) for name, labels in facts.pop("runs").items()]
