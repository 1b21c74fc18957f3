"""A run's Config: the parts' dataclasses joined, read from YAML and the command line; and its accelerator."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import timedelta
from inspect import getsource
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from uvit_dia.attention_units import UNITS
from uvit_dia.checkpoint import aside
from uvit_dia.data import DataConfig
from uvit_dia.diffusion import DiffusionConfig
from uvit_dia.errors import ConfigError, UserError, nearest, one_of
from uvit_dia.evaluation import EvaluateConfig
from uvit_dia.sampling import SampleConfig
from uvit_dia.trainer import TrainConfig
from uvit_dia.uvit import UViT


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything about a run. `model` holds the arguments of UViT."""

    output_dir: str
    model: dict[str, Any]
    data: DataConfig
    diffusion: DiffusionConfig
    train: TrainConfig
    sample: SampleConfig
    evaluate: EvaluateConfig


A_UNIT = f"null or a mapping with kind, {one_of('', list(UNITS))}"
SECTIONS = {part.name: part.type for part in fields(Config) if is_dataclass(part.type)}


class ConfigFile(ActionConfigFile):
    """`--config FILE`, which may come from anyone: what would have jsonargparse import or open is refused."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        try:
            content = yaml.safe_load(Path(values).read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"--config: {values} can't be parsed as YAML ({error}); mend it") from None
        if not isinstance(content, dict):
            raise ConfigError("--config", values, "a file of settings, such as train: {batch_size: 32}")
        if dotted := [key for key in map(str, content) if "." in key]:
            raise UserError(f"{dotted[0]}: no such key in {values}")
        check_safe(content)
        super().__call__(parser, cfg, values, option_string)


def check_safe(value: Any, key: str = "") -> None:
    """ConfigError or UserError where jsonargparse would import or open what a setting in `value` names."""
    if {"class_path", "config"} & {*key.split(".")}:
        raise UserError(f"{key}: no such key")
    if isinstance(value, dict):
        for name, part in value.items():
            check_safe(part, f"{key}.{name}" if key else str(name))
    elif key in ("model", *SECTIONS):
        raise ConfigError(key, value, "a mapping of settings")
    elif key == "model.unit" and value is not None:
        raise ConfigError(key, value, A_UNIT)


# What jsonargparse says of keys (group, name) and of values (key, type, value).
UNKNOWN = r"(?:Group '(.*?)' does not accept option '|Option '|unrecognized arguments: -*)([\w.]+)"
WRONG_VALUES = (
    r'Parser key "([\w.]+)":\s*Expected a (.*?)\. Got value: (.*)',
    r'Parser key "([\w.]+)":.*?Subtypes: \[(.*?)\]\n.*Given value: (.*)',
    r'Parser key "([\w.]+)":\s*Not of type (.*?): (.*) does not conform',
)


class Parser(ArgumentParser):
    """A jsonargparse parser whose help comes from the settings' comments and whose errors are one line."""

    def __init__(self, description: str | None = None, **options: Any) -> None:
        super().__init__(description=description, allow_abbrev=False, **options)

    def add_settings(self, settings: Any, section: str | None = None) -> None:
        """Options for a dataclass's fields or UViT's arguments, explained by the comments in the source."""
        self.add_class_arguments(settings, section, instantiate=section != "model")
        for name, comment in re.findall(r"^ +(\w+): .*?  # (.*)$", getsource(settings), flags=re.MULTILINE):
            option = f"--{section}.{name}" if section else f"--{name}"
            if option in self._option_string_actions:
                self._option_string_actions[option].help = comment.replace("%", "%%")

    def parse_object(self, cfg_obj: Any, *args: Any, **options: Any) -> Any:
        check_safe(cfg_obj)  # of an axis, which may stand in anyone's file
        return super().parse_object(cfg_obj, *args, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """jsonargparse's message, cut to the key, what is wrong, and the nearest key that there is."""
        if unit := re.search(r"UnitConfig.*?Errors:\s*- (.*?)\n\s*- Expected a ", message, re.DOTALL):
            if "required: kind" in unit[1]:
                raise UserError(f"model.unit.kind: missing; {one_of('', list(UNITS))}")
            if "import path" in unit[1] or "class_path" in unit[1]:
                raise UserError(f"model.unit: expected {A_UNIT}")
            raise UserError(f"model.unit.{unit[1].removeprefix('model.unit.')}")  # cut by UnitConfig's parser
        if unknown := re.search(UNKNOWN, message):
            name = ".".join(filter(None, unknown.groups()))
            keys = [action.dest for action in self._actions if action.dest not in ("help", "print_config")]
            raise UserError(f"{name}: no such key{nearest(name, keys)}")
        for pattern in WRONG_VALUES:
            if wrong := re.search(pattern, message, re.DOTALL):
                types = re.sub(r"<class '(.*?)'>|typing\.", r"\1", wrong[2]).replace("NoneType", "null")
                raise ConfigError(wrong[1], {"None": None}.get(wrong[3], wrong[3]), types)
        raise UserError(message)


def run_parser(description: str) -> Parser:
    """The parser of a run's Config: `--config` (layered in order), then any `--section.field value`."""
    parser = Parser(description)
    parser.add_argument("--config", action=ConfigFile, help="a YAML file; several merge field by field")
    parser.add_argument("--output_dir", type=str, help="the run's folder; else runs/ and the config's name")
    parser.add_settings(UViT, "model")
    for section, settings in SECTIONS.items():
        parser.add_settings(settings, section)
    return parser


def to_config(parser: Parser, parsed: Namespace) -> Config:
    """Type and check what was parsed; ConfigError or UserError where it does not hold together."""
    name = Path(str(parsed.config[-1])).stem if parsed.config else "digits"
    try:
        for section in ("model", *SECTIONS):
            parser.validate(parsed[section], False, branch=section)  # a null in a file is not checked before
        made = parser.instantiate(parsed)
        model = vars(made.model)
        model["unit"] = model["unit"] and model["unit"].as_dict()
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    sections = {section: made[section] for section in SECTIONS}
    return Config(output_dir=parsed.output_dir or f"runs/{name}", model=model, **sections)


class Dumper(yaml.SafeDumper):
    """Quotes words such as 1e3 too, which are numbers to jsonargparse and none to PyYAML."""


Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+.\d_]+[eE][-+]?\d+$"), None)


def save(config: Config, path: Path, header: dict[str, str]) -> None:
    """Write the resolved config, which `--config` reads again; the header (versions, commit) is comments."""
    lines = [f"# {key}: {value}\n" for key, value in header.items()]
    with aside(path) as partial:
        partial.write_text("".join(lines) + yaml.dump(plain(asdict(config)), Dumper=Dumper, sort_keys=False))


def load(path: Path, parser: Parser | None = None) -> Config:
    """The Config that `save` wrote, by a parser at hand, to save time; UserError where there is none."""
    if not path.is_file():
        raise UserError(f"{path.parent}: no run, as it has no {path.name}")
    parser = parser or run_parser("")
    return to_config(parser, parser.parse_args(["--config", str(path)]))


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """A copy of settings that shares nothing, with lists for tuples."""
    return json.loads(json.dumps(settings))


def make_accelerator(precision: str, trackers: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """A script's accelerator, whose trackers write to `folder`; ConfigError for one that is not installed."""
    installed = [tracker.value for tracker in get_available_trackers()]
    if missing := [name for name in trackers if name not in installed]:
        raise ConfigError("train.trackers", missing[0], f"one that is installed: {', '.join(installed)}")
    cpu = not torch.cuda.is_available()  # Apple's GPUs read a copy before it is whole (pytorch issue 189690)
    if cpu and precision == "fp16":
        raise ConfigError("precision", precision, "fp32 or bf16 on a CPU")
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(
        cpu=cpu,  # said, or two CPU processes would be two runs
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=list(trackers) or None,  # accelerate warns of an empty list
        project_dir=folder,
        kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=timedelta(hours=3))],
    )
    if accelerator.device.type == "cpu":  # the launcher's default is one thread a process
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    return accelerator


def check_labels(num_labels: int | None, num_classes: int | None, null_label: int | None) -> None:
    """ConfigError where a conditional model and the labels of a data set do not go together."""
    if num_classes is None:
        return
    if num_labels is None:
        raise ConfigError("model.num_classes", num_classes, "null, as the data has no labels")
    if num_labels > num_classes - (null_label is not None):
        room = "one row a label" + (" and one for null_label" if null_label is not None else "")
        raise ConfigError("model.num_classes", num_classes, f"{room}: the data has {num_labels} labels")
    if null_label is not None and null_label < num_labels:
        raise ConfigError("model.null_label", null_label, f"none of the data's labels, 0 to {num_labels - 1}")
