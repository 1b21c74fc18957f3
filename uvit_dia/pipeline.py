"""The diffusers pipeline: class labels, classifier-free guidance and any diffusers sampler."""

from collections.abc import Sequence
from inspect import signature

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from uvit_dia.errors import ConfigError
from uvit_dia.uvit import UViT


class UViTPipeline(DiffusionPipeline):
    """Denoise images by any sampler (`make_sampler`). DDPMPipeline reads folders of unconditional models."""

    def __init__(self, unet: UViT, scheduler: SchedulerMixin) -> None:
        super().__init__()
        if not isinstance(unet, UViT):  # as of any other model's folder
            raise ConfigError("unet", type(unet).__name__, "a UViT")
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample `batch_size` images.

        class_labels: one integer an image; None takes the classes in turn (none if unconditional).
        guidance_scale: uncond + s (cond - uncond); 1 is off (the official code's 0.4 is 1.4 here).
        generator: one, or one an image. output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1].
        """
        labels = self.labels(batch_size, class_labels)  # (B,) or None
        self.check(guidance_scale, num_inference_steps)
        self.scheduler.set_timesteps(num_inference_steps)
        size = self.unet.config.sample_size
        shape = (batch_size, self.unet.config.in_channels, size, size)
        x = self.scheduler.init_noise_sigma * randn_tensor(shape, generator, self.device, torch.float32)
        noise = {"generator": generator} if "generator" in signature(self.scheduler.step).parameters else {}
        moved = self.scheduler.timesteps.to(self.device)  # at once: a copy a step would wait for it
        for t, t_moved in zip(self.progress_bar(self.scheduler.timesteps), moved, strict=True):
            x_in = self.scheduler.scale_model_input(x, t)
            prediction = self.predict(x_in, t_moved, labels, guidance_scale if guidance_scale != 1 else None)
            x = self.scheduler.step(prediction, t, x, **noise).prev_sample
        images = VaeImageProcessor().postprocess(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def predict(self, x: Tensor, t: Tensor, labels: Tensor | None, guidance_scale: float | None) -> Tensor:
        """The network's float32 prediction at x (B, C, H, W), guided where a scale is given."""
        if guidance_scale is None or labels is None:
            return self.unet(x, t, labels).sample.float()
        null = torch.full_like(labels, self.unet.config.null_label)
        cond, uncond = self.unet(torch.cat([x, x]), t, torch.cat([labels, null])).sample.float().chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    def labels(self, batch_size: int, class_labels: Sequence[int] | Tensor | None) -> Tensor | None:
        """The labels of a batch, (B,) on the device; ConfigError where they do not fit the model."""
        chosen = self.classes_in_turn(range(batch_size)) if class_labels is None else class_labels
        if chosen is None:
            return None
        for label in chosen:
            self.check(class_label=int(label))
        return torch.as_tensor(chosen, device=self.device, dtype=torch.long)

    def check(self, guidance_scale: float = 1.0, steps: int = 1, class_label: int | None = None) -> None:
        """ConfigError where the model can't sample so: ask before the work, not at the first preview."""
        model, num_timesteps = self.unet.config, self.scheduler.config.num_train_timesteps
        if guidance_scale != 1.0 and model.null_label is None:
            raise ConfigError("guidance_scale", guidance_scale, "1 for a model without a null_label")
        if steps > num_timesteps:
            raise ConfigError("steps", steps, f"at most the {num_timesteps} timesteps of training")
        classes = range(model.num_classes or 0)
        if class_label is not None and class_label not in classes:
            known = f"0 to {classes[-1]}" if classes else "null: the model is unconditional"
            raise ConfigError("class_label", class_label, known)

    def classes_in_turn(self, indices: Sequence[int]) -> list[int] | None:
        """Class i mod their number for each index, never the null label; None for an unconditional model."""
        if self.unet.config.num_classes is None:
            return None
        classes = [c for c in range(self.unet.config.num_classes) if c != self.unet.config.null_label]
        return [classes[i % len(classes)] for i in indices]
