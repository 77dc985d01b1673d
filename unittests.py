"""Tests of an adversarial autoencoder, on the CPU, without a network and without MNIST:  python unittests.py

The groups in this file test models.py, in the order in which a student writes it. To check your own solution, copy
this file and the folder tests/ next to your models.py and train.py. docs/CHECK.md explains the numbered mistakes.
"""

import contextlib
import importlib
import itertools
import json
import os
import signal
import sys
import unittest
from argparse import Namespace
from pathlib import Path

if __name__ == "__main__":  # Python puts the folder of a symbolic link's target first
    sys.path[0] = str(Path(__file__).absolute().parent)
os.environ["MPLBACKEND"] = "Agg"  # matplotlib opens no windows
if Path(__file__).absolute().with_name("training").joinpath("cuda_graph.py").is_file():  # missing in a student's folder
    import training  # noqa: F401 (before torch, which reads the variables that it sets)
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests run on the CPU, as must code that looks for a GPU
# isort: split
import torch
from torch.nn.functional import softplus

__unittest = True  # hides the lines of this file in tracebacks, but not those of the code under test

HERE = Path(__file__).absolute().parent
PARTS = ("Encoder", "Decoder", "Discriminator")


class Group(unittest.TestCase):
    """Tests that need the modules named in `needs`; if one cannot be imported, only this group fails."""

    needs = ()
    seed = 0  # of every test

    @classmethod
    def setUpClass(cls):
        for name in cls.needs:
            setattr(cls, name.rpartition(".")[2], importlib.import_module(name))

    def setUp(self):
        torch.manual_seed(self.seed)

    def check(self, condition, words):
        """Fail with only these words as message unless the condition holds."""
        if not condition:
            raise self.failureException(words) from None

    check_formula = check  # what a more basic fault may explain

    def check_close(self, value, right, words, tolerance=1e-4):
        value, right = (float(torch.as_tensor(number).detach()) for number in (value, right))
        self.check_formula(abs(value - right) <= tolerance * max(1, abs(right)),  # false for NaN, too
                           f"{words} (it is {value:.6g}, and should be {right:.6g})")


class StudentGroup(Group):
    """Tests of anybody's files. What one test has told, no other one tells again."""

    told, faulty = set(), set()  # words; groups that have told any
    TOLD = "told by another test"

    @classmethod
    def setUpClass(cls):
        try:
            super().setUpClass()
        except (Exception, SystemExit) as error:
            if str(error) in cls.told:
                raise unittest.SkipTest(cls.TOLD) from None
            cls.told.add(str(error))
            raise AssertionError(f"importing models fails: {error!r}") from error

    def check(self, condition, words):
        if not condition:
            self.faulty.add(type(self))
            if words in self.told:
                self.skipTest(self.TOLD)
            self.told.add(words)
        super().check(condition, words)

    def check_formula(self, condition, words):
        """Check what a fault that the group has told may explain, unless there is one."""
        if not condition and type(self) in self.faulty:
            self.skipTest(self.TOLD)
        self.check(condition, words)


def images_like_mnist(count):
    return torch.rand(count, 1, 28, 28) * 2 - 1


def listen(network):
    """Return a list that collects the input and the output of each call of a network, however it is called."""
    calls, forward = [], network.forward
    network.forward = lambda *args, **kwargs: calls.append((
        (*args, *kwargs.values())[0], forward(*args, **kwargs))) or calls[-1][1]
    return calls


class ModelGroup(StudentGroup):
    """Shared by the groups on models.py."""

    needs = ("models",)

    def model(self, z_dim=4):
        """Return a new model in evaluation mode; skip the test if it does not work, which Networks or Model tells."""
        shapes = None
        with contextlib.suppress(Exception), torch.no_grad():  # lazy layers get their weights here
            model = self.models.AdversarialAE(z_dim=z_dim).eval()
            recon_x, z = model(images_like_mnist(2))
            shapes = recon_x.shape, z.shape, model.discriminator(z).shape
            self.code_type = z.dtype
        if shapes != ((2, 1, 28, 28), (2, z_dim), (2, 1)):
            self.skipTest("what needs working networks: see the failures")
        return model

    def check_prior(self, codes, source):
        """Check codes against N(0, I), by bounds that a right solution misses less than once in 1e9 times."""
        values = codes.double().flatten().sort().values
        distance = (torch.special.ndtr(values) - torch.arange(len(values)) / len(values)).abs().max()
        error = max(distance / 3.3, values.mean().abs() / 6.5, (values.std() - 1).abs() / 4.6)
        self.check(error < len(values.unique()) ** -0.5 and values[-1] > 2.5,  # Kolmogorov: 2 exp(-2 * 3.3**2) = 7e-10
                   f"Mistake 5: {source} are not samples of N(0, I) (mean {values.mean():.3f}, standard deviation "
                   f"{values.std():.3f}, largest {values[-1]:.2f}): draw them with torch.randn")
        self.check(len(codes.unique(dim=0)) > len(codes) / 2 and codes.T.corrcoef().triu(1).abs().max() < 0.3,
                   f"Mistake 28: the numbers of {source} depend on each other: draw one for each, with torch.randn")


class Networks(ModelGroup):
    """Encoder, decoder and discriminator: shapes, ranges, layers."""

    def test_shapes(self):
        for z_dim, part, count in itertools.product((8, 2, 20), PARTS, (5, 1)):
            network = (getattr(self.models, f"Conv{part}", None) or getattr(self.models, part))(z_dim).eval()
            codes = torch.randn(count, z_dim, dtype=next(network.parameters()).dtype)
            right = {"Encoder": (count, z_dim), "Decoder": (count, 1, 28, 28), "Discriminator": (count, 1)}[part]
            try:
                shape = tuple(network(images_like_mnist(count) if part == "Encoder" else codes).shape)
            except (RuntimeError, ValueError) as error:
                if z_dim == 8:
                    raise
                shape = str(error).strip().partition("\n")[0]
            self.check(shape == right or z_dim != 8, f"{part}(8) returns {shape} for {count} inputs, not {right}")
            self.check(shape == right, f"Mistake 40: {part}({z_dim}) does not work, unlike {part}(8) ({shape}): is a "
                                       "size written into the code in place of z_dim?")


class Model(ModelGroup):
    """AdversarialAE: its forward pass, its device and its weights."""

    def test_forward_returns_reconstruction_then_code(self):
        model, x = self.models.AdversarialAE().eval(), images_like_mnist(3)
        self.check(model.z_dim == 8, "AdversarialAE() must have z_dim 8")
        result = model(x)
        shapes = [tuple(getattr(part, "shape", ())) for part in (result if isinstance(result, tuple) else [result])]
        self.check(shapes == [(3, 1, 28, 28), (3, 8)],
                   f"forward(x) must return (recon_x, z), of shapes (3, 1, 28, 28) and (3, 8), and returns {shapes}")
        self.check(torch.allclose(result[0], model.decoder(result[1]), atol=1e-4),
                   "the first result of forward(x) must be self.decoder(z), of the z that is the second")

    def test_device_is_that_of_the_weights(self):
        for name, device in itertools.product(("", "encoder", "discriminator"), ("cpu", "meta")):
            module = self.model(3).get_submodule(name).to(device)
            self.check(torch.device(module.device).type == device,
                       f"`device` of the {name or 'model'} must be the device of its weights")

    def test_19_forward_passes_gradients_to_the_encoder(self):
        model = self.model()
        model(images_like_mnist(2))[0].sum().backward()
        self.check(any(weight.grad is not None or not weight.requires_grad for weight in model.encoder.parameters()),
                   "Mistake 19: forward(x) cuts the encoder off from recon_x: decode z, not z.detach()")


NOT_OF_CODES = "Mistake 7: the adversarial losses must be those of the discriminator's logits for the codes z_fake"


class LossGroup(ModelGroup):
    """Calls the losses of a model whose discriminator is replaced by one whose logit is the first number of a code."""

    LOGITS = [-100.0, -3.0, -0.3, 0.2, 1.5, 3.0, 7.0, 100.0] * 8  # 64, the default batch size
    MARK = 1000.0  # the second number of codes made here, which tells them from prior samples

    def autoencoder(self, logits, *lambda_):
        images = [images_like_mnist(len(logits)).requires_grad_() for _ in range(2)]
        return self.call("get_loss_autoencoder", ("gen_loss", "recon_loss", "ae_loss"), logits, images, lambda_)

    def discriminator(self, logits, model=None):
        names = "loss_real", "loss_fake", "disc_loss", "accuracy"
        seen = self.call("get_loss_discriminator", names, logits, model=model)
        self.check(not seen.fake.all(), "Mistake 5: the discriminator is shown no samples of N(0, I): draw as many as "
                                        "there are codes, with torch.randn")
        return seen

    def call(self, function, names, logits, images=(), lambda_=(), model=None):
        """Return what went into a loss, what came out, and what the discriminator has seen."""
        model, calls, z = model or self.model(8), [], torch.zeros(len(logits), 8, dtype=self.code_type)
        z[:, 0], z[:, 1], z[:, 2] = torch.tensor(logits), self.MARK, torch.arange(len(logits))  # no two are equal
        z.requires_grad_()

        def forward(*args, **kwargs):
            codes = (*args, *kwargs.values())[0]
            rows, shift = codes.detach().flatten(1)[:, :8], torch.zeros_like(codes[:, :1]).requires_grad_()
            known, shifts = map(torch.cat, zip(*calls, strict=True)) if calls else (rows[:0], None)
            if (same := (rows[:, None] == known).all(2)).any(1).all():  # shown again, as for the accuracy
                return codes[:, :1] + shifts[same.int().argmax(1)]
            calls.append((rows, shift))  # the gradient of shift is that of the logits
            return codes[:, :1] + shift

        model.discriminator.forward = forward
        try:
            result = getattr(model, function)(*images, z, *lambda_)
        except (RuntimeError, ValueError) as error:
            self.check("between 0 and 1" not in str(error), "Mistake 8: the loss treats the discriminator's output as "
                       "a probability: return logits (no sigmoid), and use binary_cross_entropy_with_logits")
            raise
        self.check(isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict),
                   f"{function} must return (loss, dict), in that order")
        odd = [name for name in names if getattr(result[1].get(name), "numel", int)() != 1]  # int() is 0
        self.check(not odd, f"{', '.join(odd)} in the dict of {function} must be a scalar tensor")
        if not calls and images and lambda_ in ((), (1.0,)):  # which needs no logits
            calls.append((z.detach(), z[:, :1]))
        if not calls:  # a loss may use the discriminator in another way, and then depends on its weights
            other = getattr(self.model(8), function)(*images, z, *lambda_)[1]
            self.check(any(abs(other[name] - result[1][name]) > 1e-6 for name in names), NOT_OF_CODES)
            self.skipTest(f"{function}, which does not call self.discriminator(z_fake)")
        codes = torch.cat([codes for codes, _ in calls])
        self.check((codes[:, 1:2] > self.MARK / 2).any(), NOT_OF_CODES)
        return Namespace(images=images, z=z, loss=result[0], values={name: result[1][name].detach() for name in names},
                         codes=codes, shifts=[shift for _, shift in calls],
                         logits=codes[:, 0].double(), fake=codes[:, 1] > self.MARK / 2)

    def check_cross_entropy(self, name, label, loss):
        """Check a term of a loss, a function of the codes' logits, at large logits, and against its formula."""
        sign = 1 - 2 * label  # wrong logits have this sign
        lowest = min(loss([logit] * 64).values[name] for logit in (-60.0, 60.0))
        self.check(lowest > -1e-6, f"Mistake 6: {name} is negative ({float(lowest):.4g}), and has no lower bound: use "
                                   f"the cross-entropy with the label {label}, and no minus before it")
        large, larger = (float(loss([sign * logit] * 64).values[name]) for logit in (60.0, 90.0))
        self.check(not (large > 1 and larger - large < 1), f"Mistake 8: a loss saturates ({large:.4g}, {larger:.4g} at "
                   "wrong logits of 60, 90), as log(p + 1e-15) does: use binary_cross_entropy_with_logits")
        seen = loss(self.LOGITS)
        self.check_close(seen.values[name], softplus(sign * seen.logits[seen.fake]).mean(),
                         f"{name} is not the mean cross-entropy of the codes' logits with the label {label}")


class AutoencoderLoss(LossGroup):
    """get_loss_autoencoder, compared with its formulas."""

    def test_recon_loss(self):
        seen = self.autoencoder(self.LOGITS)
        x, recon_x = seen.images
        self.check_close(seen.values["recon_loss"], (x - recon_x).square().mean(),
                         "recon_loss is not the mean squared error over pixels")

    def test_01_encoder_is_trained_to_deceive(self):
        gen = [float(self.autoencoder([logit] * 64, 0.5).values["gen_loss"]) for logit in (-20.0, 20.0)]
        fake = [float(self.discriminator([logit] * 64).values["loss_fake"]) for logit in (-20.0, 20.0)]
        why = "since all labels are swapped" if fake[0] > fake[1] else "which helps the discriminator"
        self.check(gen[0] >= gen[1], f"Mistake 1: gen_loss is {gen[0]:.4g} at logits of -20 and {gen[1]:.4g} at 20, "
                   f"{why}: logits above 0 mean real, and gen_loss is the cross-entropy with the label 1 (real)")
        self.check_cross_entropy("gen_loss", 1, lambda logits: self.autoencoder(logits, 0.5))

    def test_09_lambda_weighs_the_reconstruction(self):
        for given in ([0.995], [0.3], [0.0], [1.0], []):
            seen, lambda_ = self.autoencoder([-3.0] * 64, *given), (given or [1.0])[0]
            recon_loss, gen_loss = seen.values["recon_loss"], seen.values["gen_loss"]
            right, swapped = (weight * recon_loss + (1 - weight) * gen_loss for weight in (lambda_, 1 - lambda_))
            self.check(given != [0.995] or not abs(seen.loss - swapped) < 1e-3, "Mistake 9: lambda_ weighs gen_loss: "
                       "weigh recon_loss by lambda_, and gen_loss by 1 - lambda_")
            self.check_close(seen.loss, right, f"ae_loss is not lambda_ * recon_loss + (1 - lambda_) * gen_loss, with "
                                               f"lambda_ {lambda_}{'' if given else ', its default'}")
            self.check_close(seen.values["ae_loss"], seen.loss, "the dict's ae_loss is not the returned loss")

    def test_19_gradients_are_those_of_the_formula(self):
        for lambda_ in (0.0, 0.3, 1.0):
            seen = self.autoencoder(self.LOGITS, lambda_)
            x, recon_x = seen.images
            (seen.loss + 0 * (recon_x.sum() + seen.z.sum())).backward()
            for name, own, right in (
                    ("recon_x", recon_x.grad, lambda_ * 2 * (recon_x - x) / x.numel()),
                    ("z_fake", seen.z.grad[:, 0], (lambda_ - 1) / 64 * torch.sigmoid(-seen.logits[seen.fake]))):
                self.check_formula(own.any() or not right.any(), f"Mistake 19: get_loss_autoencoder passes no gradient "
                                   f"to {name}: use no detach(), and no torch.no_grad() around the discriminator")
                self.check_formula(torch.allclose(own.double(), right.double(), rtol=1e-3, atol=1e-7),
                                   f"the gradient of ae_loss with respect to {name} is not that of its formula")


class DiscriminatorLoss(LossGroup):
    """get_loss_discriminator, compared with its formulas, and its prior samples."""

    def test_05_real_codes_are_new_samples_of_the_prior(self):
        model = self.model(8)
        calls = [self.discriminator([0.0] * 64, model) for _ in range(16)]
        real = [seen.codes[~seen.fake] for seen in calls]
        self.check(not torch.equal(real[0], real[1]), "Mistake 5: all calls use the same prior samples: draw new ones "
                                                      "in each call")
        if len(real[0]) == 64 and all(torch.equal(seen.codes[seen.fake], seen.z) for seen in calls):  # without noise
            self.check_prior(torch.cat(real), "the real codes")

    def test_loss_fake_loss_real_and_disc_loss(self):
        self.check_cross_entropy("loss_fake", 0, self.discriminator)
        seen = self.discriminator(self.LOGITS)
        loss_real, loss_fake = (seen.values[name].double() for name in ("loss_real", "loss_fake"))
        self.check_close(loss_real, softplus(-seen.logits[~seen.fake]).mean(),
                         "loss_real is not the mean cross-entropy of the prior samples' logits with the label 1")
        both = loss_real + loss_fake
        self.check_close(seen.loss if seen.loss > 0.75 * both else 2 * seen.loss, both,
                         "disc_loss is neither the sum nor the mean of loss_real and loss_fake")
        self.check_close(seen.values["disc_loss"], seen.loss, "the dict's disc_loss is not the returned loss")

    def test_12_accuracy_is_over_both_halves_at_logit_0(self):
        for logits in ([-5.0] * 64, [5.0] * 64, [-5.0] * 16 + [5.0] * 48, [0.3] * 64, [-0.3] * 64):
            seen = self.discriminator(logits)
            right = ((seen.logits[~seen.fake] > 0).double().mean() + (seen.logits[seen.fake] < 0).double().mean()) / 2
            self.check_close(seen.values["accuracy"], right, "Mistake 12: accuracy must be the share of right logits "
                             "in both halves: above 0 for prior samples, below 0 for codes")

    def test_32_gradients_are_those_of_the_formula(self):
        seen = self.discriminator(self.LOGITS)
        (seen.loss + 0 * seen.z.sum()).backward()
        own = torch.cat([torch.zeros_like(shift) if shift.grad is None else shift.grad for shift in seen.shifts])[:, 0]
        right = (torch.sigmoid(seen.logits) - 1.0 * ~seen.fake) / len(seen.z)
        for half, name in ((seen.fake, "loss_fake"), (~seen.fake, "loss_real")):
            self.check(own[half].any(), f"Mistake 32: no gradient of {name} reaches the discriminator: use no detach() "
                                        "on its logits, and no torch.no_grad()")
        self.check_formula(any(torch.allclose(factor * own.double(), right, rtol=1e-3, atol=1e-7) for factor in (1, 2)),
                           "the gradient of disc_loss with respect to the logits is not that of its formula")


class Sampling(LossGroup):
    """sample, and all of the model with any batch size."""

    def test_sample_returns_the_decoders_images_without_gradients(self):
        model = self.model(3)
        calls, images = listen(model.decoder), model.sample(64)
        self.check(images.shape == (64, 1, 28, 28), f"sample(64) returns {tuple(images.shape)}, not (64, 1, 28, 28)")
        self.check(not images.requires_grad, "sample() must not record gradients: use torch.no_grad()")
        self.check(not calls or torch.allclose(torch.cat([output for _, output in calls]), images, atol=1e-4),
                   "sample() changes the decoder's images: return them as they are, in [-1, 1]")

    def test_05_sample_decodes_samples_of_the_prior(self):
        model = self.model(8)
        calls, _ = listen(model.decoder), [model.sample(64) for _ in range(16)]
        if not calls:
            self.skipTest("sample(), which does not call self.decoder(z)")
        self.check(not torch.equal(calls[0][0], calls[1][0]) or not calls[0][0].std(), "Mistake 27: all calls of "
                   "sample() decode the same codes: call torch.manual_seed once, at the beginning of main")
        self.check_prior(torch.cat([z for z, _ in calls]), "sample()'s codes")

    def test_15_any_batch_size(self):
        for count in (64, 5, 1, 33):
            model = self.model()
            try:
                counts = [len(model(images_like_mnist(count))[0]), len(model.sample(count)),
                          int(self.autoencoder([0.0] * count, 0.5).fake.sum()),
                          int((~self.discriminator([0.0] * count).fake).sum())]
            except (RuntimeError, ValueError) as error:
                if count == 64:  # the default: another fault
                    raise
                counts = error
            self.check(counts == [count] * 4, "Mistake 15: a batch size is written into models.py, or squeeze() drops "
                       f"one of 1: {count} images give {counts} reconstructions, samples, codes and prior samples")


def load_groups():
    """Add the groups of those files in tests/ that have any."""
    sys.modules["unittests"] = sys.modules[__name__]  # tests/ import this module, not a second copy
    names = "" if "training" in sys.modules else ("model_", "train_")  # for whoever has copied the whole folder
    for file in sorted((HERE / "tests").glob("*.py")):
        if file.name.startswith(names) and b"__unittest = True" in file.read_bytes():
            sys.modules.setdefault("tests", type(sys)("tests")).__path__ = [str(HERE / "tests")]  # whoever has the name
            module = importlib.import_module(f"tests.{file.stem}")
            globals().update({name: group for name, group in vars(module).items() if is_group(group)})


def is_group(value):
    return isinstance(value, type) and issubclass(value, Group)


def load_tests(*_):
    """Return all tests in the order in which they are written, main after train_aae; unittest calls this."""
    groups = dict.fromkeys(filter(is_group, globals().values()))
    ordered = sorted(groups, key=lambda group: group.__module__ == "tests.train_main")
    return unittest.TestSuite(group(name) for group in ordered for name in vars(group) if name.startswith("test"))


def finish(result, file):
    """Say what was not checked, in a line for each reason, and write the result to a file if one is named."""
    reasons, skipped = {}, dict.fromkeys(words for _, words in result.skipped if words != StudentGroup.TOLD)
    for what, _, why in (words.partition(": ") for words in skipped):
        reasons.setdefault(why, []).append(what)
    if (HERE / "train.py").is_file() and "TrainStep" not in globals():
        reasons["copy the folder tests/ here"] = ["train.py"]
    for why, what in reasons.items():
        print(f"not checked: {', '.join(what)}{f' ({why})' * bool(why)}", file=sys.__stderr__)
    if file:
        failures = [[str(test), text] for test, text in (*result.failures, *result.errors)]
        content = {"ran": result.testsRun, "failures": failures, "skipped": [*skipped]}
        Path(file).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs may ignore it
    report = None
    if sys.argv[1:2] == ["--report"]:  # for a program that runs several of this one
        _, report = sys.argv.pop(1), sys.argv.pop(1)
        torch.set_num_threads(1)
    load_groups()
    if len(sys.argv) == 1 and "tests.parallel" in sys.modules:
        sys.exit(sys.modules["tests.parallel"].main())
    result = unittest.main(exit=False).result
    finish(result, report)
    with contextlib.suppress(Exception):  # whatever the code under test has put there
        sys.stdout.flush()
    os._exit(not result.wasSuccessful())  # ends threads that the code under test has started, too
