"""Train a diffusion model: accelerate launch scripts/train.py --config FILE [--section.field value]."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from threading import Event, Thread
from typing import Any

import run_config
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from exit_codes import leave
from run_folder import RunFolder
from torch.distributed import DistError, PrefixStore, TCPStore
from tqdm import tqdm

from uvit_dia import checkpoint, evaluation, posthoc, trainer
from uvit_dia.checkpoint import aside, writing
from uvit_dia.data import Batches, ImageSet, load_images, test_images
from uvit_dia.errors import ConfigError, UserError
from uvit_dia.pipeline import UViTPipeline
from uvit_dia.random_keys import Stream
from uvit_dia.sampling import generate, grid

DIGITS = Path(__file__).resolve().parents[1] / "configs" / "digits.yaml"
LOST = 4  # exit code where another process of the run ended


def main() -> int:
    parser = run_config.run_parser(__doc__)
    parser.add_argument(
        "--resume", nargs="?", const="newest", help="from the newest good checkpoint, or a path"
    )
    argv = sys.argv[1:]
    named = any(arg.split("=")[0] == "--config" for arg in argv)
    parsed = parser.parse_args(argv if named else ["--config", str(DIGITS), *argv])
    settings = run_config.to_config(parser, parsed)
    folder = RunFolder(settings.output_dir)
    check_free(folder, parsed.resume)
    logs = folder.root / "tensorboard"
    accelerator = run_config.make_accelerator(settings.train.precision, settings.train.trackers, logs)
    with company(accelerator):
        state, batches = prepare(settings, folder, parsed.resume, accelerator)
        code = train(state, batches, settings, folder)
    with writing(folder.root):
        for tracker in accelerator.trackers:
            tracker.finish()
    return code


def prepare(
    settings: run_config.Config, folder: RunFolder, source: str | None, accelerator: Accelerator
) -> tuple[trainer.TrainState, Batches]:
    """Model and data, at the step to go on from; only when all that is well is anything written."""
    wanted = settings.train
    if settings.evaluate.every:
        evaluation.weights_file(settings.evaluate)  # if there are none, that is known before the run begins
    state = trainer.build(wanted, settings.diffusion, settings.model, accelerator)
    model = state.model.config
    with accelerator.local_main_process_first():  # one process a machine downloads
        images = load_images(settings.data, "train", model.sample_size, model.in_channels)
    run_config.check_labels(images.num_labels, model.num_classes, model.null_label)
    batches = Batches(
        images, settings.data, wanted.batch_size, wanted.seed,
        accelerator.device, accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    if wanted.preview_every:
        sample = settings.sample
        previewing = UViTPipeline(state.ema.ema_model, state.scheduler)
        previewing.check(sample.guidance_scale, sample.steps, sample.class_label)
    if accelerator.is_main_process:
        claim(folder.root, patience=10)  # data workers of a killed process end some seconds after it
        check_free(folder, source)  # somebody may have begun meanwhile
    try:
        resume(state, images, folder, source)
    except UserError:
        with suppress(OSError):  # it holds something
            folder.root.rmdir()
        raise
    with writing(folder.root):
        if accelerator.is_main_process:
            run_config.save(settings, folder.config, provenance())
            trim_metrics(folder, state.step)
        named = {"wandb": {"name": folder.root.resolve().name, "config": asdict(settings)}}
        accelerator.init_trackers("uvit_dia", init_kwargs=named)
    return state, batches


def provenance() -> dict[str, str]:
    """Versions, and the commit where the code is a git checkout."""
    describe, code = ["git", "describe", "--always", "--dirty", "--abbrev=40"], Path(trainer.__file__).parent
    with suppress(OSError, subprocess.CalledProcessError):  # there is no git, or it is no checkout
        git = subprocess.run(describe, cwd=code, capture_output=True, text=True, check=True)
        return evaluation.versions() | {"commit": git.stdout.strip()}
    return evaluation.versions()


def check_free(folder: RunFolder, source: str | None) -> None:
    if source is None and folder.config.exists():
        raise UserError(f"output_dir: {folder.root} holds a run; add --resume to go on, or name another")


def claim(root: Path, patience: float = 0) -> int:
    """Lock a folder, made if need be, for this process and those that it passes the returned descriptor.

    UserError where others hold it for longer than `patience` seconds.
    """
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        folder, end = os.open(root, os.O_RDONLY), time.monotonic() + patience
    with suppress(OSError):  # of a file system without locks
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    os.close(folder)
                    raise UserError(
                        f"output_dir: runs of {root} are at work already; wait, or stop them"
                    ) from None
                time.sleep(0.5)
    return folder


def facts_of(images: ImageSet) -> dict[str, Any]:
    """What a checkpoint knows its training images by, without decoding them."""
    return {"images": len(images), "labels sha256": sha256(images.labels.tobytes()).hexdigest()}


def resume(state: trainer.TrainState, images: ImageSet, folder: RunFolder, source: str | None) -> None:
    """Load the checkpoint that the main process found, on every process; without one the run starts at 0."""
    found = [None]
    if state.accelerator.is_main_process:
        with writing(folder.root):
            folder.mend()
        found = [folder.newest_good() if source == "newest" else source and Path(source)]
    if path := broadcast_object_list(found)[0]:
        tensors, info = checkpoint.read(path)
        if (then := info.get("data", facts_of(images))) != facts_of(images):
            now = f"{len(images):,} images now and {then['images']:,} then, or other labels"
            raise UserError(f"{path}: the training data has changed ({now}); put it back, or start a new run")
        state.load(tensors, info)
        newest = next(iter(checkpoint.folders(folder.checkpoints)), path)
        if source != "newest" and newest.name > f"step_{state.step:08d}":
            remedy = "move it away, or name another output_dir"
            raise UserError(f"--resume {path}: {newest} is a later one; {remedy}")
        state.accelerator.print(f"going on from {path}, step {state.step}")


@contextmanager
def company(accelerator: Accelerator) -> Iterator[None]:
    """End this process, saying why, where another one of the run has ended: it would wait for hours."""
    rank, alone = accelerator.process_index, accelerator.num_processes == 1
    over = Event()
    if not alone:
        Thread(target=watch, args=(rank, accelerator.num_processes, over), daemon=True).start()
    try:
        yield
        accelerator.wait_for_everyone()  # the first process to end takes the store along
    except UserError as error:  # settings are everybody's, other things may be known to this process alone
        if not (accelerator.is_local_main_process or isinstance(error, ConfigError)):
            print(f"error: process {rank}: {' '.join(str(error).split())}", file=sys.stderr)
        raise
    except RuntimeError as error:
        if alone or not (isinstance(error, DistError) or "gloo" in str(error)):
            raise
        lost(f"process {rank}: another process ended ({str(error).partition('. ')[0]})")
    finally:
        over.set()


def watch(rank: int, world: int, over: Event, patience: float = 45) -> None:
    """Count up a number of this process in the launcher's store, and end where the next one's stands still.

    A thread, as the main process may be long at a preview or a score while the others wait for it.
    """
    after = (rank + 1) % world
    try:
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*where, wait_for_workers=False, timeout=timedelta(seconds=patience))
        store = PrefixStore(f"company {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        beats, since = 0, time.monotonic()
        while not over.wait(2):
            store.add(f"{rank}", 1)
            if (now := store.add(f"{after}", 0)) != beats:
                beats, since = now, time.monotonic()
            elif time.monotonic() - since > patience:
                store.set("lost", f"process {after} ended, or hangs")
            if store.check(["lost"]):
                reason = store.get("lost").decode()
                over.wait(4)  # with this process the store may go, and the reason has to reach the others
                break
    except DistError:
        reason = "process 0 or the launcher ended"
    if not over.is_set():
        lost(f"process {rank}: {reason}")


def lost(reason: str) -> None:
    """End at once: what else the process would do needs the others, or leads to a long wait."""
    print(f"\nerror: {reason}; go on with --resume", file=sys.stderr, flush=True)
    os._exit(LOST)


def train(state: trainer.TrainState, batches: Batches, settings: run_config.Config, folder: RunFolder) -> int:
    """Run the loop with everything that people want around it; returns the exit code."""
    signals = stop_on_signals(state)
    accelerator, every = state.accelerator, settings.train
    scorer = screening_scorer(state, batches, settings) if settings.evaluate.every else None
    main = accelerator.is_main_process
    pause = 0.5 if sys.stderr.isatty() else 15  # seconds between lines of a log file
    bar = tqdm(total=every.num_steps, initial=state.step, unit="step", disable=not main, mininterval=pause)
    started, seen = time.perf_counter(), state.step
    saved = None  # a run that resumes at its end still exports: what stopped it may have come before that
    with bar:  # closed before an error is printed
        for record in trainer.fit(state, batches):
            bar.update()
            if record.step % every.log_every == 0 or record.step == every.num_steps:
                metrics = trainer.summary(state)
                elapsed = time.perf_counter() - started
                metrics["images_per_second"] = round((record.step - seen) * every.batch_size / elapsed, 1)
                if accelerator.device.type == "cuda":
                    metrics["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                log(state, folder, metrics)
                bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
                started, seen = time.perf_counter(), record.step
            if record.step % every.checkpoint_every == 0:
                save(state, batches.images, folder)
                saved = record.step
            preview_due = record.step == every.num_steps or record.step % (every.preview_every or 1) == 0
            if every.preview_every and preview_due and main:
                preview(state, settings, folder)
            if scorer and record.step % settings.evaluate.every == 0:
                began = time.perf_counter()
                screen(state, scorer, settings, folder)
                started += time.perf_counter() - began  # images_per_second is that of training
    if saved != state.step:
        save(state, batches.images, folder)
    number = torch.tensor(signals[:1] or [0], device=accelerator.device)
    if number := int(accelerator.gather(number).max()):  # all processes end alike, whichever was signalled
        name = signal.Signals(number).name
        accelerator.print(f"stopped by {name} after step {state.step}; go on with --resume")
        return 128 + number
    accelerator.print(f"trained {state.step} steps: {folder.root}")
    return 0


def stop_on_signals(state: trainer.TrainState) -> list[signal.Signals]:
    """Have the loop finish its step, save and stop; a second Ctrl-C exits at once. Returns what came."""
    received: list[signal.Signals] = []

    def handle(number: int, frame: Any) -> None:
        received.append(signal.Signals(number))
        state.stop_requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, handle)
    return received


def log(state: trainer.TrainState, folder: RunFolder, metrics: dict[str, float]) -> None:
    if state.accelerator.is_main_process:
        with writing(folder.metrics), folder.metrics.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
    with writing(folder.root):  # tensorboard's files
        state.accelerator.log(metrics, step=int(metrics["step"]))


def trim_metrics(folder: RunFolder, step: int) -> None:
    """Drop what was logged after `step`, so that going on from there doubles no line."""
    lines = [json.dumps(record) + "\n" for record in folder.read_metrics() if record["step"] <= step]
    with aside(folder.metrics) as partial:
        partial.write_text("".join(lines))


def save(state: trainer.TrainState, images: ImageSet, folder: RunFolder) -> None:
    """A checkpoint, and the averaged weights as a diffusers pipeline; the other processes wait."""
    if state.accelerator.is_main_process:
        keep, widths = state.config.keep_checkpoints, state.config.posthoc_ema
        info = state.info() | {"data": facts_of(images)}
        checkpoint.save(folder.checkpoints, state.step, state.tensors(), info, keep)
        if widths:
            parts = (posthoc.snapshot(state.posthoc), {"posthoc_ema": widths})
            checkpoint.save(folder.posthoc, state.step, *parts, keep=sys.maxsize)
        about = {"step": state.step, "ema_decay": state.config.ema_decay, "training_seed": state.config.seed}
        about["spikes"] = state.spikes.count
        checkpoint.export(UViTPipeline(state.ema.ema_model, state.scheduler), folder.pipeline, about)
    state.accelerator.wait_for_everyone()


def preview(state: trainer.TrainState, settings: run_config.Config, folder: RunFolder) -> None:
    """A grid from the run's fixed preview noise; the other processes wait at the next step."""
    pipeline = UViTPipeline(state.ema.ema_model, state.scheduler)
    images = torch.cat([batch for _, batch in generate(pipeline, settings.sample, Stream.PREVIEWS)])
    with aside(folder.samples / f"step_{state.step:08d}.png") as partial:
        grid(images).save(partial, "PNG")


def screening_scorer(
    state: trainer.TrainState, batches: Batches, settings: run_config.Config
) -> evaluation.Scorer:
    """What scores few images while training, on all processes; the real images are looked at once, here."""
    few = replace(settings.evaluate, num_images=settings.evaluate.screen_images, num_seeds=1)
    size = (state.model.config.sample_size, state.model.config.in_channels)
    return evaluation.Scorer(few, batches.images, test_images(settings.data, *size), state.accelerator)


def screen(
    state: trainer.TrainState, scorer: evaluation.Scorer, settings: run_config.Config, folder: RunFolder
) -> None:
    """A card for evaluation/screening/; its wall time is what training waited."""
    pipeline = UViTPipeline(state.ema.ema_model, state.scheduler)
    about = {"step": state.step, "ema_decay": state.config.ema_decay, "training_seed": state.config.seed}
    card = scorer.score_pipeline(pipeline, settings.sample, about | {"screening": True})
    if card is not None:
        with writing(folder.evaluation):
            evaluation.write_card(card, folder.evaluation / "screening" / f"step_{state.step:08d}.json")
        state.accelerator.log({card["headline"]: card["metrics"][card["headline"]]}, step=state.step)


if __name__ == "__main__":
    leave(main)
