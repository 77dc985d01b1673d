"""Mistakes in train.py outside train_aae: in main, and in drawing samples and saving pictures.

This file needs only unittests.py. Copy it to a folder tests/ next to unittests.py and your models.py, train.py,
mnist.py and utils.py:  python unittests.py TrainMistakes
"""

import contextlib
import functools
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

from unittests import MistakesGroup

__unittest = True

EPOCHS, SECONDS = 11, 20  # some save weights every 10 epochs; a slow run ends with an epoch
FLAGS = {"z_dim": 3, "batch_size": 16, "lambda_": 0.9, "ae_lr": 1e-4, "d_lr": 2e-4, "epochs": EPOCHS, "seed": 1,
         "num_workers": 0, "data_dir": "", "log_dir": "", "no_cuda": True}
WATCHED = ("train_aae", "generate_and_save", "save_reconstruction")
MODAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)  # layers that depend on the mode
INPUTS, OUTPUTS = np.arange(10, 250, 10), np.array([13, 53, 83, 107, 143, 177, 203, 237])  # gray levels of images


def read_png(file, channels=0):
    """Return a picture's red channel, [H, W], or those that a slice names, [H, W, C]."""
    return np.asarray(Image.open(file).convert("RGB"))[:, :, channels].astype(int)


def gray_images(levels):
    """Return images of these gray levels with a black and a white edge, [N, 1, 28, 28] in [-1, 1]."""
    images = torch.as_tensor(levels / 127.5 - 1).float().view(-1, 1, 1, 1).expand(-1, 1, 24, 28)
    return nn.functional.pad(nn.functional.pad(images, (0, 0, 2, 0), value=-1), (0, 0, 0, 2), value=1)


def areas(picture, levels):
    """Return the place and extent (y, x, height, width) of each gray level that fills areas of a picture [H, W, 3]."""
    red = picture[:-3, :-3, 0]
    flat = (red == picture[3:, :-3, 0]) & (red == picture[:-3, 3:, 0])
    found = [np.argwhere(flat & (abs(red - level) < 2)) for level in levels]
    return [(*area.min(0), *np.ptp(area, 0)) for area in found if len(area) > 200]


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


def missing_flag(error):
    """Return the flag whose absence has made the error that is handled, if the assignment does not have it."""
    place, name = inspect.trace()[-1], re.findall(r"'(\w+)'", str(error))[-1:]
    unpacked = isinstance(error, TypeError) and "**" in str(place.code_context)
    owners = place.frame.f_locals.values() if unpacked or isinstance(error, KeyError) else [getattr(error, "obj", None)]
    flags = [owner if isinstance(owner, dict) else getattr(owner, "__dict__", {}) for owner in owners]
    return "".join(name if any(FLAGS.keys() <= owner.keys() for owner in flags) else ())


@functools.lru_cache(3)
def watch(train, limit, **flags):
    """Run main on made-up images until it ends or calls train_aae more than `limit` times; return what is seen."""
    def observe(name, function, *args, **kwargs):
        def hook(module, args, kwargs, output):
            modal = isinstance(module, MODAL) and (getattr(module, "p", 0) or getattr(module, "track_running_stats", 0))
            if modal and (not training or torch.is_grad_enabled()):
                call.modes.setdefault(module, set()).add(module.training)
            if type(module) is type(model.decoder) and output.numel() == 784 * len(output):  # a copy is as good
                call.codes.add((*args, *kwargs.values())[0].shape[1:].numel())
                call.levels = np.roll(call.levels, -len(output))
                return None if training else gray_images(np.resize(call.levels, len(output))).to(output).view_as(output)

        def get_loss_autoencoder(*args, **kwargs):
            call.lambdas.append(arguments(loss, args, kwargs)[4] or 0)
            return loss(*args, **kwargs)

        calls, training, given = getattr(seen, name), name == "train_aae", arguments(function, args, kwargs)
        model = getattr(given[training], "_orig_mod", given[training])  # the original of a compiled one
        if (loss := getattr(type(model), "get_loss_autoencoder", None)) is None:
            return function(*args, **kwargs)
        call = Namespace(given=given, model=model, codes=set(), modes={}, lambdas=[], pictures={}, files=files(),
                         levels=OUTPUTS, groups=[getattr(optimizer, "param_groups", []) for optimizer in given[5:7]])
        call.random, call.start = call.end, call.trained = torch.get_rng_state(), weights(model)
        calls += [call] if training else []
        if training and (len(calls) > limit or time.monotonic() > end):
            raise GeneratorExit  # which `except Exception` does not catch
        with (mock.patch.object(type(model), "get_loss_autoencoder", get_loss_autoencoder),
              nn.modules.module.register_module_forward_hook(hook, with_kwargs=True)):
            result = function(*args, **kwargs)
        call.end, call.trained = torch.get_rng_state(), weights(model)
        call.pictures = {path: read_png(path, slice(3)) for path, _ in files() - call.files if path.suffix == ".png"}
        calls += [call] if call.pictures and call.codes and not training else []
        return result

    from mnist import mnist
    seen = Namespace(**{name: [] for name in WATCHED}, checkpoints={}, error=None, flag="")
    data, end = TensorDataset(gray_images(INPUTS), torch.arange(24) % 10), time.monotonic() + SECONDS
    stand_ins = {id(mnist): lambda root="", batch_size=64, *_, **__: DataLoader(data, batch_size, shuffle=True)}
    stand_ins.update((id(function), functools.wraps(function)(functools.partial(observe, name, function)))
                     for name in WATCHED if (function := getattr(train, name, None)))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, contextlib.ExitStack() as stack:
        stack.callback(nn.modules.module._global_forward_hooks_with_kwargs.clear)  # torch leaves them there
        for module in list(sys.modules.values()):  # wherever a function has been imported
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if id(value) in stand_ins:
                    stack.enter_context(mock.patch.object(module, name, stand_ins[id(value)]))
        stack.enter_context(contextlib.chdir(folder))
        torch.manual_seed(limit)  # another one for each run
        try:
            train.main(Namespace(**{**FLAGS, "data_dir": f"{folder}/", "log_dir": f"{folder}/", **flags}))
        except (GeneratorExit, Exception, SystemExit) as error:
            seen.error, seen.flag = error, missing_flag(error)
        for path, _ in files() - seen.train_aae[0].files if seen.train_aae else ():
            if path.read_bytes()[:2] == b"PK":  # as torch.save writes it
                seen.checkpoints[path.name] = None
                with contextlib.suppress(Exception):
                    seen.checkpoints[path.name] = torch.load(path, map_location="cpu", weights_only=True)
    return seen


class TrainMistakes(MistakesGroup):
    """Mistakes in main, generate_and_save and save_reconstruction, numbered as in the documentation."""

    def runs(self, words, enough="train_aae"):
        """Return what is seen of three runs; skip the test, or fail, if the first does not come to what is enough."""
        def call(train):
            run, *_ = runs = watch(train, EPOCHS), watch(train, 1, epochs=1), watch(train, 0, seed=2)
            if isinstance(run.error, Exception) and not (run.flag or getattr(run, enough)):
                error, run.error = run.error, GeneratorExit()  # only the first test tells it
                raise error
            return runs

        run, *_ = runs = self.attempt(words, call)
        if not getattr(run, enough):
            wanted = {"train_aae": "call of train_aae", "checkpoints": "file of weights"}.get(
                enough, f"PNG in which {enough} shows what model.decoder, or a copy of it, returns")
            why = (f"main reads the flag {run.flag}, which the assignment does not have: compute it in main, or read "
                   f'it with a default, getattr(args, "{run.flag}", None)' if run.flag else
                   f"in {EPOCHS} epochs of two batches, or {SECONDS} s, main makes no {wanted}")
            self.skipTest(f"{words}: train.py was not checked ({why})")
        return runs

    def test_02_each_optimizer_has_its_own_parameters(self):
        call = self.runs("Mistake 2")[0].train_aae[0]
        rest, disc = ({id(weight) for name in names for weight in getattr(call.model, name).parameters()}
                      for names in (("encoder", "decoder"), ("discriminator",)))
        for i, own, others, player, parts in ((0, rest, disc, "autoencoder", "encoder and decoder"),
                                              (1, disc, rest, "discriminator", "the discriminator")):
            held = {id(weight) for group in call.groups[i] for weight in group["params"]}
            self.check(not held or own <= held and not others & held, f"Mistake 2: the {player}'s optimizer must have "
                                                                      f"the parameters of {parts}, and no others")

    def test_11_samples_are_drawn_in_evaluation_mode(self):
        for call in self.runs("Mistake 11", "generate_and_save")[0].generate_and_save:
            self.check(True not in set().union(*call.modes.values()), "Mistake 11: samples are drawn in training "
                       "mode, in which BatchNorm mixes a batch's images and updates its statistics: call model.eval() "
                       "before, train() afterwards")

    def test_13_pictures_are_rescaled(self):
        for name in WATCHED[1:]:
            pictures = getattr(self.runs("Mistake 13", name)[0], name)[-1].pictures.values()
            shown = np.flatnonzero(np.bincount(np.concatenate([picture.ravel() for picture in pictures])) > 1000)
            known = np.isin(shown, [*INPUTS, *OUTPUTS, *INPUTS - 1, *OUTPUTS - 1]).sum()  # rounded, or rounded down
            words = ("rescale images only once; sample() must return them in [-1, 1]" if min(shown[1:], default=0) > 120
                     else "rescale images from [-1, 1] before saving, or the dark half is clipped")
            free = len(shown) < 3 or any(np.ptp(picture, 2).any() for picture in pictures)  # nothing flat, or in colors
            self.check(known > 5 or 2 * known > len(shown) - 2 or free,
                       f"Mistake 13: {name} saves the gray levels {OUTPUTS.tolist()} as {shown.tolist()}: {words}")

    def test_18_main_passes_lambda(self):
        calls = self.runs("Mistake 18")[0].train_aae
        lambdas = {round(float(value), 6) for call in calls for value in call.lambdas or [call.given[7] or 0]}
        self.check(len(lambdas) != 1 or 0.9 in {*lambdas, calls[0].given[7]}, "Mistake 18: with --lambda_ 0.9, the "
                   f"loss receives {lambdas.pop()}: call train_aae(..., args.lambda_)")

    def test_21_training_mode_returns_after_pictures(self):
        for call in self.runs("Mistake 21")[0].train_aae:
            self.check({False} not in call.modes.values(), "Mistake 21: BatchNorm or Dropout is trained in evaluation "
                       "mode, in which pictures have left it: begin train_aae with model.train()")

    def test_24_main_heeds_its_flags(self):
        long, short, other = self.runs("Mistake 24")
        first, count = long.train_aae[0], len(long.train_aae)
        rates = [{float(group["lr"]) for group in groups} for groups in first.groups]
        again, different = (run.train_aae and first.start.equal(run.train_aae[0].start) for run in (short, other))
        seeded = all(map(torch.equal, self.model().parameters(), self.model().parameters()))  # by the model itself
        for fault, words in (
                (first.codes and 3 not in first.codes, f"trains codes of {first.codes} dimensions, with --z_dim 3"),
                (rates == [{FLAGS["d_lr"]}, {FLAGS["ae_lr"]}], "exchanges --ae_lr and --d_lr"),
                (count > EPOCHS or count in (1, EPOCHS - 1) and not long.error or len(short.train_aae) > 1,
                 f"trains {count} epochs, with --epochs {EPOCHS}"),
                (again is False, "begins with other weights when it runs again with the same --seed: call "
                                 "torch.manual_seed(args.seed) before the model is made"),
                (different and len(first.start) and not seeded, "begins with the same weights for --seed 1 and 2")):
            self.check(not fault, f"Mistake 24: main {words}")

    def test_25_saved_weights_are_the_models(self):
        run = self.runs("Mistake 25", "checkpoints")[0]
        files = ["model_checkpoint.pt"] if "model_checkpoint.pt" in run.checkpoints else sorted(run.checkpoints)
        words, saved = f"Mistake 25: {', '.join(files)}", [run.checkpoints[file] for file in files]
        self.check(any(state is not None for state in saved), f"{words} cannot be read with torch.load(..., "
                   "weights_only=True): save model.state_dict(), and no other objects")
        states = [{str(name).removeprefix("module."): weight for name, weight in state.items()}
                  for state in saved if isinstance(state, dict)]
        names = [name for name, _ in run.train_aae[0].model.named_parameters()]
        whole = [torch.cat([state[name].flatten() for name in names]) for state in states if {*names} <= state.keys()]
        self.check(whole or len(files) > 1, f"{words} lacks names of model.state_dict(): save that")
        start, trained = run.train_aae[0].start, [call.trained for call in run.train_aae]
        bound = 2 * max((vector - trained[0]).norm() for vector in trained) + 0.01 * trained[0].norm()  # of averages
        self.check(not whole or start.equal(trained[-1]) or any(
            vector.shape == trained[0].shape and (vector - trained[0]).norm() < bound and not vector.equal(start)
            for vector in whole), f"{words} has weights that are not those that train_aae has trained")

    def test_26_pictures_show_inputs_over_reconstructions(self):
        for name in WATCHED[1:]:
            calls = getattr(self.runs("Mistake 26", name)[0], name)
            paths = set().union(*(call.pictures for call in calls))
            self.check(len(calls) < 2 or len(paths) > 1, f"Mistake 26: {name} saves the pictures of all epochs as one "
                       f"file, {min(paths).name}: put the epoch into its name")
        found = [[areas(picture, levels) for levels in (INPUTS, OUTPUTS)] for picture in calls[-1].pictures.values()]
        inputs, outputs = max(found, key=lambda kinds: sum(map(bool, kinds)))
        alone = not all(map(any, zip(*found, strict=True)))  # not even in another file
        twice = alone and any(max(area[2:]) > 1.6 * min(area[2:]) for area in inputs or outputs)
        row = sorted((x, kind) for kind, places in (("i", inputs), ("r", outputs)) for y, x, *_ in places
                     if abs(y - (inputs or outputs)[0][0]) < 9)
        for fault, words in ((twice, f"{'inputs' if inputs else 'reconstructions'} twice"),
                             (inputs and outputs and min(inputs) > max(outputs), "inputs under reconstructions"),
                             ("iri" in "".join(kind for _, kind in row), "inputs and reconstructions in turn")):
            self.check(not fault, f"Mistake 26: save_reconstruction shows {words}: show a row of inputs over a row of "
                                  "their reconstructions")

    def test_27_random_numbers_do_not_repeat(self):
        calls = self.runs("Mistake 27")[0].train_aae
        states = [bytes(call.random.numpy()) for call in calls if not call.random.equal(call.end)]
        self.check(len({*states}) == len(states), "Mistake 27: epochs begin with the same random state, so their prior "
                   "samples and the order of images repeat: call torch.manual_seed once, at the beginning of main, and "
                   "draw what pictures show with a torch.Generator")
