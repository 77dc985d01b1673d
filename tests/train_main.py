"""Tests of main, of the pictures and checkpoints that it saves, and of mnist.py and utils.py.

This file needs unittests.py and train_step.py: copy both files of tests/ to a folder tests/ next to unittests.py and
your models.py, train.py, mnist.py and utils.py.
"""

import contextlib
import functools
import hashlib
import importlib
import inspect
import re
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.train_step import TrainGroup

__unittest = True

EPOCHS, SECONDS = 11, 20  # some save weights every 10 epochs; a slow run ends with an epoch
FLAGS = {"z_dim": 3, "batch_size": 16, "lambda_": 0.9, "ae_lr": 1e-4, "d_lr": 2e-4, "epochs": EPOCHS, "seed": 1,
         "num_workers": 0, "data_dir": "data/", "log_dir": "logs/", "no_cuda": True}
OTHER = {"seed": 2, "batch_size": 8, "ae_lr": 3e-4, "d_lr": 1e-3, "data_dir": "data2/"}  # of a second run
PICTURES = ("generate_and_save", "save_reconstruction")
MODAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)  # layers that depend on the mode
LEVELS = torch.linspace(-0.75, 0.75, 7)  # of the ramp in every picture


def pattern_images(numbers):
    """Return images that differ from each other: blocks of black and white, above a ramp of gray LEVELS."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(64, 1, 5, 7, generator=generator)[numbers].round() * 2 - 1
    ramp = LEVELS.view(1, 1, 1, 7).expand(len(blocks), 1, 2, 7)
    return nn.functional.interpolate(torch.cat([blocks, ramp], 2), scale_factor=4)


INPUTS, OUTPUTS = pattern_images(slice(24)), pattern_images(slice(24, 48))  # training images; what decoders return


def shown(picture):
    """Return [(y, x, number of the image, gray levels of its ramp)] of a picture [H, W] in [0, 255].

    Images are found enlarged up to four times, and also with black and white exchanged.
    """
    patterns = torch.cat([INPUTS, OUTPUTS])[:, :, :20]
    kernels = patterns / patterns.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    kernels = kernels - kernels.mean((1, 2, 3), keepdim=True)
    kernels = kernels / kernels.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    for zoom in (1, 2, 3, 4):
        pixels = torch.from_numpy(picture[::zoom, ::zoom].copy()).float()[None, None]
        if min(pixels.shape[2:]) < 28:
            break
        ones = torch.ones(1, 1, 20, 28)
        mean, square = (nn.functional.conv2d(part, ones) / 560 for part in (pixels, pixels.square()))
        deviation = (square - mean.square()).clamp(min=1).sqrt() * 560 ** 0.5
        found = (nn.functional.conv2d(pixels, kernels) / deviation)[0, :, :pixels.shape[2] - 27].abs() > 0.97
        if found.any():
            return [(int(y), int(x), int(k), pixels[0, 0, y + 24, x + 1:x + 28:4].round().int().tolist())
                    for k, y, x in found.nonzero()]
    return []


# One run of main -----------------------------------------------------------------------------------------------------

class Run:
    """What main does on 24 images until it ends, or calls train_aae more than `limit` times."""

    def __init__(self, train, limit, flags):
        self.train, self.limit, self.end = train, limit, time.monotonic() + SECONDS
        self.train_aae, self.generate_and_save, self.save_reconstruction = [], [], []  # what their calls have shown
        self.order, self.inner = [], None  # the functions in the order of their calls; the call in progress
        self.loaders, self.checkpoints, self.prefixes = [], {}, {}  # arguments of mnist(); contents; of the loggers
        self.error, self.missing_flag = None, ""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, contextlib.ExitStack() as stack:
            stack.callback(nn.modules.module._global_forward_hooks_with_kwargs.clear)  # torch leaves them there
            stack.enter_context(contextlib.chdir(folder))
            for name in ("data", "data2"):
                write_mnist(name, train=INPUTS, t10k=OUTPUTS)  # for whoever reads the files
            self.replace_functions(stack)
            torch.manual_seed(limit)  # another one for each run
            try:
                train.main(Namespace(**{**FLAGS, **flags}))
            except (GeneratorExit, Exception, SystemExit) as error:
                self.error, self.missing_flag = error, missing_flag(error)
            if self.train_aae:
                self.look_at_files()
                self.look_at_loggers()

    def replace_functions(self, stack):
        """Observe functions wherever they have been imported."""
        from mnist import mnist
        stand_ins = {id(mnist): self.loader}
        for name in ("train_aae", *PICTURES):
            if (function := getattr(self.train, name, None)) is not None:
                stand_ins[id(function)] = functools.wraps(function)(functools.partial(self.observe, name, function))
        for module in list(sys.modules.values()):
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if id(value) in stand_ins:
                    stack.enter_context(mock.patch.object(module, name, stand_ins[id(value)]))

    def loader(self, root="../data", batch_size=64, *_, **__):
        self.loaders.append({"data_dir": str(root), "batch_size": batch_size})
        return DataLoader(TensorDataset(INPUTS, torch.arange(len(INPUTS)) % 10), batch_size, shuffle=True)

    def observe(self, name, function, *args, **kwargs):
        """Call a function of train.py and note what it does."""
        training, given = name == "train_aae", arguments(function, args, kwargs)
        model = getattr(given[training], "_orig_mod", given[training])  # the original of a compiled one
        if not hasattr(type(model), "get_loss_autoencoder"):
            return function(*args, **kwargs)
        if training and (len(self.train_aae) >= self.limit or time.monotonic() > self.end):
            raise GeneratorExit  # which `except Exception` does not catch
        call = Namespace(given=given, model=model, outer=self.inner, codes=[], modes=[], lambdas=[], last=None, shift=0,
                         pictures={}, files=files(), random=torch.get_rng_state(), start=weights(model),
                         optimizers=[optimizer_facts(optimizer) for optimizer in given[5:7]],
                         steps=[getattr(logger, "global_step", None) for logger in given[3:5]], trained=weights(model),
                         drew=False, optimizers_after=[], steps_after=[])
        call.made_before = getattr(self.inner, "last", None)  # what the decoder has returned in training
        self.order.append(name)
        getattr(self, name).extend([call] if training else [])
        loss = model.get_loss_autoencoder
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "inner", self.inner)
            self.inner = call
            hook = nn.modules.module.register_module_forward_hook(functools.partial(self.note_mode, call, training))
            stack.callback(hook.remove)
            for owner, attribute, replacement in (
                    (model, "get_loss_autoencoder", lambda *args, **kwargs: call.lambdas.append(
                        arguments(loss, args, kwargs)[3] or 0) or loss(*args, **kwargs)),
                    (model.encoder, "forward", functools.partial(self.encode, call, training, model.encoder.forward)),
                    (model.decoder, "forward", functools.partial(self.decode, call, training, model.decoder.forward))):
                stack.enter_context(mock.patch.object(owner, attribute, replacement))
            result = function(*args, **kwargs)
        call.trained, call.drew = weights(model), not torch.equal(call.random, torch.get_rng_state())
        call.optimizers_after = [optimizer_facts(optimizer) for optimizer in given[5:7]]
        call.steps_after = [getattr(logger, "global_step", None) for logger in given[3:5]]
        call.pictures = {path: read_png(path) for path, _ in files() - call.files if path.suffix == ".png"}
        getattr(self, name).extend([call] if call.pictures and not training else [])
        return result

    def note_mode(self, call, training, module, args, output):
        modal = isinstance(module, MODAL) and (getattr(module, "p", 0) or getattr(module, "track_running_stats", 0))
        if modal and call is self.inner and (not training or torch.is_grad_enabled()):
            call.modes.append(module.training)

    def encode(self, call, training, forward, *args, **kwargs):
        """Encode; for pictures, the codes of training image k are 10 (k + 1)."""
        codes, images = forward(*args, **kwargs), (*args, *kwargs.values())[0]
        if training or call is not self.inner:
            return codes
        distances = torch.cdist(images.detach().float().cpu().flatten(1), INPUTS.flatten(1))
        known = distances.min(1)
        numbers = 10.0 * (known.indices + 1).to(codes)[:, None].expand_as(codes)
        return codes + (numbers - codes).detach() * (known.values < 1)[:, None].to(codes)

    def decode(self, call, training, forward, *args, **kwargs):
        """Decode; for pictures, codes of training image k give output k, and other codes the outputs in turn."""
        images, z = forward(*args, **kwargs), (*args, *kwargs.values())[0].detach()
        if training or call is not self.inner or images.numel() != 784 * len(images):
            call.last, call.codes = images.detach(), [z]
            return images
        call.codes.append(z.cpu())
        number = (z.flatten(1).mean(1) / 10).round()
        known = (number >= 1) & ((z.flatten(1) / 10 - number[:, None]).abs() < 0.4).all(1)
        turn = (call.shift + torch.arange(len(z))) % len(OUTPUTS)
        call.shift += int((~known).sum())
        shown = OUTPUTS[torch.where(known.cpu(), (number.long().cpu() - 1).clamp(0, len(OUTPUTS) - 1), turn)]
        return images * 0 + shown.to(images).view_as(images)

    def look_at_files(self):
        """Load files as torch.save writes them, and note whether anything is in --log_dir."""
        new = {path for path, _ in files() - self.train_aae[0].files}
        self.written_elsewhere = not [*Path(FLAGS["log_dir"]).rglob("*.*")] and bool(new)
        for path in new:
            if path.read_bytes()[:2] == b"PK":
                self.checkpoints[path.name] = None
                with contextlib.suppress(Exception):
                    self.checkpoints[path.name] = torch.load(path, map_location="cpu", weights_only=True)

    def look_at_loggers(self):
        """Note by which tags the two loggers of the last call log."""
        for player, logger in zip(("ae", "disc"), self.train_aae[-1].given[3:5], strict=True):
            tags = []
            with contextlib.suppress(Exception), mock.patch("torch.utils.tensorboard.SummaryWriter.add_scalar",
                                                            lambda writer, tag, *_, **__: tags.append(tag)):
                for _ in range(200):
                    logger.add_values({"probe": torch.tensor(1.0)})
            self.prefixes[player] = tags[-1].rpartition("/")[0] if tags else None


def write_mnist(root, **images):
    """Write images [N, 1, 28, 28] in [-1, 1] to the files in which torchvision looks for MNIST."""
    raw = Path(root, "MNIST", "raw")
    raw.mkdir(parents=True)
    for kind, pixels in images.items():
        pixels = ((pixels + 1) * 127.5).round().to(torch.uint8)
        for name, sizes, content in ((f"{kind}-images-idx3-ubyte", pixels.squeeze(1).shape, pixels.numpy()),
                                     (f"{kind}-labels-idx1-ubyte", pixels.shape[:1], np.arange(len(pixels)) % 10)):
            header = [2048 + len(sizes), *sizes]
            (raw / name).write_bytes(np.array(header, ">i4").tobytes() + content.astype(np.uint8).tobytes())
    return raw


def read_png(file):
    """Return a picture's red channel, [H, W]."""
    return np.asarray(Image.open(file).convert("RGB"))[:, :, 0]


def files():
    """Return the files below the current folder, and when they were written."""
    return {(path.absolute(), path.stat().st_mtime_ns) for path in Path().rglob("*") if path.is_file()}


def arguments(function, args, kwargs):
    """Return what a call gives for the first eight parameters of a function."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return [*bound.arguments.values(), *[None] * 8][:8]


def weights(model):
    """Return the weights of a model as one vector. Lazy layers have none before their first forward pass."""
    return torch.cat([torch.zeros(0), *(w.data.flatten() for w in model.parameters() if not nn.parameter.is_lazy(w))])


def optimizer_facts(optimizer):
    groups = getattr(optimizer, "param_groups", [])
    return Namespace(held={id(weight) for group in groups for weight in group["params"]},
                     rates={float(group["lr"]) for group in groups}, state=bool(getattr(optimizer, "state", None)),
                     maximize=any(group.get("maximize") for group in groups))


def missing_flag(error):
    """Return the flag whose absence has made the error that is handled, if the assignment does not have it."""
    place, name = inspect.trace()[-1], re.findall(r"'(\w+)'", str(error))[-1:]
    unpacked = isinstance(error, TypeError) and "**" in str(place.code_context)
    owners = place.frame.f_locals.values() if unpacked or isinstance(error, KeyError) else [getattr(error, "obj", None)]
    flags = [owner if isinstance(owner, dict) else getattr(owner, "__dict__", {}) for owner in owners]
    return "".join(name if any(FLAGS.keys() <= owner.keys() for owner in flags) else ())


@functools.lru_cache(1)
def watch(train):
    """Return a long run of main, a short one by the same flags, and a short one by others."""
    return Run(train, EPOCHS + 1, {}), Run(train, 2, {"epochs": 1}), Run(train, 2, {"epochs": 1, **OTHER})


# What is found -------------------------------------------------------------------------------------------------------

class TrainMain(TrainGroup):
    """main, its pictures and its checkpoints, numbered as in the documentation."""

    def runs(self, what, enough="train_aae"):
        """Return the three runs; skip the test if they have not shown what it needs."""
        def call(train):
            runs = watch(train)
            if runs[0].error and not runs[0].train_aae and not runs[0].missing_flag:
                raise runs[0].error
            return runs

        self.working_model()  # or skip
        run, *_ = runs = self.attempt(what, call)
        if run.missing_flag:
            self.skipTest(f"{what}: main reads the flag {run.missing_flag}, which the assignment does not have: compute "
                          f'it in main, or read it with a default, getattr(args, "{run.missing_flag}", None)')
        if run.error and not isinstance(run.error, GeneratorExit) and not getattr(run, enough):
            self.attempt(what, lambda train: (_ for _ in ()).throw(run.error))
        if not getattr(run, enough):
            self.skipTest(f"{what}: in {EPOCHS} epochs of two batches, main makes no {enough}")
        return runs

    def test_optimizers(self):
        long, _, other = self.runs("main")
        first, second = long.train_aae[0], other.train_aae[:1]
        done = [call for call in long.train_aae if call.optimizers_after]  # and not ended by an error
        parts = [{id(weight) for name in names for weight in getattr(first.model, name).parameters()}
                 for names in (("encoder", "decoder"), ("discriminator",))]
        for i, (player, names) in enumerate((("autoencoder", "encoder and decoder"), ("discriminator", "the discriminator"))):
            facts = first.optimizers[i]
            self.check(not facts.held or parts[i] <= facts.held and not parts[1 - i] & facts.held, f"Mistake 2: the "
                       f"{player}'s optimizer must have the parameters of {names}, and no others")
            self.check(not facts.maximize, f"Mistake 30: the {player}'s optimizer maximizes its loss: remove maximize")
            self.check(not made_anew([(call.optimizers[i].state, call.optimizers_after[i].state)
                                      for call in done]),
                       "Mistake 33: the optimizers are made anew for each epoch and forget their moments: make them "
                       "once, before the loop over epochs")
        factors = [ratio(*(call.optimizers[i].rates for call in (first, *second))) for i in (0, 1)]
        by_flag = {round(OTHER[name] / FLAGS[name], 3): name for name in ("ae_lr", "d_lr")} | {1.0: None}
        follows = [by_flag.get(factor, "unknown") for factor in factors]
        self.check(follows != ["d_lr", "ae_lr"], "Mistake 24: main exchanges --ae_lr and --d_lr")
        for flag, other_flag, followed in (("ae_lr", "d_lr", follows[0]), ("d_lr", "ae_lr", follows[1])):
            self.check(followed not in (None, other_flag), f"Mistake 24: main ignores --{flag}"
                       f"{f', and uses --{other_flag} in its place' if followed else ''}")

    def test_24_main_heeds_its_flags(self):
        long, short, other = self.runs("main")
        first, count = long.train_aae[0], len(long.train_aae)
        dimensions = {codes.shape[1:].numel() for call in long.train_aae for codes in call.codes}
        self.check(dimensions in (set(), {3}), f"Mistake 24: main trains codes of {dimensions} dimensions, with "
                                               "--z_dim 3")
        self.check(count <= EPOCHS and (count not in (1, EPOCHS - 1) or long.error) and len(short.train_aae) <= 1,
                   f"Mistake 24: main trains {count} epochs, with --epochs {EPOCHS}")
        lambdas = {round(float(value), 6) for call in long.train_aae for value in call.lambdas or [call.given[7] or 0]}
        self.check(len(lambdas) != 1 or 0.9 in {*lambdas, first.given[7]}, "Mistake 18: with --lambda_ 0.9, the loss "
                   f"receives {[*lambdas][0]}: call train_aae(..., args.lambda_)")
        again, different = (run.train_aae and first.start.equal(run.train_aae[0].start) for run in (short, other))
        seeded = all(map(torch.equal, self.model().parameters(), self.model().parameters()))  # by the model itself
        self.check(again is not False, "Mistake 24: main begins with other weights when it runs again with the same "
                   "--seed: call torch.manual_seed(args.seed) before the model is made")
        self.check(not different or seeded or not len(first.start),
                   "Mistake 24: main begins with the same weights for --seed 1 and 2: call torch.manual_seed(args.seed)")
        for flag in ("batch_size", "data_dir"):
            values = [{loader[flag] for loader in run.loaders} for run in (long, other)]
            self.check(not all(values) or values[0] != values[1],
                       f"Mistake 24: main ignores --{flag}: call mnist(args.data_dir, args.batch_size, args.num_workers)")
        self.check(not long.written_elsewhere, "Mistake 24: main ignores --log_dir: make the run's folder in it")

    def test_29_loggers_are_those_of_the_players(self):
        run = self.runs("main")[0]
        ae, disc = (str(run.prefixes.get(player)) for player in ("ae", "disc"))
        self.check(not ("disc" in ae and "disc" not in disc), f"Mistake 29: main exchanges the loggers: logger_ae logs "
                   f"under {ae}/, logger_disc under {disc}/")
        for i in (0, 1):
            self.check(not made_anew([(call.steps[i], call.steps_after[i]) for call in run.train_aae
                                        if call.steps_after]), "Mistake 14: "
                       "the steps of each epoch begin at 0, so its points are drawn over the others': make the loggers "
                       "once, before the loop over epochs")

    def test_21_training_mode_returns_after_pictures(self):
        for call in self.runs("main")[0].train_aae:
            self.check(call.modes.count(False) <= 0.4 * len(call.modes), "Mistake 21: BatchNorm or Dropout is trained "
                       "in evaluation mode, in which pictures have left it: begin train_aae with model.train(), and "
                       "call it after pictures in the loop")

    def test_27_random_numbers_do_not_repeat(self):
        states = [bytes(call.random.numpy()) for call in self.runs("main")[0].train_aae if call.drew]
        self.check(len({*states}) == len(states), "Mistake 27: epochs begin with the same random state, so their prior "
                   "samples and the order of images repeat: call torch.manual_seed once, at the beginning of main, and "
                   "draw what pictures show with a torch.Generator")

    def test_25_saved_weights_are_the_models(self):
        run = self.runs("the checkpoint", "checkpoints")[0]
        names = ["model_checkpoint.pt"] if "model_checkpoint.pt" in run.checkpoints else sorted(run.checkpoints)
        words, saved = f"Mistake 25: {', '.join(names)}", [run.checkpoints[name] for name in names]
        self.check(any(state is not None for state in saved), f"{words} cannot be read with torch.load(..., "
                   "weights_only=True): save model.state_dict(), and no other objects")
        saved += [inner for state in saved if isinstance(state, dict) for inner in state.values()]  # under a key
        states = [{str(name).removeprefix("module."): weight for name, weight in state.items()}
                  for state in saved if isinstance(state, dict)]
        wanted = [name for name, _ in run.train_aae[0].model.named_parameters()]
        whole = [torch.cat([state[name].flatten() for name in wanted]) for state in states if {*wanted} <= state.keys()]
        self.check(whole or len(names) > 1, f"{words} lacks names of model.state_dict(): save that")
        start, trained = run.train_aae[0].start, [call.trained for call in run.train_aae]
        bound = 2 * max((vector - trained[0]).norm() for vector in trained) + 0.01 * trained[0].norm()  # of averages
        self.check(not whole or start.equal(trained[-1]) or any(
            vector.shape == trained[0].shape and (vector - trained[0]).norm() < bound and not vector.equal(start)
            for vector in whole), f"{words} has weights that are not those that train_aae has trained")


class Pictures(TrainMain):
    """generate_and_save and save_reconstruction: what they show of a decoder that returns known images."""

    def last(self, name):
        """Return the last call that has saved pictures, and what each of them shows."""
        call = getattr(self.runs(f"the pictures of {name}", name)[0], name)[-1]
        return call, {path: shown(picture) for path, picture in call.pictures.items()}

    def test_05_samples_decode_samples_of_the_prior(self):
        codes = torch.cat([z.flatten(1) for call in self.runs("the pictures", "generate_and_save")[0].generate_and_save
                           for z in call.codes]).double()
        self.check(is_normal(codes), "Mistake 5: generate_and_save shows images of codes that are not samples of N(0, "
                   f"I) (mean {codes.mean():.3f}, standard deviation {codes.std():.3f}): call model.sample(batch_size)")

    def test_11_samples_are_drawn_in_evaluation_mode(self):
        for call in self.runs("the pictures", "generate_and_save")[0].generate_and_save:
            self.check(True not in call.modes, "Mistake 11: samples are drawn in training mode, in which BatchNorm "
                       "mixes a batch's images and updates its statistics: call model.eval() before, train() afterwards")

    def test_13_gray_levels(self):
        for name in PICTURES:
            ramps = [sorted(ramp) for picture in self.last(name)[1].values() for *_, ramp in picture]
            right = ((LEVELS + 1) * 127.5).round().int().tolist()
            wrong = [ramp for ramp in ramps if ramp[-1] - ramp[0] < 150 or len({*ramp}) < 7]
            bright = wrong and wrong[0][0] > 100
            clipped = name == "generate_and_save"  # in save_reconstruction, this was handed out
            self.check(len(wrong) < len(ramps) or not ramps or not (bright or clipped), f"Mistake 13: {name} saves the "
                       f"gray levels {right} as {wrong and wrong[0]}: " + (
                           "rescale images only once; sample() must return them in [-1, 1]" if bright else
                           "rescale images from [-1, 1] before saving, or the dark half is clipped"))

    def test_26_pictures_of_every_epoch(self):
        run = self.runs("the pictures", "generate_and_save")[0]
        for name in PICTURES:
            paths = set().union(*(call.pictures for call in getattr(run, name)))
            self.check(len(getattr(run, name)) < 2 or len(paths) > 1, f"Mistake 26: {name} saves the pictures of all "
                       f"epochs as one file, {min(paths, default=Path()).name}: put the epoch into its name")
            trained = run.order[run.order.index("train_aae"):]
            self.check(name not in run.order or name in trained or run.error, f"Mistake 26: main calls {name} before "
                       "training only: call it after epochs, too")

    def test_26_samples_are_what_the_decoder_makes(self):
        _, pictures = self.last("generate_and_save")
        kinds = {k < len(INPUTS) for picture in pictures.values() for _, _, k, _ in picture}
        self.check(kinds != {True}, "Mistake 26: generate_and_save shows training images: show model.sample(batch_size)")

    def test_26_inputs_over_reconstructions(self):
        call, pictures = self.last("save_reconstruction")
        advice = "show a row of inputs over a row of their reconstructions"
        data, made = call.given[3], call.made_before
        self.check(made is None or data.shape[1:] != made.shape[1:] or not any(
            torch.equal(image, other) for image in data[:1].detach() for other in made[:1]),
            "Mistake 26: save_reconstruction is given reconstructions: give it the batch x")
        for found in pictures.values():
            inputs, outputs = ([place for place in found if (place[2] < len(INPUTS)) == kind] for kind in (True, False))
            numbers = [k for _, _, k, _ in found]
            others = [k for picture in pictures.values() for _, _, k, _ in picture if (k < len(INPUTS)) != bool(inputs)]
            self.check(others or len({*numbers}) == len(numbers), "Mistake 26: save_reconstruction shows "
                       f"{'inputs' if inputs else 'reconstructions'} twice: {advice}")
            self.check(not inputs or not outputs or min(inputs)[0] <= max(outputs)[0], "Mistake 26: save_reconstruction "
                       f"shows inputs under reconstructions: {advice}")
            first_row = "".join("i" if k < len(INPUTS) else "r" for y, _, k, _ in sorted(found) if y < min(found)[0] + 9)
            self.check("iri" not in first_row, "Mistake 26: save_reconstruction shows inputs and reconstructions in "
                                               f"turn: {advice}")
            below = [(k, [other - len(INPUTS) for v, u, other, _ in outputs if abs(u - x) < 9 and v > y])
                     for y, x, k, _ in inputs]
            wrong = [k for k, under in below if under and k not in under]
            self.check(len(wrong) < 2 or call.shift, "Mistake 26: save_reconstruction shows reconstructions of other "
                                                     f"images than those above them: {advice}")


def made_anew(states):
    """Whether what each epoch has left is gone when the next one begins; `states` are pairs (before, after)."""
    pairs = list(zip(states, states[1:], strict=False))
    return bool(pairs) and all(after and not before for (_, after), (before, _) in pairs)


def ratio(rates, others=()):
    """Return the factor between two sets of one learning rate each; None if there are others."""
    if len(rates) == 1 == len(others) and (rate := [*rates][0]):
        return round([*others][0] / rate, 3)
    return None


def is_normal(codes):
    """Whether numbers may be samples of N(0, 1), by a bound that is missed less than once in 1e9 times."""
    values = codes.flatten().unique()
    distances = torch.special.ndtr(values) - torch.arange(len(values)) / len(values)  # Kolmogorov-Smirnov
    return len(values) < 50 or bool(distances.abs().max() < 3.3 / len(values) ** 0.5 + 1 / len(values))


# mnist.py and utils.py -----------------------------------------------------------------------------------------------

class DataAndLogger(TrainGroup):
    """mnist() on files with 130 made-up images, and TensorBoardLogger with three windows of five values."""

    def test_37_mnist(self):
        images = {"train": torch.rand(130, 1, 28, 28) * 2 - 1, "t10k": torch.rand(130, 1, 28, 28) * 2 - 1}
        images = {kind: ((pixels + 1) * 127.5).round() / 127.5 - 1 for kind, pixels in images.items()}

        def call(_):
            module = importlib.import_module("mnist")
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
                raw = write_mnist(root, **images)
                sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in raw.iterdir()}
                with mock.patch.dict(getattr(module, "MNIST_MD5", {}), sums):
                    loader = module.mnist(root=root, batch_size=16, num_workers=0)
                    return [torch.cat([x for x, _ in loader]).float() for _ in range(2)]

        first, second = self.attempt("mnist.py", call)
        low, high = float(first.min()), float(first.max())
        self.check(first.shape[1:] == (1, 28, 28) and abs(low + 1) < 0.02 and abs(high - 1) < 0.02, f"Mistake 37: "
                   f"mnist() returns images {tuple(first.shape[1:])} from {low:.2f} to {high:.2f}: they must be (1, 28, "
                   "28), from -1 to 1, as Normalize((0.5,), (0.5,)) makes them")
        nearest = {kind: torch.cdist(first.flatten(1), pixels.flatten(1)).min(1) for kind, pixels in images.items()}
        self.check(nearest["t10k"].values.mean() > 1, "Mistake 37: mnist() returns the test set: use train=True")
        self.check(len(first) == 130, f"Mistake 37: mnist() returns {len(first)} of 130 images with a batch size of 16: "
                                      "keep the last batch, with drop_last=False")
        self.check(not torch.equal(first, second), "Mistake 37: mnist() returns all epochs in the same order: use "
                                                   "shuffle=True")

    def test_38_logger(self):
        def call(_):
            module = importlib.import_module("utils")
            writer, points = mock.MagicMock(), []
            writer.add_scalar = lambda tag, value, global_step=None, *_, **__: points.append(
                (tag, float(value), global_step))
            logger = module.TensorBoardLogger(writer, avg_window=5, name="generator")
            for i in range(15):
                logger.add_values({"one": torch.tensor(float(i)), "other": torch.tensor(2.0 * i)})
            return points, logger.global_step

        points, count = self.attempt("utils.py", call)
        one = [(value, step) for tag, value, step in points if tag == "generator/one"]
        self.check(len(one) in (2, 3), f"Mistake 38: TensorBoardLogger(writer, 5, 'generator') writes {len(one)} points "
                                       "of generator/one for 15 values: it must write the mean of each five")
        self.check(count == 15, f"Mistake 38: after 15 calls of add_values, the logger's global_step is {count}: count "
                                "calls, not values")
        self.check(abs(one[1][0] - 7) < 1.1, f"Mistake 38: of the values 0, 1, 2 ..., the logger writes {one[1][0]:g} as "
                   "mean of the second five, which is 7: empty the window after it is written")
        self.check(len({step for _, step in one}) == len(one), f"Mistake 38: the logger writes points at steps "
                                                               f"{[step for _, step in one]}: each needs its own")
