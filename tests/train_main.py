"""Tests of main, of the pictures and checkpoints that it saves, and of mnist.py and utils.py."""

import functools
import hashlib
import re
import tempfile
from pathlib import Path
from unittest import mock

import torch

from tests.train_epoch import TrainGroup
from tests.train_run import EPOCHS, FLAGS, INPUTS, LEVELS, OTHER, PICTURES, shown, watch, write_mnist
from tests.train_step import TrainStep
from unittests import Sampling

__unittest = True


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
            self.skipTest(f"{what}: main reads the flag {run.missing_flag}, which the assignment does not have: read "
                          f'it with a default, getattr(args, "{run.missing_flag}", None)')
        if run.error and not isinstance(run.error, GeneratorExit):
            if any(issubclass(group, (TrainStep, TrainMain)) for group in self.faulty):  # which explains it
                self.skipTest(self.TOLD)
            if not getattr(run, enough):
                self.attempt(what, functools.partial(raise_error, run.error))
        if not getattr(run, enough):
            wanted = {"train_aae": "call of train_aae", "checkpoints": "file of weights"}
            self.skipTest(f"{what}: in {EPOCHS} epochs of two batches, main makes no "
                          f"{wanted.get(enough, f'call of {enough} that saves a PNG')}")
        return runs

    def test_optimizers(self):
        long, _, other = self.runs("main")
        first, second = long.train_aae[0], other.train_aae[:1]
        done = [call for call in long.train_aae if call.optimizers_after]  # and not ended by an error
        parts = [{id(weight) for name in names for weight in getattr(first.model, name).parameters()}
                 for names in (("encoder", "decoder"), ("discriminator",))]
        for i, player, names in (
                (0, "autoencoder", "encoder and decoder"), (1, "discriminator", "the discriminator")):
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
        dimensions = [codes.shape[1:].numel() for call in long.train_aae for codes in call.codes] or [3]
        self.check({*dimensions} == {3}, f"Mistake 24: main trains codes of {dimensions[0]} dimensions, with --z_dim "
                                         "3: call AdversarialAE(z_dim=args.z_dim)")
        self.check(count <= EPOCHS and (count not in (1, EPOCHS - 1) or long.error) and len(short.train_aae) <= 1,
                   f"Mistake 24: main calls train_aae {count} times, with --epochs {EPOCHS}: loop over "
                   "range(args.epochs)")
        lambdas = {round(float(value), 6) for call in long.train_aae for value in call.lambdas or [call.given[7] or 0]}
        self.check(len(lambdas) != 1 or 0.9 in {*lambdas, first.given[7]}, "Mistake 18: with --lambda_ 0.9, the loss "
                   f"receives {[*lambdas][0]}: call train_aae(..., args.lambda_)")
        again, different = (run.train_aae and first.start.equal(run.train_aae[0].start) for run in (short, other))
        seeded = all(map(torch.equal, self.model().parameters(), self.model().parameters()))  # by the model itself
        self.check(again is not False, "Mistake 24: main begins with other weights when it runs again with the same "
                   "--seed: call torch.manual_seed(args.seed) before the model is made")
        self.check(not different or seeded or not len(first.start),
                   "Mistake 24: main begins with the same weights for --seed 1 and 2: use args.seed")
        for flag in ("batch_size", "data_dir"):
            values = [{loader[flag] for loader in run.loaders} for run in (long, other)]
            self.check(not all(values) or values[0] != values[1],
                       f"Mistake 24: main ignores --{flag}: pass args.{flag} to mnist()")
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
        if Sampling in self.faulty:  # which may set a seed
            self.skipTest(self.TOLD)
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
        states = [{without_prefix(name): weight for name, weight in state.items()}
                  for state in saved if isinstance(state, dict)]
        wanted = [without_prefix(name) for name, _ in run.train_aae[0].model.named_parameters()]
        whole = [torch.cat([state[name].flatten() for name in wanted]) for state in states if {*wanted} <= state.keys()]
        self.check(whole or len(names) > 1, f"{words} lacks names of model.state_dict(): save that")
        start, trained = run.train_aae[0].start, [call.trained for call in run.train_aae]
        bound = 2 * max((vector - trained[0]).norm() for vector in trained) + 0.01 * trained[0].norm()  # of averages
        self.check(not whole or start.equal(trained[-1]) or any(
            vector.shape == trained[0].shape and (vector - trained[0]).norm() < bound and not vector.equal(start)
            for vector in whole), f"{words} has weights that are not those that train_aae has trained")


def without_prefix(name):
    """Return a weight's name without what DataParallel or compile adds."""
    return re.sub(r"^(module|_orig_mod)\.", "", str(name))


def raise_error(error, _):
    raise error


class SavedPictures(TrainMain):
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
                       "mixes images and updates its statistics: call model.eval() before, and train() afterwards")

    def test_13_gray_levels(self):
        if Sampling in self.faulty:  # whose images the pictures show
            self.skipTest(self.TOLD)
        for name in PICTURES:
            ramps = [ramp if ramp[0] <= ramp[-1] else ramp[::-1] for picture in self.last(name)[1].values()
                     for *_, ramp in picture]
            right = ((LEVELS + 1) * 127.5).round().int().tolist()
            wrong = [ramp for ramp in ramps if ramp[-1] - ramp[0] < 150 or ramp != sorted({*ramp})]
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
        self.check(kinds != {True}, "Mistake 26: generate_and_save shows training images, not model.sample(batch_size)")

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
            under = inputs and outputs and min(inputs)[0] > max(outputs)[0]
            self.check(not under, f"Mistake 26: save_reconstruction shows inputs under reconstructions: {advice}")
            row = [k < len(INPUTS) for y, _, k, _ in sorted(found) if y < min(found)[0] + 9]
            self.check([True, False, True] not in [row[i:i + 3] for i in range(len(row))],
                       f"Mistake 26: save_reconstruction shows inputs and reconstructions in turn: {advice}")
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

        def call(module):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
                raw = write_mnist(root, **images)
                sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in raw.iterdir()}
                with mock.patch.dict(getattr(module, "MNIST_MD5", {}), sums):
                    loader = module.mnist(root=root, batch_size=16, num_workers=0)
                    return [torch.cat([x for x, _ in loader]).float() for _ in range(2)]

        first, second = self.attempt("mnist.py", call, "mnist")
        low, high = float(first.min()), float(first.max())
        self.check(first.shape[1:] == (1, 28, 28) and abs(low + 1) < 0.02 and abs(high - 1) < 0.02, f"Mistake 37: "
                   f"mnist() returns images {tuple(first.shape[1:])} from {low:.2f} to {high:.2f}, not (1, 28, 28) "
                   "from -1 to 1, as Normalize((0.5,), (0.5,)) makes them")
        nearest = {kind: torch.cdist(first.flatten(1), pixels.flatten(1)).min(1) for kind, pixels in images.items()}
        self.check(nearest["t10k"].values.mean() > 1, "Mistake 37: mnist() returns the test set: use train=True")
        self.check(len(first) == 130, f"Mistake 37: mnist() returns {len(first)} of 130 images in batches of 16: keep "
                                      "the last batch, with drop_last=False")
        self.check(not torch.equal(first, second), "Mistake 37: mnist() returns all epochs in the same order: use "
                                                   "shuffle=True")

    def test_38_logger(self):
        def call(module):
            writer, points = mock.MagicMock(), []
            writer.add_scalar = lambda tag, value, global_step=None, *_, **__: points.append(
                (tag, float(value), global_step))
            logger = module.TensorBoardLogger(writer, avg_window=5, name="generator")
            for i in range(15):
                logger.add_values({"one": torch.tensor(float(i)), "other": torch.tensor(2.0 * i)})
            return points, logger.global_step

        points, count = self.attempt("utils.py", call, "utils")
        one = [(value, step) for tag, value, step in points if tag == "generator/one"]
        self.check(len(one) in (2, 3), f"Mistake 38: for 15 values, TensorBoardLogger(writer, 5, 'generator') writes "
                                       f"{len(one)} points of generator/one: write the mean of each five")
        self.check(count == 15, f"Mistake 38: after 15 calls of add_values, the logger's global_step is {count}: count "
                                "calls, not values")
        self.check(abs(one[1][0] - 7) < 1.1, f"Mistake 38: of 0, 1, 2 ..., the logger writes {one[1][0]:g} as mean of "
                   "the second five, which is 7: empty the window after it is written")
        self.check(len({step for _, step in one}) == len(one), f"Mistake 38: the logger writes points at steps "
                                                               f"{[step for _, step in one]}: each needs its own")
