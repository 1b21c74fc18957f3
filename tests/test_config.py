"""Layered configs, typed overrides, one-line errors with the nearest key."""

from pathlib import Path

import pytest
import run_config
import torch
from train import provenance

from uvit_dia.errors import UserError
from uvit_dia.evaluation import versions
from uvit_dia.uvit import UViT

CONFIGS = Path(__file__).parents[1] / "configs"


def parse(*argv: object) -> run_config.Config:
    parser = run_config.run_parser("")
    return run_config.to_config(parser, parser.parse_args([str(arg) for arg in argv]))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_builds_its_model(path):
    made = parse("--config", path)
    with torch.device("meta"):
        UViT(**made.model)
    assert made.output_dir == f"runs/{path.stem}"


def test_the_dia_recipes_differ_from_the_baseline_in_the_unit_and_the_folder_alone():
    base, *others = (parse("--config", CONFIGS / f"cifar10_{n}.yaml") for n in ("uvit", "dia", "dia_light"))
    for other in others:
        assert other.model | {"unit": None} == base.model and other.model["unit"]
        assert all(getattr(other, section) == getattr(base, section) for section in run_config.SECTIONS)


def test_files_merge_in_order_field_by_field_and_the_command_line_comes_last(tmp_path):
    a = write(
        tmp_path / "a.yaml",
        "train: {batch_size: 8, num_steps: 5}\nmodel: {unit: {kind: dia_lstm, reduction: 8}}",
    )
    b = write(tmp_path / "b.yaml", "train: {num_steps: 6}\nmodel: {unit: {gate_scale: 4}}")
    made = parse("--config", a, "--config", b, "--model.unit.num_cells", 2, "--train.batch_size", 32)
    assert (made.train.batch_size, made.train.num_steps) == (32, 6)
    unit = made.model["unit"]
    assert (unit["kind"], unit["reduction"], unit["gate_scale"], unit["num_cells"]) == ("dia_lstm", 8, 4.0, 2)
    assert isinstance(unit["gate_scale"], float)
    assert parse("--config", a, "--model.unit", "null").model["unit"] is None
    assert parse("--config", a, "--model.unit.reduction", "null").model["unit"]["reduction"] is None


def test_a_saved_config_reads_back_the_same(tmp_path):
    made = parse(
        "--config", CONFIGS / "digits.yaml", "--model.unit.reduction", "null", "--train.trackers", "[]"
    )
    run_config.save(made, tmp_path / "config.yaml", provenance())
    assert run_config.load(tmp_path / "config.yaml") == made
    assert "# torch: " in (tmp_path / "config.yaml").read_text()


def test_a_machine_without_git_knows_its_versions_alone(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert provenance() == versions()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--train.batchsize 3", "train.batchsize: no such key; did you mean 'train.batch_size'?"),
        ("--train.batch_size x", "train.batch_size: 'x' will not do; expected int"),
        ("--train.max_grad_norm x", "train.max_grad_norm: 'x' will not do; expected float, null"),
        ("--train.batch_size 0", "train.batch_size: 0 will not do; expected 1 or more"),
        ("--train.precision fp8", "train.precision: 'fp8' will not do"),
        ("--data.dataset digit", "data.dataset: 'digit' will not do"),
        ("--model.unit.kind dia_lstmm", "model.unit.kind: 'dia_lstmm' will not do"),
        ("--model.unit.gate_scale 4", "model.unit.kind: missing"),
        ("--model.unit.kind constant --model.unit.reduction 4", "model.unit.reduction: 4 will not do"),
        ("--model.unit.kind dia_lstm --model.unit.gate_scal 4", "did you mean 'gate_scale'?"),
        ("--model.unit.kind dia_lstm --model.unit.reduction x", "model.unit.reduction: 'x' will not do"),
        ("--model.unit 3", "model.unit: expected null or a mapping"),
        ("--sample.sampler euler", "sample.sampler: 'euler' will not do"),
        ("--evaluate.num_images 0", "evaluate.num_images: 0 will not do"),
        ("--config nowhere.yaml", "nowhere.yaml"),
        ("extra", "extra: no such key"),
        ("--train.num_step 3", "did you mean 'train.num_steps'?"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(argv, says):
    with pytest.raises(UserError) as caught:
        parse(*argv.split())
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("trian: {batch_size: 3}", "did you mean 'train.batch_size'?"),
        ("train: {batch_siz: 3}", "train.batch_siz: no such key; did you mean 'train.batch_size'?"),
        ("model: {embed_dims: 3}", "did you mean 'model.embed_dim'?"),
        ("train: 3", "train: 3 will not do; expected a mapping"),
        ("train: {batch_size: [1]}", "train.batch_size"),
        ("train: [1, 2", "parsing"),
        ("model: {unit: {kind: dia_lstm, gate_scal: 4}}", "model.unit.gate_scal: no such key"),
        ("model: {unit: 3}", "model.unit: 3 will not do; expected null or a mapping with kind"),
        ("train: {batch_size: null}", "train.batch_size: None will not do; expected int"),
        ("model: {unit.class_path: payload.Unit}", "model.unit.class_path: no such key"),
        ("a: !!python/object/apply:os.system ['true']", "pars"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_key(text, says, tmp_path):
    with pytest.raises(UserError) as caught:
        parse("--config", write(tmp_path / "c.yaml", text))
    assert says in str(caught.value)


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for said in (
        "images of one optimizer step, over all processes",
        "side of a patch",
        "mirror each training image",
    ):
        assert said in text
    for section in run_config.SECTIONS.values():
        for name in section.__dataclass_fields__:
            assert f".{name} " in text
