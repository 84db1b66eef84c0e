"""Train a generator from noisy latents to images; leave a pipeline one can ship, and a page.

    accelerate launch examples/imagenet/train.py CONFIG [key=value ...] [--evaluate] [--profile]

CONFIG is a YAML file, such as examples/imagenet/configs/smoke.yaml. The same command continues a
run that was stopped, also with another number of processes: everything random in a step follows
from (seed, step, row). With more steps it continues a run that was finished. ``--evaluate`` judges
the run at its end; ``--profile`` measures a few steps and says where their time goes.

Read from top to bottom: `main`, the loop (`fit`), what is trained and its losses. What a loop
calls, such as checkpoints, the log and the rows of a step, is in ``examples/common/loop.py``.

A run's folder holds ``config.json``, ``encoder/`` (where stage 1 was trained on the spot),
``generator/`` (checkpoints, the log, pictures), ``pipeline/`` (what one ships), ``samples/``,
``metrics.json`` and ``report.html``.
"""

# settings are refused before torch is imported, which takes seconds
import settings

if __name__ == "__main__":
    CONFIG, OPTIONS = settings.from_command_line(__doc__, ("--evaluate", "--profile"))

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import build
import judging
import loop
import report
import ship
import stage_one
import torch
from accelerate import Accelerator
from image_losses import (
    PerceptualTerm,
    add_adversarial,
    add_perceptual,
    adversary_of,
    perceptual_of,
)
from page import keep_config
from pictures import LOOK_EVERY, in_range
from profiling import Profile, span
from reading import depends_on
from settings import ImageNetConfig
from stage import Losses, LossesOf, Stage
from torch import Tensor, nn

from flowspace.training import AdversarialStep, Draws, KeyedPairs, share_of
from flowspace.vision.encoders import LatentEncoder
from flowspace.vision.perceptual import literal_pair

NOISE, TIMES, DROPPED = range(3)
POSTERIOR = 6
"""Streams of the draws of a step."""


def main(config: ImageNetConfig, options: Sequence[str] = ()) -> None:
    """Train what is left to train; leave the pipeline, the samples and the page."""
    accelerator = accelerator_of(config)
    first = accelerator.is_main_process
    loop.check_processes(config.training, accelerator, "examples/imagenet/train.py")
    with loop.locked_by_first(config.out, accelerator):
        profile = None
        if "--profile" in options:
            profile = profile_of(config, accelerator)
        stage = prepared(config, accelerator, "--evaluate" in options)
        fit(stage, accelerator, profile)
        if profile is not None:
            return
        if first:
            ship.pipeline(config)
        accelerator.wait_for_everyone()
        if "--evaluate" in options:
            ship.evaluate(config, accelerator)
        if first:
            path = report.write(config)
            print(f"finished; the page of the run: {path}")
        accelerator.wait_for_everyone()


def accelerator_of(config: ImageNetConfig) -> Accelerator:
    """Return the processes that ``accelerate launch`` or ``torchrun`` started; one otherwise."""
    return loop.accelerator_of(config.training, config.out, config.as_dict())


def profile_of(config: ImageNetConfig, accelerator: Accelerator) -> Profile:
    """Return the profile of a run, which counts what its steps reach of a card's peak."""

    def utilisation(seconds: float, last: int) -> float:
        import flops  # counts networks, which nothing else here needs

        trained = config
        if config.adversarial and config.adversarial.start > last:
            trained = dataclasses.replace(config, adversarial=None)
        images = config.training.batch // accelerator.num_processes
        return flops.utilisation(trained, images, seconds)

    return Profile(config.out, accelerator, utilisation)


# --- the loop, of stage 1 too ------------------------------------------------------------------


def fit(stage: Stage, accelerator: Accelerator, profile: Profile | None = None) -> nn.Module:
    """Train a network in place, or go on with it; return its averaged copy, in eval mode.

    Raises:
        RunError: if too many steps were not finite, or the folder holds a run of other settings.
        SystemExit: with code 0, when SIGTERM came; the step was finished and saved.
    """
    t, adversary = stage.training, stage.adversary
    with loop.training(stage, accelerator, profile) as run:
        for step in run.steps():  # each ends with the rate, the log, a checkpoint, a look
            run.zero_grad()
            for batch, draws in run.parts():  # this process's rows, in t.accumulate parts
                with run.exchanged(run.network):  # gradients, after the last part
                    with accelerator.autocast():
                        cost = stage.losses(run.network, batch, draws)
                    terms = [cost.weights[name] * cost.terms[name].float() for name in cost.terms]
                    loss = torch.stack(terms).sum(0)  # of each row
                    run.measure(cost, loss)
                    with span("backward"):
                        accelerator.backward(loss.mean() / t.accumulate)
                if adversary and adversary.plays(step):
                    made, real = cost.shown()
                    with run.exchanged(adversary.wrapped):
                        with span("adversarial"), accelerator.autocast():
                            answer = adversary.answer(real, made, draws)
                        with span("backward"):
                            accelerator.backward(answer.float().mean() / t.accumulate)
                    run.measure_answer(answer)
            with span("optimiser"):
                run.update()  # clips; what is not finite changes nothing
    return run.averaged()


# --- what is trained ---------------------------------------------------------------------------


def prepared(config: ImageNetConfig, accelerator: Accelerator, judged: bool = False) -> Stage:
    """Return the generator's training; stage 1 is trained first where the config asks for it.

    Everything that can be refused is refused before a step of either is paid for.

    Args:
        config: of the run.
        accelerator: of its processes.
        judged: whether the run will be judged, for which the judge's weights are needed.
    """
    device = accelerator.device
    images = build.images_of(config)
    rows = build.rows_of(config, images)
    optimizer = loop.optimizer_of(config.training)
    network = build.generator_of(config, len(images.names))
    check_early(config, accelerator, judged)
    perceptual = perceptual_of(
        config.perceptual, config.data.size, device, config.generator.compile
    )
    adversary = None
    if config.adversarial:
        adversary = adversary_of(
            config,
            config.adversarial,
            build.schedule_of(config),
            accelerator,
            config.generator.compile,
        )
    if accelerator.is_main_process:
        print(images.report())
    train_stage_one = functools.partial(fit, accelerator=accelerator)
    encoder = stage_one.encoder_of(config, images, accelerator, train_stage_one)
    pixels, _ = images.row(0)
    one = in_range(pixels[None].to(device))
    _, *shape = encoder.encode(one).shape
    stage_one.check_fit(config, tuple(shape))
    build.check_latents(rows, images, encoder)
    if config.generator.compile:
        encoder.compile_network()
    return Stage(
        "generator",
        network,
        generator_losses(config, encoder, perceptual, adversary, len(images.names)),
        rows,
        config.training,
        config.out / "generator",
        optimizer,
        depends=depends_on(
            config, "data", "encoder", "generator", "objective", "perceptual", "adversarial"
        ),
        flip=config.data.flip,
        workers=config.data.workers,
        adversary=adversary,
        look=report.look_of(config, images, encoder, device),
        begun=functools.partial(keep_config, config.out, config.as_dict()),
        compiled=config.generator.compile,
        offset=steps_before(config, len(images)),
    )


def check_early(config: ImageNetConfig, accelerator: Accelerator, judged: bool) -> None:
    """See what can be seen before stage 1: the batch, the objective, latents, the judge's weights.

    Raises:
        RunError: if the batch cannot be shared out, or weights are missing.
        InputError: if the objective cannot be built, or the latents that stage 1 will make do not
            fit.
    """
    t = config.training
    build.objective_of(config)
    share_of(t.batch, accelerator.process_index, accelerator.num_processes, t.accumulate)
    if config.encoder.stage_one:
        stage_one.check_fit(config, stage_one.shape_of(config))
    if judged:
        judging.ready_judges(config, accelerator.device)
    elif config.evaluation.extractor != "inception":  # it scores every look
        judging.extractor_of(config, accelerator.device)


def steps_before(config: ImageNetConfig, count: int) -> int:
    """Return how many steps stage 1 takes on so many pictures."""
    stage = config.encoder.stage_one
    if stage is None or stage.linear:
        return 0
    return loop.steps_of(stage_one.training_of(config), count)


def generator_losses(
    config: ImageNetConfig,
    encoder: LatentEncoder,
    perceptual: Mapping[str, PerceptualTerm],
    adversary: AdversarialStep | None,
    null: int,
) -> LossesOf:
    """Return the losses of a generator: the flow, perceptual distances, the discriminator.

    Args:
        config: of the run.
        encoder: frozen; not called where the batch brings latents.
        perceptual: by name.
        adversary: None where there is none.
        null: the label of no class, which stands in for dropped labels.
    """
    estimate = None
    if config.objective.estimated:
        estimate = encoder.encode_prediction
    objective = build.objective_of(config, estimate)
    pairs = KeyedPairs(objective.times, TIMES)
    objective = dataclasses.replace(objective, times=pairs)
    drop = config.objective.drop_labels
    across = config.generator.space == "image"

    def losses(network: nn.Module, batch: Sequence[Tensor], draws: Draws) -> Losses:
        *latents, pixels, labels = batch
        images = in_range(pixels)
        with span("encoder"):
            if latents:
                z = latents[0].float()
            else:
                look = draws.step % LOOK_EVERY == 0
                z = encoder.encode(images, draws.generators(POSTERIOR), check=look)
        noise = draws.normal(z.shape[1:], NOISE)
        if drop:
            dropped = draws.uniform((), DROPPED) < drop
            labels = torch.where(dropped, null, labels)
        pairs.draws = draws
        cond = {"labels": labels}
        targets = None
        if across:
            targets = images
        with span("flow"):
            out = objective(network, z, targets, cond=cond, noise=noise)
        cost = Losses.of_flow(out, out.prediction)
        cost.real = images
        literal = functools.partial(literal_pair, objective, out, images)
        add_perceptual(cost, perceptual, (out.prediction, out.target), out.t, literal)
        add_adversarial(cost, adversary, config.adversarial, draws, out.t)
        return cost

    return losses


if __name__ == "__main__":
    settings.run_program(functools.partial(main, CONFIG, OPTIONS))
