"""The shared unit on a timm ViT and on the paper's CIFAR ResNet-164."""

from copy import deepcopy
from itertools import pairwise
from threading import Thread

import pytest
import timm
import torch
from torch import Tensor, nn

from uvit_dia.attach import attach
from uvit_dia.errors import ConfigError

BRANCH_ENDS = "layer*.conv3"  # of a ResNet: what is added to the residual


class Bottleneck(nn.Module):
    """Pre-activation (He et al. 2016, arXiv 1603.05027): BatchNorm, ReLU, convolution, three times."""

    def __init__(self, width: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, planes, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn3, self.conv3 = nn.BatchNorm2d(planes), nn.Conv2d(planes, 4 * planes, 1, bias=False)
        same = width == 4 * planes
        self.shortcut = nn.Identity() if same else nn.Conv2d(width, 4 * planes, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.bn1(x).relu())
        y = self.conv2(self.bn2(y).relu())
        return self.shortcut(x) + self.conv3(self.bn3(y).relu())


class ResNet(nn.Module):
    """For CIFAR-100, 9 n + 2 layers: 164 with n = 18."""

    def __init__(self, n: int = 18) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = self.stage(16, 16, 1, n)
        self.layer2 = self.stage(64, 32, 2, n)
        self.layer3 = self.stage(128, 64, 2, n)
        self.bn, self.fc = nn.BatchNorm2d(256), nn.Linear(256, 100)

    @staticmethod
    def stage(width: int, planes: int, stride: int, n: int) -> nn.Sequential:
        rest = [Bottleneck(4 * planes, planes, 1) for _ in range(n - 1)]
        return nn.Sequential(Bottleneck(width, planes, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(self.bn(x).relu().mean((2, 3)))


class Wrap(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def vit(**settings: int) -> nn.Module:
    return timm.create_model("vit_small_patch16_224", pretrained=False, **settings).eval()


@pytest.mark.parametrize(("r", "millions"), [(1, 2.59), (4, 1.95), (8, 1.84), (16, 1.78)])
def test_resnet_164_with_dia_lstm_has_the_parameters_of_the_papers_table_xii(r, millions):
    with torch.device("meta"):
        model = ResNet()
        assert count(model) == 1_726_388
        attach(model, BRANCH_ENDS, {"kind": "dia_lstm", "reduction": r})
    squeezed = sum(10 * n**2 // r + 2 * (n // r + 4 * n) for n in (64, 128, 256))
    assert count(model) == 1_726_388 + squeezed and round(count(model) / 1e6, 2) == millions


def test_each_stage_shares_one_unit_and_the_light_form_has_its_formula():
    with torch.device("meta"):
        model, transformer = ResNet(), vit()
        units = attach(model, BRANCH_ENDS, {"kind": "dia_lstm_light"})
        light = attach(transformer, "blocks.*.norm2", {"kind": "dia_lstm_light"}, num_extra=1)
    assert [unit.dim for unit in units] == [64, 128, 256] and all(len(u.stages) == 18 for u in units)
    assert [count(unit) for unit in units] == [2 * n**2 // 4 + 16 * n for n in (64, 128, 256)]
    assert len(light) == 1 and count(light) == 2 * 384**2 // 4 + 16 * 384


@pytest.mark.parametrize(
    "model,pattern,shape,num_extra",
    [(ResNet, BRANCH_ENDS, (2, 3, 32, 32), 0), (vit, "blocks.*.norm2", (1, 3, 224, 224), 1)],
)
@torch.no_grad()
def test_a_constant_gate_of_one_changes_no_bit_and_no_weight(model, pattern, shape, num_extra):
    model, x = model().eval(), torch.randn(shape)
    weights, before = deepcopy(model.state_dict()), model(x)
    attach(model, pattern, {"kind": "constant", "value": 1.0}, num_extra)
    assert torch.equal(model(x), before)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["dia_lstm", "dia_lstm_light", "cbam", "srm", "spa"])
def test_gradients_reach_every_parameter_of_the_units(kind):
    settings = {"kind": kind, "reduction": 8} if kind != "srm" else {"kind": kind}
    network, transformer = ResNet(n=2), vit(depth=2, img_size=112)
    attach(network, BRANCH_ENDS, settings)
    attach(transformer, "blocks.*.norm2", settings, num_extra=1)
    transformer.train()
    for model, x in (network, torch.randn(2, 3, 32, 32)), (transformer, torch.randn(2, 3, 112, 112)):
        model(x).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        assert any(p.grad.any() for p in model.shared_units.parameters())


def watch(model: nn.Module) -> list[tuple]:
    """(unit, state before, state after) of each block that ran."""
    seen: list[tuple] = []
    for unit in model.shared_units:
        unit.register_forward_hook(lambda unit, args, output: seen.append((unit, args[1], output[1])))
    return seen


@torch.no_grad()
def test_the_state_starts_anew_in_each_stage_and_forward_and_passes_from_block_to_block():
    model, x = ResNet(n=3).eval(), torch.randn(1, 3, 8, 8)
    attach(model, BRANCH_ENDS, {"kind": "dia_lstm"})
    seen = watch(model)
    assert torch.equal(model(x), model(x)) and len(seen) == 18
    for (unit, _, after), (next_unit, before, _) in pairwise(seen):
        assert before is (after if next_unit is unit else None)


@torch.no_grad()
def test_feature_maps_are_gated_as_their_tokens_and_the_extra_tokens_are_not_pooled():
    model = Wrap(nn.Conv2d(3, 16, 1))
    attach(model, "layer", {"kind": "se", "reduction": 4})
    x = torch.randn(2, 3, 5, 4)
    before = nn.functional.conv2d(x, model.layer.weight, model.layer.bias)
    gate, _ = model.shared_units[0].units[0](before.flatten(2).mT, None)  # (2, 1, 16)
    after = model(x)
    assert torch.allclose(after, before * gate.mT[..., None]) and after.is_contiguous()
    tokens = Wrap(nn.LayerNorm(16))
    unit = attach(tokens, "layer", {"kind": "se", "reduction": 4}, num_extra=2)[0]
    pooled = []
    unit.units[0].register_forward_hook(lambda module, args, output: pooled.append(args[0].shape[1]))
    tokens(torch.randn(2, 9, 16))
    assert pooled == [7]


@torch.no_grad()
def test_a_copy_has_units_of_its_own_and_threads_have_states_of_their_own():
    model = ResNet(n=2).eval()
    attach(model, BRANCH_ENDS, {"kind": "dia_lstm"})
    copy, x = deepcopy(model), torch.randn(4, 1, 3, 8, 8)
    expected = [model(image) for image in x]
    for p in model.shared_units.parameters():
        p.zero_()
    found = [None] * 4
    threads = [Thread(target=lambda i=i: found.__setitem__(i, copy(x[i]))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(model(x[0]), expected[0])


def test_a_failed_forward_leaves_no_state_and_a_part_alone_is_an_error():
    model = ResNet(n=1)
    attach(model, BRANCH_ENDS, {"kind": "dia_lstm"})
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.randn(1, 5, 8, 8))
    with pytest.raises(RuntimeError, match="outside a call of the model"):
        model.layer1(torch.randn(1, 16, 8, 8))


@pytest.mark.parametrize("pattern", ["layer*.conv9", "layer1"])
def test_a_pattern_without_modules_that_have_a_width_is_one_clear_line(pattern):
    with pytest.raises(ConfigError, match=r"^pattern: .* names of modules with a weight"):
        attach(ResNet(n=1), pattern, {"kind": "se"})


def test_a_unit_that_does_not_fit_a_later_stage_leaves_the_model_as_it_was():
    model, x = Wrap(nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 20, 1))), torch.randn(1, 3, 4, 4)
    before = model(x)
    with pytest.raises(ConfigError, match="16 will not do; expected a divisor of the 20 channels"):
        attach(model, "layer.?", {"kind": "se", "reduction": 16})
    assert torch.equal(model(x), before)


def test_a_second_attach_and_a_grid_unit_on_no_square_of_tokens_are_one_clear_line():
    model = Wrap(nn.LayerNorm(16))
    attach(model, "layer", {"kind": "spa"})
    for taken in (model, nn.Sequential(nn.LayerNorm(16))):
        with pytest.raises(ConfigError, match="attach once"):
            attach(taken, "*", {"kind": "se"})
    with pytest.raises(ConfigError, match="patch tokens: 15 will not do"):
        model(torch.randn(1, 15, 16))
