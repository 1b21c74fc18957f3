"""UViT against the official architecture's golden cases, closed forms and the diffusers contract."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from uvit_dia.attention_units import UNITS
from uvit_dia.errors import ConfigError, UserError
from uvit_dia.uvit import Patches, UViT, timestep_embedding

GOLDEN = Path(__file__).parent / "golden"
TINY = dict(sample_size=8, patch_size=2, in_channels=3, embed_dim=64, depth=4, num_heads=4)


def golden(name: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        settings = file.metadata()
    weights = {
        key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")
    }
    return settings, weights, tensors


@pytest.mark.parametrize("name", ["uvit_uncond", "uvit_class_cond"])
def test_official_weights_load_strictly_and_give_the_official_output(name, tmp_path):
    settings, weights, tensors = golden(name)
    torch.save(weights, tmp_path / "nnet.pth")
    model = UViT.from_official(tmp_path / "nnet.pth", num_heads=int(settings["num_heads"]))
    assert model.config.sample_size == int(settings["img_size"]) and model.config.depth == int(
        settings["depth"]
    )
    assert model.config._trained_on_time == "continuous 999t"
    with torch.no_grad():
        out = model(
            tensors["input.sample"], tensors["input.timestep"], tensors.get("input.class_labels")
        ).sample
    assert torch.allclose(out, tensors["output.sample"], atol=1e-4)


@pytest.mark.parametrize(("channels", "size", "patch"), [(3, 8, 2), (1, 5, 1), (2, 12, 4)])
def test_patches_are_embedded_as_by_a_convolution(channels, size, patch):
    torch.manual_seed(0)
    patches, x = Patches(channels, 16, patch, patch).double(), torch.randn(3, channels, size, size).double()
    convolved = F.conv2d(x, patches.weight, patches.bias, patch)
    grad, found = torch.randn_like(convolved), patches(x)
    torch.testing.assert_close(found, convolved)
    weights = tuple(patches.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found, weights, grad), torch.autograd.grad(convolved, weights, grad)
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda weights: {k: v for k, v in weights.items() if not k.startswith("final_layer")},
        lambda weights: {k: v for k, v in weights.items() if not k.startswith("mid_block.mlp")},
        lambda weights: weights | {"context_embed.weight": torch.zeros(2, 2)},
        lambda weights: weights | {"pos_embed": 3},
        lambda weights: list(weights.values()),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_in_one_line(spoil, tmp_path):
    _, weights, _ = golden("uvit_uncond")
    torch.save(spoil(weights), tmp_path / "nnet.pth")
    with pytest.raises(UserError, match="final 3x3 convolution"):
        UViT.from_official(tmp_path / "nnet.pth")


@pytest.mark.parametrize("unit", [None, *UNITS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_serve_too(unit, dtype):
    torch.manual_seed(0)
    model = UViT(**TINY, unit=unit and {"kind": unit}).eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    with torch.no_grad():
        expected, half = model(x, t).sample, model.to(dtype)(x, t).sample
    assert half.dtype == dtype and torch.allclose(half.float(), expected, atol=0.05)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"pos_embed": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="plain weights"):
        UViT.from_official(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_the_default_model_is_the_official_cifar10_one():
    with torch.device("meta"):
        model = UViT()
    assert sum(p.numel() for p in model.parameters()) == 44_255_328


def test_a_unit_adds_its_parameters_and_leaves_the_official_names_alone():
    plain, gated = UViT(**TINY), UViT(**TINY, unit={"kind": "dia_lstm"})
    assert plain.state_dict().keys() < gated.state_dict().keys()
    assert all(
        key.startswith("shared_unit.") for key in gated.state_dict().keys() - plain.state_dict().keys()
    )


def test_a_constant_gate_of_one_changes_nothing():
    torch.manual_seed(0)
    plain = UViT(**TINY)
    gated = UViT(**TINY, unit={"kind": "constant", "value": 1.0})
    gated.load_state_dict(plain.state_dict())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    assert torch.equal(plain(x, t).sample, gated(x, t).sample)


@pytest.mark.parametrize("kind", ["dia_lstm", "dia_lstm_light"])
def test_every_gate_depends_on_the_blocks_before_it_and_no_state_survives_a_forward(kind):
    torch.manual_seed(0)
    model = UViT(**TINY, unit={"kind": kind})
    states = []
    model.shared_unit.register_forward_hook(lambda module, args, out: states.append((args[1], out[1])))
    x = torch.randn(2, 3, 8, 8)
    first = model(x, 5).sample
    assert len(states) == 5 and states[0][0] is None
    for (_, after), (before, _) in pairwise(states):
        assert before is after and before[0][0].dtype == torch.float32
    assert torch.equal(first, model(x, 5).sample)


def test_pooling_reads_only_patches_unless_all_is_asked_for():
    gates = {}
    for pool in ("patches", "all"):
        torch.manual_seed(0)
        unit = UViT(**TINY, unit={"kind": "dia_lstm", "pool": pool}).shared_unit
        x = torch.randn(1, 17, 64)
        changed = x.clone()
        changed[:, 0] += 10  # the time token
        gates[pool] = [unit(tokens, None)[1][0][0] for tokens in (x, changed)]
    assert torch.equal(*gates["patches"]) and not torch.equal(*gates["all"])


def test_scalar_and_batched_timesteps_agree_and_a_tuple_comes_on_request():
    model = UViT(**TINY)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x, 7).sample, model(x, torch.tensor([7, 7]), return_dict=False)[0])


def test_gradient_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    model = UViT(**TINY, unit={"kind": "dia_lstm"})
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    gradients = []
    for enable in (False, True):
        model.enable_gradient_checkpointing() if enable else None
        model.zero_grad()
        model(x, t).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert model.gradient_checkpointing
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind,momentum", [("cbam", 0.01), ("srm", 0.1)])
def test_gradient_checkpointing_counts_no_batch_twice_in_the_running_statistics(kind, momentum):
    torch.compiler.reset()
    found = []
    for way in ("plain", "checkpointed", "checkpointed and compiled")[: 3 if kind == "srm" else 2]:
        torch.manual_seed(0)
        model = UViT(**TINY | {"depth": 2}, unit={"kind": kind})
        model.enable_gradient_checkpointing() if "checkpointed" in way else None
        model.compile(backend="aot_eager") if "compiled" in way else None
        model(torch.randn(2, 3, 8, 8), 5).sample.square().mean().backward()
        statistics = [x for x in model.buffers() if x.is_floating_point()]
        found.append(statistics + [p.grad for p in model.parameters()])
        assert all(norm.momentum == momentum for norm in model.shared_unit.units[0].norms)
    for tensors in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0], tensors, strict=True))


@pytest.mark.parametrize("kind", UNITS)
@pytest.mark.parametrize(
    "sharing,blocks", [("all", "all"), ("stage", "without in"), ("none", [1, 3]), ("all", [4])]
)
def test_no_parameter_of_a_unit_stays_without_a_gradient(kind, sharing, blocks):
    model = UViT(**TINY, num_classes=3, unit={"kind": kind, "sharing": sharing, "blocks": blocks})
    out = model(torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 2]))
    assert (out.penalty is not None) == (kind == "spem")
    (out.sample.square().mean() + (out.penalty or 0)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_blocks_are_numbered_in_the_order_they_run_and_get_the_grid_of_patches():
    model = UViT(**TINY, unit={"kind": "se"})
    seen = []
    model.shared_unit.register_forward_pre_hook(lambda module, args: seen.append(args[2:]))
    model(torch.randn(2, 3, 8, 8), 5)
    assert seen == [(number, (4, 4)) for number in range(5)]


def skips_in_and_out(model: UViT) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The outputs of in-blocks 0, 1, ... and what their out-blocks get of them."""
    given, got = [], []
    for block in model.in_blocks:
        block.register_forward_hook(lambda module, args, output: given.append(output[0]))
    for block in model.out_blocks:
        block.register_forward_pre_hook(lambda module, args: got.insert(0, args[1]))
    model(torch.randn(2, 3, 8, 8), 5)
    return given, got


@torch.no_grad()
def test_constant_scaling_multiplies_the_skip_of_in_block_i_by_kappa_to_the_i():
    given, got = skips_in_and_out(UViT(**TINY | {"depth": 6}, skip_scale=0.5))
    for i in range(3):
        assert torch.equal(got[i], given[i] * 0.5**i)


@torch.no_grad()
def test_learnable_scaling_gates_each_token_of_every_skip_by_one_small_network():
    size = TINY | {"sample_size": 16}
    plain, model = UViT(**size), UViT(**size, skip_scale="learnable")
    length, hidden, seen, gate = 65, 4, [], model.skip_gate
    added = model.state_dict().keys() - plain.state_dict().keys()
    assert all(key.startswith("skip_gate.") for key in added)
    assert sum(p.numel() for p in gate.parameters()) == 2 * length * hidden + hidden + length
    gate.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    model(torch.randn(2, 3, 16, 16), 5)
    assert len(seen) == 2
    for x, scale in seen:
        y = torch.relu(gate.reduce(x.sum(2) / 64))
        assert torch.allclose(scale[:, :, 0], torch.sigmoid(gate.expand(y)), atol=1e-6)


@torch.no_grad()
def test_ablations_take_away_just_what_they_name():
    torch.manual_seed(0)
    plain, x = UViT(**TINY), torch.randn(2, 17, 64)
    gone = {"long_skips": "skip_linear", "block_norm": "norm1 norm2", "residuals": ""}
    for name, parts in gone.items():
        model = UViT(**TINY | {name: False})
        missing = {key.split(".")[2] for key in plain.state_dict().keys() - model.state_dict().keys()}
        missing -= {"weight", "bias"}
        assert missing <= set(parts.split()) and bool(missing) == bool(parts)
        assert model(torch.randn(2, 3, 8, 8), 5).sample.shape == (2, 3, 8, 8)
    block = model.in_blocks[0]
    after, _ = block(x, None, None, None, 0, None)
    assert torch.equal(after, block.mlp(block.norm2(block.attn(block.norm1(x)))))


def test_saved_and_loaded_by_diffusers_it_is_the_same_model(tmp_path):
    model = UViT(**TINY, num_classes=11, null_label=10, unit={"kind": "dia_lstm", "reduction": None})
    model.save_pretrained(tmp_path)
    again = UViT.from_pretrained(tmp_path)
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 10])
    assert torch.equal(model.eval()(x, 9, labels).sample, again(x, 9, labels).sample)
    assert again.config.unit == {"kind": "dia_lstm", "reduction": None}


def test_timestep_embedding_is_cosines_then_sines_of_a_geometric_ladder():
    e = timestep_embedding(torch.tensor([3.0]), 4)[0]
    expected = torch.tensor([3.0, 3.0 / 100]).cos().tolist() + torch.tensor([3.0, 3.0 / 100]).sin().tolist()
    assert torch.allclose(e, torch.tensor(expected))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"patch_size": 3}, "model.patch_size"),
        ({"num_heads": 5}, "model.num_heads"),
        ({"depth": 3}, "model.depth"),
        ({"num_classes": 10, "null_label": 10}, "model.null_label"),
        ({"null_label": 0}, "model.null_label"),
        ({"unit": {"kind": "dia_lstm", "reduction": 7}}, "model.unit.reduction"),
        ({"unit": {"kind": "se", "reduction": None}}, "model.unit.reduction: None"),
        ({"unit": {"kind": "se", "blocks": [5]}}, "model.unit.blocks: .5. .* list of 0 to 4"),
        ({"skip_scale": 0.0}, "model.skip_scale"),
        ({"skip_scale": 1.5}, "model.skip_scale"),
        ({"skip_scale": "learned"}, "model.skip_scale"),
        ({"skip_scale": 0.7, "long_skips": False}, "model.skip_scale.*model.long_skips"),
    ],
)
def test_sizes_that_do_not_fit_name_the_setting(change, key):
    with pytest.raises(ConfigError, match=key):
        UViT(**TINY | change)


def test_compiled_code_has_the_same_gradients():
    torch.manual_seed(0)
    torch.compiler.reset()
    model = UViT(**TINY, unit={"kind": "dia_lstm"})
    images, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    found = []
    for network in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        network(images, t).sample.square().mean().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for eager, compiled in zip(*found, strict=True):
        assert eager.any()
        torch.testing.assert_close(compiled, eager)
