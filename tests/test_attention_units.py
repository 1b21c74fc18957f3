"""The units against golden cells, plain loops and closed forms."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from uvit_dia.attention_units import DIALSTM, UNITS, DIALSTMLight, SharedUnit, UnitConfig
from uvit_dia.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "kind"), [("dia_lstm_cell", DIALSTM), ("dia_lstm_light_cell", DIALSTMLight)]
)
def test_five_steps_of_a_cell_equal_the_golden_case(name, kind):
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    cell = kind(32, reduction=4).cells[0]
    cell.load_state_dict(
        {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    )
    h = c = torch.zeros(2, 32)
    for step, y in enumerate(tensors["input.pooled"]):
        h, c = cell(y, h, c)
        assert torch.allclose(h, tensors["output.hidden"][step], atol=1e-5)
        assert torch.allclose(c, tensors["output.cell"][step], atol=1e-5)


def test_without_reduction_the_cell_is_the_standard_lstm():
    torch.manual_seed(0)
    cell, standard = DIALSTM(16, reduction=None, activation="tanh").cells[0], torch.nn.LSTMCell(16, 16)
    standard.load_state_dict(
        {
            "weight_ih": cell.input_expand.weight,
            "bias_ih": cell.input_expand.bias,
            "weight_hh": cell.hidden_expand.weight,
            "bias_hh": cell.hidden_expand.bias,
        }
    )
    y, h, c = torch.randn(3, 4, 16).unbind(0)
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(cell(y, h, c), standard(y, (h, c)), strict=True)
    )


def test_the_light_widening_tiles_the_squeezed_vector():
    torch.manual_seed(0)
    cell = DIALSTMLight(8, reduction=4).cells[0]
    y, h = torch.randn(2, 1, 8).unbind(0)
    u, v = torch.relu(cell.input_reduce.weight @ y[0]), torch.relu(cell.hidden_reduce.weight @ h[0])
    c = torch.zeros(1, 8)
    for n in range(8):
        gate = torch.sigmoid(u[n % 2] + v[n % 2])  # w = 1 and b = 0 at the start: the four gates agree
        expected = gate * torch.tanh(u[n % 2] + v[n % 2])
        assert torch.allclose(cell(y, h, c)[1][0, n], expected)


@pytest.mark.parametrize("dim,r", [(512, 4), (64, 1), (96, 8)])
def test_parameter_counts_equal_the_closed_forms(dim, r):
    squeezed, full = 10 * dim**2 // r + 2 * (dim // r + 4 * dim), 8 * dim**2 + 8 * dim
    assert count(DIALSTM(dim, reduction=r)) == squeezed
    assert count(DIALSTM(dim, reduction=None)) == full
    assert count(DIALSTM(dim, reduction=r, num_cells=3)) == squeezed + 2 * full
    assert count(DIALSTMLight(dim, reduction=r)) == 2 * dim**2 // r + 16 * dim
    assert count(UNITS["constant"](dim)) == 0


def test_the_papers_dia_lstm_at_width_512_has_659712_parameters():
    assert count(DIALSTM(512)) == 659_712


def test_a_fresh_dia_lstm_shrinks_by_about_a_quarter_and_gate_scale_4_undoes_it():
    torch.manual_seed(0)
    x = torch.randn(4, 17, 64)
    for scale in (1.0, 4.0):
        torch.manual_seed(1)
        shared = SharedUnit(UnitConfig(kind="dia_lstm", gate_scale=scale), 64, num_extra=1)
        gated, _ = shared(x, None)
        assert (gated / x).mean().item() == pytest.approx(0.25 * scale, rel=0.15)


def test_stacked_cells_keep_a_state_each_and_the_top_one_gates():
    shared = SharedUnit(UnitConfig(kind="dia_lstm", num_cells=3), 16)
    x = torch.randn(2, 5, 16)
    gated, state = shared(x, None)
    assert len(state) == 3 and torch.allclose(gated, x * state[-1][0][:, None])


@pytest.mark.parametrize(
    "activation,phi", [("sigmoid", torch.sigmoid), ("tanh", torch.tanh), ("relu", torch.relu)]
)
def test_the_activation_is_applied_to_the_cell(activation, phi):
    torch.manual_seed(0)
    cell = DIALSTM(16, activation=activation).cells[0]
    y, h, c = torch.randn(3, 4, 16).unbind(0)
    gates = cell.input_expand(cell.input_reduce(y).relu()) + cell.hidden_expand(cell.hidden_reduce(h).relu())
    new_h, new_c = cell(y, h, c)
    assert torch.allclose(new_h, torch.sigmoid(gates[:, 48:]) * getattr(torch, activation)(new_c))


def test_a_gate_keeps_the_dtype_of_the_features_and_a_float32_state():
    shared = SharedUnit(UnitConfig(kind="dia_lstm"), 16).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        gated, state = shared(torch.randn(2, 5, 16, dtype=torch.bfloat16), None)
    assert gated.dtype == torch.bfloat16 and state[0][1].dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "dia_lstmm"}, "did you mean 'dia_lstm'"),
        ({"kind": "constant", "reduction": 4}, "model.unit.reduction.*constant takes"),
        ({"kind": "dia_lstm", "gate_scal": 4}, "did you mean 'gate_scale'"),
        ({"gate_scale": 4}, "model.unit.kind"),
        ({"kind": "dia_lstm", "num_cells": 0}, "num_cells"),
        ({"kind": "dia_lstm_light", "num_cells": 2}, "num_cells"),
    ],
)
def test_a_wrong_option_is_named(settings, says):
    with pytest.raises(ConfigError, match=says):
        UnitConfig.of(settings)
