"""The diffusers pipeline: guidance, labels, saving, and the same images whoever draws them."""

import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMPipeline
from run_config import Parser
from run_folder import RunFolder
from safetensors.torch import load_file
from sample import save_images
from torch._dynamo.utils import counters

from uvit_dia.checkpoint import export
from uvit_dia.diffusion import DiffusionConfig, make_sampler, make_scheduler
from uvit_dia.errors import ConfigError, UserError
from uvit_dia.pipeline import UViTPipeline
from uvit_dia.random_keys import Stream, torch_generator
from uvit_dia.sampling import SampleConfig, generate, grid, load_pipeline
from uvit_dia.uvit import UViT

TINY = dict(sample_size=8, patch_size=4, in_channels=1, embed_dim=16, depth=2, num_heads=2)


def make(**settings) -> UViTPipeline:
    torch.manual_seed(0)
    pipeline = UViTPipeline(UViT(**TINY | settings).eval(), make_scheduler(DiffusionConfig()))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: UViTPipeline, config: SampleConfig, **share) -> dict[int, torch.Tensor]:
    pieces = generate(pipeline, config, **share)
    return {int(i): image for indices, images in pieces for i, image in zip(indices, images, strict=True)}


@pytest.mark.parametrize("sampler", ["ddpm", "dpm-solver++"])
def test_image_i_of_a_seed_is_the_same_whoever_draws_it(sampler):
    config = SampleConfig(num_images=10, batch_size=3, steps=4, sampler=sampler)
    alone = draw(make(), config)
    shared = draw(make(), config, rank=0, world=2) | draw(make(), config, rank=1, world=2)
    assert sorted(shared) == list(range(10))
    assert all(torch.equal(alone[i], shared[i]) for i in range(10))
    assert not torch.equal(alone[0], alone[1])
    assert not torch.equal(alone[0], draw(make(), SampleConfig(num_images=1, steps=4, seed=1))[0])


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_once_for_all_batches_images_are_those_of_the_plain_network():
    config = SampleConfig(num_images=5, batch_size=3, steps=3)
    plain, pipeline = draw(make(), config), make()
    torch.compiler.reset()
    counters.clear()
    compiled = draw(pipeline, replace(config, compile=True))  # batches of 3 and of 2, which is filled up
    again = draw(pipeline, replace(config, compile=True, num_images=4))
    assert counters["stats"]["unique_graphs"] == 1 and sorted(compiled) == list(range(5))
    for i in range(5):
        assert (plain[i].int() - compiled[i].int()).abs().max() <= 1
        assert i > 3 or torch.equal(compiled[i], again[i])


def test_a_batch_is_handed_out_when_the_next_has_been_launched():
    pipeline, launched = make(), []
    pipeline.unet.register_forward_hook(lambda *_: launched.append(1))
    seen = [len(launched) for _ in generate(pipeline, SampleConfig(num_images=6, batch_size=2, steps=1))]
    assert seen == [2, 3, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU runs behind the host")
def test_no_step_of_sampling_waits_for_the_device():
    def waits(steps: int) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            draw(make().to("cuda"), SampleConfig(num_images=4, batch_size=2, steps=steps))
        return sum("synchronizing" in str(warning.message) for warning in caught)

    torch.cuda.set_sync_debug_mode("warn")
    try:
        few, many = waits(5), waits(20)  # the first call also loads and tunes kernels
        assert many <= few
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_from_pretrained_gives_the_same_images_from_python(tmp_path):
    export(make(), RunFolder(tmp_path).pipeline, {"step": 3})
    loaded, about = load_pipeline(str(tmp_path), "cpu")
    ours = draw(loaded, SampleConfig(num_images=2, steps=5, seed=7))
    pipeline = UViTPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.scheduler = make_sampler("dpm-solver++", pipeline.scheduler)
    generators = [torch_generator(7, Stream.SAMPLING, i) for i in range(2)]
    images = pipeline(2, num_inference_steps=5, generator=generators, output_type="pt").images
    assert about == {"step": 3}
    assert torch.equal((images * 255).round().to(torch.uint8), torch.stack([ours[0], ours[1]]))


def test_ddpm_pipeline_accepts_the_unconditional_model(tmp_path):
    export(make(), tmp_path / "pipeline", {})
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    image = pipeline(num_inference_steps=3, output_type="np").images
    assert image.shape == (1, 8, 8, 1)


def test_weights_are_exported_bit_for_bit(tmp_path):
    pipeline = make(unit={"kind": "dia_lstm"})
    export(pipeline, tmp_path / "pipeline", {})
    saved = load_file(tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in pipeline.unet.state_dict().items())


def test_guidance_is_a_straight_line_through_uncond_and_cond():
    pipeline = make(num_classes=4, null_label=3)
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    t = torch.tensor(500)
    with torch.no_grad():
        cond = pipeline.predict(x, t, labels, None)
        uncond = pipeline.predict(x, t, torch.tensor([3, 3]), None)
        for scale in (0.0, 1.0, 2.5):
            guided = pipeline.predict(x, t, labels, scale)
            assert torch.allclose(guided, uncond + scale * (cond - uncond), atol=1e-5)


def test_labels_take_the_classes_in_turn_and_never_the_null_one():
    pipeline = make(num_classes=4, null_label=1)
    assert pipeline.labels(5, None).tolist() == [0, 2, 3, 0, 2]
    config = SampleConfig(num_images=5, batch_size=2, steps=2)
    images = draw(pipeline, config)
    assert torch.equal(
        images[3], draw(pipeline, SampleConfig(num_images=4, batch_size=2, steps=2, class_label=0))[3]
    )


@pytest.mark.parametrize(
    ("settings", "asked", "says"),
    [
        ({}, {"class_labels": [1]}, "class_label.*unconditional"),
        ({"num_classes": 3}, {"class_labels": [3]}, "class_label.*0 to 2"),
        ({"num_classes": 3}, {"guidance_scale": 2.0}, "guidance_scale.*null_label"),
        ({}, {"guidance_scale": 2.0}, "guidance_scale"),
    ],
)
def test_what_the_model_cannot_do_is_told(settings, asked, says):
    with pytest.raises(ConfigError, match=says):
        make(**settings)(num_inference_steps=2, **asked)


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"num_images": 0}, "num_images"),
        ({"steps": 0}, "steps"),
        ({"seed": -1}, "seed"),
        ({"sampler": "x"}, "sampler"),
    ],
)
def test_wrong_sample_settings_name_their_key(wrong, key):
    with pytest.raises(ConfigError, match=f"sample.{key}"):
        SampleConfig(**wrong)


def test_every_sample_setting_is_explained_by_its_comment():
    parser = Parser()
    parser.add_settings(SampleConfig)
    explained = {action.dest: action.help for action in parser._actions}
    assert all(explained[name] for name in SampleConfig.__annotations__)
    assert explained["compile"].startswith("torch.compile")


def test_a_source_that_is_none_is_one_line(tmp_path):
    with pytest.raises(UserError, match="neither a run with a pipeline"):
        load_pipeline(str(tmp_path), "cpu")


def test_a_grid_shows_every_image_and_enlarges_small_ones():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 8, 8) * 50
    sheet = grid(images)
    assert sheet.size == (3 * 66 + 2, 2 * 66 + 2)
    assert [sheet.getpixel((2 + 66 * (i % 3), 2 + 66 * (i // 3)))[0] for i in range(5)] == [
        0,
        50,
        100,
        150,
        200,
    ]


def test_images_are_saved_without_loss_under_their_index(tmp_path):
    import numpy as np
    from PIL import Image

    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    save_images(images, torch.tensor([4, 12]), tmp_path)
    back = np.asarray(Image.open(tmp_path / "000012.png"))
    assert np.array_equal(back, images[1].permute(1, 2, 0).numpy())
