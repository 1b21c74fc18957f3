"""The units against golden cells, plain loops and closed forms; how blocks share them; how they train."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from benchmark import parameter_savings
from run_config import make_accelerator
from safetensors.torch import load_file
from torch import Tensor

from uvit_dia import trainer
from uvit_dia.attention_units import (
    DIALSTM,
    UNITS,
    DIALSTMLight,
    SharedUnit,
    UnitConfig,
    equipped,
)
from uvit_dia.diffusion import DiffusionConfig
from uvit_dia.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"
STAGES = ["in", "in", "mid", "out", "out"]
GRID = (5, 6)


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


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def neighbour(kernel: Tensor, values: Tensor, n: int) -> float:
    """Entry n of a same-size correlation with zeros outside."""
    half = len(kernel) // 2
    inside = [k for k in range(len(kernel)) if 0 <= n + k - half < len(values)]
    return sum(float(kernel[k] * values[n + k - half]) for k in inside)


def se_loop(unit: torch.nn.Module, x: Tensor) -> Tensor:
    y = x.sum(0) / len(x)
    hidden = [max(0.0, float(row @ y)) for row in unit.reduce.weight]
    return torch.tensor(
        [[sigmoid(sum(float(w) * h for w, h in zip(row, hidden, strict=True))) for row in unit.expand.weight]]
    )


def eca_loop(unit: torch.nn.Module, x: Tensor) -> Tensor:
    return torch.tensor([[sigmoid(neighbour(unit.conv.weight[0, 0], x.mean(0), n)) for n in range(16)]])


def cbam_loop(unit: torch.nn.Module, x: Tensor) -> Tensor:
    def two_layers(y: Tensor) -> Tensor:
        return unit.expand.weight @ F.relu(unit.reduce.weight @ y + unit.reduce.bias) + unit.expand.bias

    channels = torch.sigmoid(two_layers(x.mean(0)) + two_layers(x.max(0).values))  # (D,)
    (height, width), norm = GRID, unit.norms[0]
    scaled = (x * channels).reshape(height, width, -1)
    gate = torch.empty(height, width, x.shape[1])
    for i in range(height):
        for j in range(width):
            z = 0.0
            for a in range(max(0, 3 - i), min(7, height + 3 - i)):
                for b in range(max(0, 3 - j), min(7, width + 3 - j)):
                    cell, kernel = scaled[i + a - 3, j + b - 3], unit.conv.weight[0, :, a, b]
                    z += kernel[0] * cell.max() + kernel[1] * cell.mean()
            z = (z - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
            gate[i, j] = channels * torch.sigmoid(z)
    return gate.reshape(-1, x.shape[1])


def srm_loop(unit: torch.nn.Module, x: Tensor) -> Tensor:
    norm, gate = unit.norms[0], []
    for n in range(16):
        mean = float(x[:, n].sum()) / len(x)
        std = math.sqrt(sum((float(v) - mean) ** 2 for v in x[:, n]) / len(x))
        z = float(unit.weight[0, n]) * mean + float(unit.weight[1, n]) * std
        z = (z - float(norm.running_mean[n])) / math.sqrt(float(norm.running_var[n]) + norm.eps)
        gate.append(sigmoid(z * float(norm.weight[n]) + float(norm.bias[n])))
    return torch.tensor([gate])


def spa_loop(unit: torch.nn.Module, x: Tensor) -> Tensor:
    image = x.T.reshape(1, -1, *GRID)
    pools = [F.adaptive_avg_pool2d(image, k).flatten(2)[0].T for k in (1, 2, 4)]  # (k², D) each
    hidden = F.relu(unit.reduce.weight @ torch.cat(pools).flatten())
    return torch.sigmoid(unit.expand.weight @ hidden)[None]


def sem_loop(unit: torch.nn.Module, x: Tensor) -> Tensor:
    y = x.mean(0)
    a, b, c = (sigmoid(float(z)) for z in unit.switch.weight @ y + unit.switch.bias)
    fc = unit.expand.weight @ F.relu(unit.reduce.weight @ y + unit.reduce.bias) + unit.expand.bias
    gate = []
    for n in range(16):
        conv = neighbour(unit.conv.weight[0, 0], y, n)
        channel = float(unit.scale[n] * y[n] + unit.shift[n])
        gate.append(sigmoid(a * float(fc[n])) * sigmoid(b * conv) * sigmoid(c * channel))
    return torch.tensor([gate])


def spem_loop(unit: torch.nn.Module, x: Tensor) -> Tensor:
    p, q = (float(m) ** 2 for m in unit.mix)
    gate = []
    for n in range(16):
        w, b = float(unit.pool_scale[n]), float(unit.pool_shift[n])
        high, low = (w * float(pool) + b for pool in (x[:, n].max(), x[:, n].min()))
        mixed = (p * high + q * low) / (p + q)
        mixed = float(unit.mix_scale[n]) * mixed + float(unit.mix_shift[n])
        gate.append(sigmoid(high + low) * sigmoid(mixed))
    return torch.tensor([gate])


@pytest.mark.parametrize("loop", [se_loop, eca_loop, cbam_loop, srm_loop, spa_loop, sem_loop, spem_loop])
@torch.no_grad()
def test_a_unit_equals_its_plain_loop(loop: Callable[[torch.nn.Module, Tensor], Tensor]):
    torch.manual_seed(0)
    kind = loop.__name__.removesuffix("_loop")
    options = {"reduction": 4} if kind in ("se", "cbam", "spa", "sem") else {}
    unit, x = UNITS[kind](16, **options).eval(), torch.randn(3, math.prod(GRID), 16)
    for name, tensor in unit.state_dict().items():
        tensor.copy_(torch.rand(tensor.shape) + 0.5 if "var" in name else torch.randn(tensor.shape))
    gate, state = unit(x, None, 0, GRID)
    assert gate.dtype == torch.float32 and state is None
    for i in range(3):
        assert torch.allclose(gate[i], loop(unit, x[i]), atol=1e-5)


@pytest.mark.parametrize("dim,r", [(512, 16), (64, 4), (128, 8)])
def test_parameter_counts_of_the_others_equal_their_formulas(dim, r):
    k = {64: 3, 128: 5, 512: 5}[dim]
    assert count(UNITS["se"](dim, reduction=r)) == 2 * dim**2 // r
    assert count(UNITS["eca"](dim)) == k
    two_layers = 2 * dim**2 // r + dim // r + dim
    assert count(UNITS["cbam"](dim, 7, reduction=r)) == two_layers + 2 * 49 + 7 * 2
    assert count(UNITS["srm"](dim, 7)) == 2 * dim + 7 * 2 * dim
    assert count(UNITS["spa"](dim, reduction=r)) == 22 * dim**2 // r
    assert count(UNITS["sem"](dim, reduction=r)) == (3 * dim + 3) + two_layers + k + 2 * dim
    assert count(UNITS["spem"](dim)) == 4 * dim + 2


@pytest.mark.parametrize("kind", ["cbam", "srm"])
@torch.no_grad()
def test_batch_norm_is_a_blocks_own_though_the_unit_is_shared(kind):
    torch.manual_seed(0)
    shared = SharedUnit(UnitConfig(kind=kind), 64, STAGES)
    torch.nn.init.ones_(shared.units[0].weight if kind == "srm" else shared.units[0].conv.weight)
    norms = shared.units[0].norms
    assert len(shared.units) == 1 and len(norms) == len(STAGES)
    x = torch.randn(4, 16, 64)
    for _ in range(50):
        shared(5 * x + 3, None, block=3)
    assert norms[3].running_mean.abs().min() > 0
    for block in (0, 1, 2, 4):
        assert not norms[block].running_mean.any()
    shared.eval()
    gated = [shared(x, None, block)[0] for block in range(5)]
    assert torch.equal(gated[0], gated[1]) and not torch.equal(gated[0], gated[3])


@pytest.mark.parametrize("kind", ["se", "eca", "srm", "spa", "sem", "spem", "cbam"])
def test_a_channel_gate_scales_the_extra_tokens_and_a_spatial_gate_leaves_them(kind):
    torch.manual_seed(0)
    shared = SharedUnit(UnitConfig(kind=kind, gate_scale=3.0), 64, num_extra=2)
    x = torch.randn(2, 2 + 16, 64)
    gated, _ = shared(x, None)
    gate, _ = shared.units[0](x[:, 2:], None)
    assert torch.allclose(gated[:, 2:], 3 * gate * x[:, 2:])
    assert torch.allclose(gated[:, :2], x[:, :2] if kind == "cbam" else 3 * gate * x[:, :2])


@pytest.mark.parametrize(
    ("sharing", "route"),
    [
        ("all", [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)]),
        ("stage", [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]),
        ("none", [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)]),
    ],
)
def test_sharing_gives_each_block_its_unit_and_its_place_and_the_recurrent_state_its_start(sharing, route):
    shared = SharedUnit(UnitConfig(kind="dia_lstm", sharing=sharing), 16, STAGES)
    assert [shared.route[block] for block in range(5)] == route
    assert len(shared.units) == len(dict(route))
    seen, state, x = [], None, torch.randn(2, 4, 16)
    for unit in shared.units:
        unit.register_forward_hook(lambda unit, args, output: seen.append((args[1], output[1])))
    for block in range(5):
        x, state = shared(x, state, block)
    fresh = [block for block, (before, _) in enumerate(seen) if before is None]
    assert fresh == ([0, 2, 3] if sharing == "stage" else [0])
    assert all(seen[b][0] is seen[b - 1][1] for b in range(5) if b not in fresh)


@pytest.mark.parametrize(
    ("blocks", "chosen"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("every 1", [0, 1, 2, 3, 4]),
        ("every 2", [0, 2, 4]),
        ("every 9", [0]),
        ([4, 1], [1, 4]),
        ("without in", [2, 3, 4]),
        ("without mid", [0, 1, 3, 4]),
        ("without out", [0, 1, 2]),
    ],
)
def test_blocks_are_named_by_rule_list_or_stage_and_the_others_pass_everything_on(blocks, chosen):
    assert equipped(blocks, STAGES) == chosen
    shared = SharedUnit(UnitConfig(kind="dia_lstm", blocks=blocks), 16, STAGES)
    x, state = torch.randn(2, 4, 16), ((torch.randn(2, 16), torch.randn(2, 16)),)
    for block in set(range(5)) - set(chosen):
        gated, after = shared(x, state, block)
        assert gated is x and after is state


@pytest.mark.parametrize("blocks", [[], [5], [-1], [0, 9], "every 0", "every", "in", "without the", "some"])
def test_blocks_that_do_not_exist_are_one_clear_line(blocks):
    with pytest.raises(ConfigError, match=r"^model.unit.blocks: .*without mid, .*or a list of 0 to 4$"):
        SharedUnit(UnitConfig(kind="se", blocks=blocks), 64, STAGES)


@pytest.mark.parametrize("kind", ["cbam", "spa"])
def test_a_unit_that_looks_at_the_grid_needs_one_or_a_square(kind):
    shared = SharedUnit(UnitConfig(kind=kind), 16)
    shared(torch.randn(2, 15, 16), None, 0, (3, 5)), shared(torch.randn(2, 16, 16), None)
    with pytest.raises(ConfigError, match=r"^patch tokens: 15 will not do; expected a square number"):
        shared(torch.randn(2, 15, 16), None)


def test_savings_compare_with_a_unit_a_block_where_batch_norm_is_never_shared():
    def savings(**settings: object) -> tuple[int, int]:
        return parameter_savings(SharedUnit(UnitConfig(**settings), 64, STAGES))

    assert savings(kind="se") == (512, 5 * 512)
    assert savings(kind="se", blocks="without mid", sharing="stage") == (2 * 512, 4 * 512)
    assert savings(kind="srm") == (128 + 5 * 128, 5 * 256)
    lstm = count(DIALSTM(64))
    assert savings(kind="dia_lstm") == (lstm, 5 * lstm) and savings(kind="constant") == (0, 0)


@pytest.mark.parametrize("kind", UNITS)
def test_compile_traces_the_blocks_of_a_unit_in_one_graph_with_the_same_gradients(kind):
    torch.compiler.reset()
    torch.manual_seed(0)
    shared = SharedUnit(UnitConfig(kind=kind, sharing="stage", blocks=[0, 1, 4]), 16, STAGES, 1).eval()

    def run(x: Tensor) -> Tensor:
        state = None
        for block in range(5):
            x, state = shared(x, state, block, GRID)
        return x

    inputs = [torch.randn(2, 31, 16, requires_grad=True), *shared.parameters()]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    ours, theirs = (f(inputs[0]) for f in (compiled, run))
    assert torch.allclose(ours, theirs, atol=1e-6)
    grads = [torch.autograd.grad(y.square().sum(), inputs, allow_unused=True) for y in (ours, theirs)]
    for a, b in zip(*grads, strict=True):  # SPEM's penalty is not in this loss
        assert a is b is None or torch.allclose(a, b, atol=1e-5)


@pytest.fixture
def make_state():
    def make(unit: dict) -> trainer.TrainState:
        model = dict(sample_size=8, embed_dim=16, depth=2, num_heads=2, unit=unit)
        config = trainer.TrainConfig(batch_size=2, ema_decay=0.9)
        return trainer.build(config, DiffusionConfig(), model, make_accelerator("fp32"))

    return make


def test_the_penalty_reaches_the_loss_and_is_counted_once_a_unit(make_state):
    losses = []
    for sharing in ("all", "none"):
        state = make_state({"kind": "spem", "sharing": sharing})
        inputs = torch.randn(2, 2, 3, 8, 8)
        t = torch.tensor([5, 500])
        sample = state.model(state.scheduler.add_noise(*inputs, t), t).sample
        loss = trainer.loss_of(state, *inputs, t, None)
        loss.backward()
        losses.append((loss - F.mse_loss(sample, inputs[1])).item())
        mix = state.model.shared_unit.units[-1].mix
        assert torch.allclose(
            mix.grad, 0.2 * mix.detach()
        )  # the gate does not feel it yet: its weights are 0
    assert losses == pytest.approx([0.05, 3 * 0.05], abs=1e-5)


def test_running_statistics_are_copied_to_the_averaged_model_and_kept_by_checkpoints(make_state):
    state = make_state({"kind": "srm"})
    key = "shared_unit.units.0.norms.1.running_var"
    for _ in range(3):
        state.model(torch.randn(2, 3, 8, 8), 5)
        with torch.no_grad():
            state.model.pos_embed.add_(1.0)
        state.ema.update()
    ours, averaged = state.model.state_dict(), state.ema.ema_model.state_dict()
    assert not torch.equal(ours[key], torch.ones(16)) and torch.equal(ours[key], averaged[key])
    assert not torch.equal(ours["pos_embed"], averaged["pos_embed"])
    again = make_state({"kind": "srm"})
    again.load(state.tensors(), state.info() | {"step": 3})
    assert torch.equal(again.model.state_dict()[key], ours[key])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "dia_lstmm"}, "did you mean 'dia_lstm'"),
        ({"kind": "constant", "reduction": 4}, "model.unit.reduction.*constant takes"),
        ({"kind": "srm", "reduction": 4}, "model.unit.reduction.*srm takes none"),
        ({"kind": "se", "num_cells": 2}, "model.unit.num_cells.*se takes"),
        ({"kind": "spa", "pool": "all"}, "model.unit.pool.*grid"),
        ({"kind": "dia_lstm", "gate_scal": 4}, "did you mean 'gate_scale'"),
        ({"gate_scale": 4}, "model.unit.kind"),
        ({"kind": "se", "pool": "patch"}, "model.unit.pool.*did you mean 'patches'"),
        ({"kind": "se", "sharing": None}, "model.unit.sharing: None.*one of all, stage, none"),
        ({"kind": "dia_lstm", "activation": "exp"}, "model.unit.activation"),
        ({"kind": "dia_lstm", "num_cells": 0}, "num_cells"),
        ({"kind": "dia_lstm_light", "num_cells": 2}, "num_cells"),
    ],
)
def test_a_wrong_option_is_named(settings, says):
    with pytest.raises(ConfigError, match=says):
        UnitConfig.of(settings)
