"""Tests of train_aae. Its optimizers move nothing, so what it does can be computed from the objective and compared.

This file needs only unittests.py: copy it to a folder tests/ next to unittests.py and your models.py and train.py.
"""

import contextlib
import functools
import gc
import importlib
import inspect
import os
import signal
import sys
import tempfile
import traceback
import weakref
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from unittests import ModelGroup

__unittest = True

NOWHERE = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115 (code under test may keep it)
NOWHERE.close = lambda: None  # for the same reason
LIMIT = 180  # seconds for an import and for a test of train.py, which may be slow where the machine is
PLAYERS = ("ae", "disc")  # as in ae_loss, optimizer_disc
PARTS = ("encoder", "decoder", "discriminator")
PARTIAL = "Mistake 15: train_aae does not train a last batch of 2:"
NOT_DETACHED = ("Mistake 4: the discriminator's loss also trains the encoder: call get_loss_discriminator(z.detach()), "
                "and zero_grad() before each backward()")
UNCLEARED = ("Mistake 3: the {name}'s step includes gradients of other losses or steps: call optimizer_{player}.zero_grad() "
             "before {player}_loss.backward()")
CUT = ("Mistake 19: train_aae gives get_loss_autoencoder a {} through which no gradient reaches the encoder: use no "
       "detach() or torch.no_grad() before it")
LOST = ("Mistake 18: lambda_ does not weigh the losses that train_aae steps on as it should (at 0 only the adversarial "
        "loss, at 1 only the reconstruction): call get_loss_autoencoder(x, recon_x, z, lambda_) and ae_loss.backward()")


# Running code of others ----------------------------------------------------------------------------------------------

class Overrun(BaseException):
    """Code has exceeded its time limit. It is a BaseException, so `except Exception` does not catch it."""

    first = None  # what the first one says


@contextlib.contextmanager
def limit(words, seconds):
    """Raise Overrun(words) in a block after some seconds; after the first time, fail at once."""
    def stop(*_):
        Overrun.first = Overrun.first or words
        raise Overrun(words)

    if Overrun.first:
        raise AssertionError(f"not run, because {Overrun.first.partition(':')[0]}")
    with contextlib.ExitStack() as stack:
        if hasattr(signal, "setitimer"):  # Windows has none
            stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # repeated every second, in case an `except:` catches it
        yield


def load(name):
    """Import a module within a time limit; where PyTorch Lightning is missing, a stand-in has its seed_everything."""
    for package in ("pytorch_lightning", "lightning"):
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            sys.modules[package] = ModuleType(package)
            sys.modules[package].seed_everything = lambda seed=0, *_, **__: torch.manual_seed(seed)
    with limit(f"importing {name} did not end within {LIMIT} s: does it train as soon as it is imported? "
               'put the call of main under if __name__ == "__main__":', LIMIT):
        return importlib.import_module(name)


class TrainGroup(ModelGroup):
    """Runs a student's train.py; what is absent is skipped, what crashes fails."""

    def working_model(self):
        """Skip the test if the networks or losses of the model do not work, which other tests tell."""
        model, x = self.model(), block_images(16)
        try:
            for loss, _ in (*[model.get_loss_autoencoder(x, *model(x), lambda_) for lambda_ in (0.0, 1.0)],
                            model.get_loss_discriminator(model(x)[1].detach())):
                loss.backward()
        except Exception:
            self.skipTest("what needs a model whose losses work")

    def attempt(self, what, call):
        """Return call(train), run silently and without a network; `what` names what cannot be tested if that fails."""
        with contextlib.redirect_stdout(NOWHERE), contextlib.redirect_stderr(NOWHERE), \
                mock.patch("sys.argv", ["train.py"]), mock.patch("urllib.request.urlopen", side_effect=OSError) as web:
            try:
                train = load("train")
                with limit(f"{self.id()} did not end within {LIMIT} s: does train.py have an infinite loop?", LIMIT):
                    return call(train)
            except Overrun as error:
                self.check(False, str(error))
            except (AssertionError, Exception, SystemExit) as caught:
                error, owner = caught, getattr(caught, "obj", None)  # the owner of an attribute that is missing
        lines = [f" (line {frame.lineno} of {Path(frame.filename).name}: {frame.line})" for frame in
                 traceback.extract_tb(error.__traceback__) if Path(frame.filename).stem in ("train", "models")]
        if isinstance(error, ModuleNotFoundError) and error.name == "train":
            self.skipTest(f"{what}: there is no train.py")
        if (web.called or isinstance(error, (OSError, ImportError))
                or isinstance(owner, (Namespace, DataLoader, TensorDataset))  # what train.py has been given here
                or getattr(owner, "__name__", "") in ("train", "mnist")
                or any(words in str(error) for words in ("CUDA", "NVIDIA", "Dataset not found"))):
            self.skipTest(f"{what}: {error!r}{lines[-1] if lines else ''}")
        if isinstance(error, AssertionError) and not lines:
            raise error
        self.check(False, getattr(error, "mistake", None) or
                   f"train.py raises {type(error).__name__}: {error}{lines[-1] if lines else ''}")


# One epoch with frozen weights ---------------------------------------------------------------------------------------

class Frozen(torch.optim.Optimizer):
    """An optimizer that moves nothing: each step notes the gradient of each network, [number of weights]."""

    def __init__(self, networks):
        super().__init__([weight for network in networks for weight in network.parameters()], {"lr": 0.01})
        self.networks, self.steps = networks, []

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        self.steps.append([gradient(network) for network in self.networks])
        for weight in self.param_groups[0]["params"]:
            weight.add_(0)  # so that autograd still notices a step between a loss and its backward pass
        return loss


def gradient(network):
    """Return the gradient of a network as one vector; it is 0 where there is none."""
    return torch.cat([(torch.zeros_like(weight) if weight.grad is None else weight.grad).flatten().double()
                      for weight in network.parameters()])


class Loader(DataLoader):
    """Batches in their order, which tell an epoch when they are drawn."""

    def __iter__(self):
        for i, batch in enumerate(super().__iter__()):
            self.epoch.drawn = i
            self.epoch.look_for_graphs(i)
            yield batch


class Epoch:
    """What train_aae does in one epoch with frozen weights: its calls, its steps, and what it logs."""

    def __init__(self, train_aae, model, images, lambda_, batch_size, epoch=90):  # some save pictures every fifth
        self.model, self.batches, self.drawn = model, images.split(batch_size), -1
        self.encoded, self.decoded = [], []  # Namespaces: batch in turn, input, output
        self.losses = {player: [] for player in PLAYERS}  # Namespaces: batch in turn, arguments, values
        self.logged, self.points = {player: [] for player in PLAYERS}, []  # dicts of losses; (tag, step)
        self.root = None  # the loss whose backward pass came last
        self.graphs, self.kept = [], False  # weak references to what graphs hold; whether old graphs are kept
        self.steps = {}
        loader = Loader(TensorDataset(images, torch.arange(len(images)) % 10), batch_size)
        loader.epoch, optimizers = self, []
        for player, networks in (("ae", [model.encoder, model.decoder]), ("disc", [model.discriminator])):
            optimizers.append(Frozen(networks))
            self.steps[player] = optimizers[-1].steps
        model.train().zero_grad()
        with contextlib.ExitStack() as stack:
            loggers = self.make_loggers(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
            for owner, name, replacement in (
                    (model, "get_loss_autoencoder", functools.partial(self.loss, "ae")),
                    (model, "get_loss_discriminator", functools.partial(self.loss, "disc")),
                    (model.encoder, "forward", functools.partial(self.forward, self.encoded)),
                    (model.decoder, "forward", functools.partial(self.forward, self.decoded))):
                replacement = functools.partial(replacement, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, replacement))
            try:
                train_aae(epoch, model, loader, *loggers, *optimizers, lambda_)
            except Exception as error:
                error.mistake = self.explain(str(error))
                raise

    def make_loggers(self, folder):
        """Return loggers, the student's own if there are any, that note what they get."""
        for name in ("checkpoints", "results/Prior_samples", "results/Reconstruction"):
            Path(folder, name).mkdir(parents=True)
        writer = mock.MagicMock(log_dir=folder)
        writer.get_logdir.return_value = folder
        writer.add_scalar = lambda tag, value, global_step=None, *_, **__: self.points.append((tag, global_step))
        Logger = getattr(sys.modules.get("utils"), "TensorBoardLogger", mock.MagicMock)

        def noting(player, add_values):
            def add(values):
                self.logged[player].append(numbers(values))
                return add_values(values)
            return add

        loggers = [Logger(writer, avg_window=1, name=name) for name in ("generator", "discriminator")]
        for player, logger in zip(PLAYERS, loggers, strict=True):
            logger.summary_writer, logger.add_values = writer, noting(player, logger.add_values)
        return loggers

    def forward(self, calls, forward, *args, **kwargs):
        output = forward(*args, **kwargs)
        given = (*args, *kwargs.values())[0]
        calls.append(Namespace(turn=self.drawn, given=given.detach().clone(), output=output.detach().clone()))
        if calls is self.encoded and output.requires_grad:
            hook = Hook()  # which the graph holds
            output.register_hook(hook)
            self.graphs.append((self.drawn, weakref.ref(hook)))
        return output

    def loss(self, player, function, *args, **kwargs):
        result = function(*args, **kwargs)
        if result[0].requires_grad:
            result[0].register_hook(lambda _: setattr(self, "root", player))
        names = ("x", "recon_x", "z_fake", "lambda_") if player == "ae" else ("z_fake",)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        z = given["z_fake"]
        self.losses[player].append(Namespace(
            turn=self.drawn, cut=[name for name in ("recon_x", "z_fake") if not given.get(name, z).requires_grad
                                  and any(weight.requires_grad for weight in self.model.encoder.parameters())],
            reaches_encoder=reaches(result[0].grad_fn, z.grad_fn), attached=result[0].requires_grad,
            values=numbers(result[1]),
            given={name: value.detach().clone() for name, value in given.items() if torch.is_tensor(value)}))
        return result

    def look_for_graphs(self, turn):
        """Note whether the graphs of all batches but the last two still exist when another batch is drawn."""
        def alive():
            return {drawn for drawn, reference in self.graphs if drawn < turn - 2 and reference()}

        if turn > 4 and len(alive()) == turn - 2:
            gc.collect()  # slow, so it is not done before
            self.kept |= len(alive()) == turn - 2

    def origin_of_images(self, images):
        """Return the number of the batch that images are, or that they show with changes, or what else they are."""
        if any(close(images, call.output) for call in self.decoded):
            return "reconstructions"
        alike = [i for i, batch in enumerate(self.batches) if images.shape == batch.shape
                 and likeness(images, batch) > 0.7]
        return alike[0] if alike else "other images"

    def origins_of_codes(self, z):
        """Return what the encoder has coded so, up to noise: a set of numbers of batches, and of other things."""
        calls = [call for call in self.encoded if call.output.shape == z.shape]
        found = [call for call in calls if close(z, call.output)] or [
            call for call in calls if likeness(z, call.output) > 0.6]
        return {self.origin_of_images(call.given) for call in found} or {"no image"}

    def explain(self, error):
        """Return the mistake behind an error of autograd, or None."""
        last = (self.losses["ae"] + self.losses["disc"])[-1:]
        disc = self.losses["disc"][-1:]
        if "does not require grad" in error:
            for player, calls in self.losses.items():
                if calls and not calls[-1].attached:
                    number = 19 if player == "ae" else 17
                    return (f"Mistake {number}: {player}_loss has no gradient: remove the detach(), torch.no_grad() or "
                            "requires_grad_(False) before it")
        if disc and disc[0].reaches_encoder and ("second time" in error or "inplace" in error and self.root == "disc"):
            return NOT_DETACHED
        if last and "inplace" in error:
            return ("Mistake 16: an optimizer's step() stands between a loss and its backward(), and changes weights "
                    "that it needs. An order that works: both losses (disc_loss of z.detach()), then zero_grad(), "
                    "backward() and step() of the autoencoder, then the three of the discriminator")
        if 0 < self.drawn == len(self.batches) - 1 and len(self.batches[-1]) < len(self.batches[0]):
            return f"{PARTIAL} it raises {error}"
        return None


class Hook:
    """A hook of a tensor that does nothing; the tensor's graph holds it."""

    def __call__(self, _):
        return None


def reaches(node, target):
    """Whether the graph below a node of autograd contains another node."""
    nodes = [node] if node else []
    for node in nodes:
        nodes.extend({following for following, _ in node.next_functions if following} - {*nodes})
    return target is not None and target in nodes


# What the gradients should be ----------------------------------------------------------------------------------------

class Reference:
    """The gradients of the objective at the weights of a model, by the model's own losses, and which can be told apart.

    `terms` has two for each network, [number of weights]: of the reconstruction and of the adversarial loss for encoder
    and decoder; of its own and of the adversarial loss for the discriminator. `leak` is the encoder's gradient of the
    discriminator's loss where codes are not detached.
    """

    DRAWS = 12  # of prior samples, and of an encoder's noise if it has any

    def __init__(self, model, x):
        model.train()
        draws = [self.draw(model, x, False) for _ in range(2)]
        same = all(close(draw, other) for draw, other in zip(draws[0].values(), draws[1].values(), strict=True))
        draws += [] if same else [self.draw(model, x, False) for _ in range(self.DRAWS - 2)]
        own = [self.draw(model, x, True) for _ in range(self.DRAWS)]
        mean = {name: sum(draw[name] for draw in part) / len(part) for part in (draws, own) for name in part[0]}
        self.terms = {part: torch.stack([mean[part, "first"], mean[part, "adversarial"]], 1) for part in PARTS}
        self.leak = mean["encoder", "leak"]
        self.weighed = all(  # by lambda, as they should be
            float((2 * mean[part, "both"] - self.terms[part].sum(1)).norm()) < 0.2 * float(self.terms[part].norm())
            for part in PARTS[:2])
        self.sure = {part: self.is_sure(part, own if part == "discriminator" else draws) for part in PARTS}
        model.zero_grad()

    def draw(self, model, x, own):
        """Return gradients by (network, term), of the discriminator's own loss or of all others."""
        gradients = {}
        for term, parts in [("first", PARTS[2:])] if own else [
                ("first", PARTS[:2]), ("adversarial", PARTS), ("both", PARTS[:2]), ("leak", PARTS[:1])]:
            model.zero_grad()
            recon_x, z = model(x)
            if own or term == "leak":
                loss, _ = model.get_loss_discriminator(z if term == "leak" else z.detach())
            else:
                loss, _ = model.get_loss_autoencoder(x, recon_x, z, {"first": 1.0, "adversarial": 0.0, "both": 0.5}[term])
            loss.backward()
            gradients.update({(part, term): gradient(getattr(model, part)) for part in parts})
        return gradients

    def is_sure(self, part, draws):
        """Whether a network's terms can be told from each other, and from the noise of prior samples and encoder."""
        first, adversarial = self.terms[part].norm(dim=0).tolist()
        if part == "discriminator" and adversarial == 0 or part == "decoder":  # one term
            return first > 0 and (part == "discriminator" or self.weighed and adversarial < 1e-3 * first)
        if min(first, adversarial) == 0 or part == "encoder" and not self.weighed:  # mistakes of models.py
            return False
        cosine = self.terms[part][:, 0] @ self.terms[part][:, 1] / first / adversarial
        spread = torch.stack([torch.tensor([self.fit(part, draw[part, term]) for draw in draws]).std(0)
                              for term in ("first", "adversarial") if (part, term) in draws[0]])
        limits = torch.tensor([[0.5, 0.15]] if part == "discriminator" else [[0.15, 0.15]] * 2)
        return min(first, adversarial) > 1e-3 * max(first, adversarial) and abs(cosine) < 0.95 and bool(
            (spread < limits).all())

    def part_of(self, part, lambda_, step):
        """Return how far a step goes in the direction that is right at a lambda, in units of a step for one batch."""
        weights = [1.0, 0.0] if part == "discriminator" else [lambda_, 1 - lambda_]
        right = self.terms[part] @ torch.tensor(weights, dtype=step.dtype)
        return float(step @ right / (right @ right + 1e-300))

    def fit(self, part, vector):
        """Return the coefficients by which the terms make up a vector, by least squares; 0 for a term that is 0."""
        norms = self.terms[part].norm(dim=0)
        terms = (self.terms[part] / norms.clamp(min=1e-300))[:, norms > 0]
        solution = torch.zeros(2, dtype=vector.dtype)
        solution[norms > 0] = torch.linalg.lstsq(terms, vector[:, None]).solution[:, 0] / norms[norms > 0]
        return solution.tolist()


class Observation:
    """Epochs of train_aae on a model that has been brought to life, and the gradients that they should step on."""

    STARTS, BATCHES = 3, 6

    def __init__(self, train_aae, new_model, seed):
        self.train_aae = train_aae
        for start in range(self.STARTS):
            torch.manual_seed(seed + 1000 * start)
            self.model = living(new_model())
            x = block_images(16)
            self.reference = Reference(self.model, x)
            if all(self.reference.sure.values()) or not self.reference.weighed:
                break
        first, adversarial = self.reference.terms["encoder"].norm(dim=0).tolist()
        self.lambda_ = adversarial / (first + adversarial) if first * adversarial else 0.5  # both terms have equal norms
        self.mixed = self.epoch(block_images(3 * 64 + 2), self.lambda_, 64)
        self.same = {lambda_: self.epoch(x.repeat(self.BATCHES, 1, 1, 1), lambda_, 16) for lambda_ in (
            0.0, self.lambda_, 1.0)}

    def epoch(self, images, lambda_, batch_size):
        return Epoch(self.train_aae, self.model, images, lambda_, batch_size)

    @functools.cached_property
    def long(self):
        """An epoch long enough for whoever steps once in several batches, or begins late."""
        return self.epoch(block_images(40 * 16), self.lambda_, 16)

    def steps(self, part, epoch):
        """Return the gradients of a network that its optimizer has stepped on in an epoch, [steps, weights]."""
        player, index = ("disc", 0) if part == "discriminator" else ("ae", PARTS.index(part))
        return [step[index] for step in epoch.steps[player]]

    def coefficients(self, part, lambda_):
        """Return how much of the two terms of a network its steps have had in an epoch at one lambda."""
        steps = self.steps(part, self.same[lambda_])
        return self.reference.fit(part, sum(steps)) if steps else [0.0, 0.0]

    def lost(self, name):
        """Whether the autoencoder's loss never got a `recon_x` or `z_fake` through which gradients pass."""
        return all(name in call.cut for epoch in self.same.values() for call in epoch.losses["ae"])


def block_images(count):
    """Return images of 7x7 random blocks, [count, 1, 28, 28] in [-1, 1]; any two differ clearly."""
    return nn.functional.interpolate(torch.rand(count, 1, 7, 7) * 2 - 1, scale_factor=4)


def living(model):
    """Train a model by the objective for 30 steps, so that codes and logits differ, and return it."""
    with torch.no_grad():  # lazy layers get their weights
        model.discriminator(model(block_images(16))[1])
    for module in model.train().modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0  # so that losses are functions of weights and batch
    optimizer_ae = torch.optim.Adam([*model.encoder.parameters(), *model.decoder.parameters()], 1e-3)
    optimizer_disc = torch.optim.SGD(model.discriminator.parameters(), 0.05)
    for _ in range(30):
        x = block_images(16)
        recon_x, z = model(x)
        ae_loss = (x - recon_x).square().mean() + 0.1 * softplus(-model.discriminator(z)).mean()
        disc_loss = (softplus(-model.discriminator(torch.randn_like(z))) + softplus(model.discriminator(z.detach())))
        for optimizer, loss in ((optimizer_ae, ae_loss), (optimizer_disc, disc_loss.mean())):
            model.zero_grad()
            loss.backward()
            optimizer.step()
    return model


# What is found -------------------------------------------------------------------------------------------------------

def faults_of_batches(seen):
    """Yield what is wrong with the images and codes that the losses get, in an epoch of three batches and a rest."""
    epoch, calls = seen.mixed, seen.mixed.losses["ae"]
    origins = [epoch.origin_of_images(call.given["x"]) for call in calls]
    if len(calls) == 1:
        yield "Mistake 22: train_aae stops after one batch: is a break or a return left in the loop?"
    if calls and {*origins} == {0}:
        yield ("Mistake 23: train_aae trains the first batch again and again: loop over train_loader itself, with no "
               "next(iter(train_loader)) in the loop")
    if calls and len(epoch.batches[-1]) not in [len(call.given["x"]) for call in calls]:
        yield f"{PARTIAL} it is skipped"
    for name, images in (("the encoder", [call.given for call in epoch.encoded]),
                         ("get_loss_autoencoder", [call.given["x"] for call in calls])):
        for given in images:
            origin = epoch.origin_of_images(given)
            if isinstance(origin, int):
                (mean, slope), (right, _) = line(given, epoch.batches[origin]), line(*[epoch.batches[origin]] * 2)
                if abs(mean - right) > 0.1 or not 0.85 < slope < 1.15:
                    yield (f"Mistake 23: {name} gets changed images (their mean goes from {right:.2f} to {mean:.2f}, "
                           f"and they are stretched by {slope:.2f}): leave them in [-1, 1]")
    yield from faults_of_codes(epoch)


def faults_of_codes(epoch):
    """Yield if the codes of the discriminator's loss, or those decoded for recon_x, are not those of the batch."""
    given = [[call.given for call in epoch.decoded if close(call.output, loss.given["recon_x"])]
             for loss in epoch.losses["ae"] if "recon_x" in loss.given]
    for name, losses, codes in (
            ("get_loss_discriminator", epoch.losses["disc"], [[loss.given["z_fake"]] for loss in epoch.losses["disc"]]),
            ("recon_x", epoch.losses["ae"], given)):
        origins = [(loss.turn, set().union(*map(epoch.origins_of_codes, candidates)))
                   for loss, candidates in zip(losses, codes, strict=False)
                   if candidates and len(candidates[0]) == len(epoch.batches[0])]
        if {loss.turn for loss in losses} == {len(epoch.batches) - 1}:  # the batches were collected before
            origins = [(min(found, key=str), found) for _, found in origins]
        wrong = [found for turn, found in origins if turn not in found]
        if epoch.encoded and len(wrong) > len(origins) / 2:
            what = "another batch" if isinstance(min(wrong[-1], key=str), int) else min(wrong[-1], key=str)
            yield (f"Mistake 31: {name} is made from codes of {what}: use those that the encoder makes of this batch, "
                   "recon_x, z = model(x)")


def faults_of_steps(seen):
    """Yield what is wrong with the steps: none, uncleared, upwards, or other weights of the terms than lambda's."""
    for part in PARTS:
        player = "disc" if part == "discriminator" else "ae"
        moved = [step for step in seen.steps(part, seen.same[seen.lambda_]) if step.any()]
        if not moved and not any(step.any() for step in seen.steps(part, seen.long)):
            cut = player == "ae" and (seen.lost("recon_x") or seen.lost("z_fake"))
            yield (cut and CUT.format("recon_x") or f"Mistake 17: train_aae does not train the {part}: for each batch, "
                   f"call {player}_loss.backward() and then optimizer_{player}.step(), the optimizer that train_aae is "
                   "given; clear nothing between, freeze nothing")
        steps = seen.steps(part, seen.mixed)
        if any(torch.equal(one, other) and one.any() for one, other in zip(steps, steps[1:], strict=False)):
            yield (f"Mistake 22: optimizer_{player}.step() is called twice on the same gradient: call zero_grad(), "
                   f"{player}_loss.backward() and step() once a batch")
        if len(steps) == 1 and len(seen.steps(part, seen.long)) == 1:
            yield f"Mistake 22: optimizer_{player}.step() is called once an epoch: call it for each batch"
        if grows([seen.reference.part_of(part, seen.lambda_, step) for step in moved]):
            yield UNCLEARED.format(name=part, player=player)
    yield from faults_of_discriminator(seen)
    yield from faults_of_autoencoder(seen)


def faults_of_discriminator(seen):
    """Yield a discriminator that is trained upwards, or also by the autoencoder's loss, most of which is there at 0."""
    own, adversarial = seen.coefficients("discriminator", 0.0)
    if not seen.reference.sure["discriminator"] or not own:
        return
    if own < 0:
        yield ("Mistake 30: the discriminator is trained to raise its loss: call disc_loss.backward(), with no minus "
               "before it")
    elif abs(adversarial) > 0.5 * own:
        yield UNCLEARED.format(name="discriminator", player="disc")


def faults_of_autoencoder(seen):
    """Yield what the steps of encoder and decoder say of lambda and of the terms of the loss, in words."""
    decoder, encoder = ({lambda_: seen.coefficients(part, lambda_) for lambda_ in seen.same}
                        for part in ("decoder", "encoder"))
    low, middle, high = sorted(seen.same)
    if seen.reference.sure["decoder"] and decoder[middle][0] < 0:
        yield "Mistake 30: the decoder is trained to raise the reconstruction loss: call ae_loss.backward(), with no minus"
    if seen.reference.sure["encoder"]:
        share = {lambda_: relative(*encoder[lambda_], lambda_ if lambda_ == middle else 0.5) for lambda_ in encoder}
        yield from faults_of_encoder(seen, share[low], share[middle], share[high])
    if seen.reference.sure["decoder"] and abs(decoder[low][0]) > 0.5 * abs(decoder[middle][0]):
        yield LOST


def faults_of_encoder(seen, low, middle, high):
    """Yield by what an encoder's steps differ from (0, 1) at lambda 0, (1, 1) between, and (1, 0) at 1.

    Each is a pair: the shares of the reconstruction and of the adversarial loss, the larger of which is 1.
    """
    at_1 = sum(seen.steps("encoder", seen.same[1.0]), torch.zeros(1, dtype=torch.float64))
    leak = seen.reference.leak
    if middle[0] < -0.5 or high[0] < -0.5:
        yield "Mistake 30: the encoder is trained to raise the reconstruction loss: call ae_loss.backward(), with no minus"
    elif low[1] < -0.5:
        yield "Mistake 1: train_aae trains the encoder to be recognized: gen_loss must fall, not rise"
    elif middle[1] < -0.5 or leak.any() and at_1 @ leak > 0.5 * len(seen.steps("encoder", seen.same[1.0])) * (
            leak @ leak) and high[1] < 0:
        yield NOT_DETACHED
    elif low[0] > 0.5 and low[1] < 0.5 and high[1] > 0.5 and high[0] < 0.5:
        yield "Mistake 9: train_aae exchanges lambda_ and 1 - lambda_: call get_loss_autoencoder(x, recon_x, z, lambda_)"
    elif max(low[1], middle[1], high[1]) < 0.5:
        yield CUT.format("z_fake") if seen.lost("z_fake") else LOST
    elif max(low[0], middle[0], high[0]) < 0.5:
        decoder_learns = any(step.any() for step in seen.steps("decoder", seen.same[1.0]))
        yield CUT.format("recon_x") if seen.lost("recon_x") or decoder_learns else LOST
    elif max(abs(low[0]), abs(low[1] - 1), abs(middle[0] - 1), abs(middle[1] - 1), abs(high[0] - 1), abs(high[1])) > 0.5:
        yield LOST


def faults_of_curves(seen):
    """Yield what is wrong with what is logged; the losses are known, as the weights are frozen."""
    epoch = seen.mixed
    for tag in {tag for tag, _ in epoch.points}:
        steps = [step for other, step in epoch.points if other == tag]
        if len({*steps}) < len(steps):
            yield (f"Mistake 14: four batches are logged at steps {steps} of {tag}: log each batch at its own step, "
                   "counted across epochs")
    for player, other in zip(PLAYERS, PLAYERS[::-1], strict=True):
        name, advice = f"{player}_loss", f"call logger_{player}.add_values({player}_dict) once for each batch"
        logged = [values[name] for values in epoch.logged[player] if name in values]
        right = [call.values.get(name) for call in epoch.losses[player]]
        if any(name in values for values in epoch.logged[other]):
            yield f"Mistake 29: {name} is logged by logger_{other}: {advice}"
        elif epoch.logged[other] and not epoch.logged[player] and right:
            yield f"Mistake 29: {name} is not logged, unlike {other}_loss: {advice}"
        elif right and not in_order(logged, right) and not in_order(logged, [sum(right) / len(right)]):
            yield (f"Mistake 29: {name} is logged as {rounded(logged)}, but in the four batches it is "
                   f"{rounded(right)}: {advice}")


# Small helpers of these --------------------------------------------------------------------------------------------

def likeness(one, other):
    """Return the correlation of two tensors of the same shape, over what differs within the batch."""
    one, other = (tensor.double().flatten(1) - tensor.double().flatten(1).mean(0) for tensor in (one, other))
    return float((one * other).sum() / (one.norm() * other.norm() + 1e-300))


def close(one, other):
    return one.shape == other.shape and float((one - other).norm()) <= 1e-3 * float(other.norm())


def line(given, images):
    """Return the mean of changed images, and the slope of the line by which their values depend on the original."""
    given, images = given.double().flatten(), images.double().flatten()
    covariance = torch.stack([images, given]).cov()
    return float(given.mean()), float(covariance[0, 1] / covariance[0, 0])


def grows(parts):
    """Whether steps on the same batch grow as 1, 2, 3 ..., as gradients do that are never cleared."""
    return len(parts) > 3 and parts[0] > 0 and all(0.7 * i < part / parts[0] < 1.4 * i for i, part in enumerate(parts, 1))


def relative(first, adversarial, lambda_):
    """Return coefficients divided by the weights that lambda gives them and by the larger of the two; 0 if both are."""
    pair = first / lambda_, adversarial / (1 - lambda_)
    largest = max(map(abs, pair))
    return tuple(value / largest for value in pair) if largest > 1e-6 else (0.0, 0.0)


def in_order(part, whole):
    """Whether numbers are in a list, each once, and in its order."""
    rest = iter(whole)
    return all(any(abs(number - other) <= 1e-4 * max(1, abs(other)) for other in rest) for number in part)


def numbers(values):
    """Return those values of a dict that are single numbers, as floats."""
    return {name: torch.as_tensor(value).item() for name, value in values.items() if torch.as_tensor(value).numel() == 1}


def rounded(values):
    return [float(f"{value:.4g}") for value in values]


@functools.lru_cache(1)
def observe(train_aae, new_model, seed):
    return Observation(train_aae, new_model, seed)


class TrainStep(TrainGroup):
    """train_aae: its batches, its steps, and what it logs. Of several faults, the most basic one is told."""

    def tell(self, *searches):
        """Fail with the first fault that the searches find."""
        self.working_model()  # or skip
        fault = self.attempt("train_aae", lambda train: next((fault for search in searches for fault in search(
            observe(train.train_aae, self.models.AdversarialAE, self.seed))), None))
        self.check(fault is None, fault)

    def test_batches(self):
        self.tell(faults_of_batches)

    def test_steps(self):
        self.tell(faults_of_batches, faults_of_steps)

    def test_curves(self):
        self.tell(faults_of_curves)

    def test_39_graphs_are_freed(self):
        self.tell(lambda seen: ["Mistake 39: the graphs of all batches are kept in memory: add up numbers, "
                                "ae_loss.item(), not tensors"] * seen.same[1.0].kept)
