"""Tests of how models.py is built: what its layers can compute, and where its weights and tensors are.

This file needs only unittests.py: copy it to a folder tests/ next to unittests.py and your models.py.
"""

import ast
import inspect
import itertools
import re

import torch
from torch import nn

from unittests import PARTS, ModelGroup, images_like_mnist

__unittest = True


def shaken(network, size=0.02):
    """Move all weights at random, since some may begin at 0, and return the network."""
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn_like(weight) * size)
    return network


class Layers(ModelGroup):
    """Encoder, decoder and discriminator with weights at random."""

    def networks(self):
        """Return the networks of a new model by name, each with a function that makes inputs for it."""
        model = self.model(8)
        return [(part, getattr(model, part.lower()), images_like_mnist if part == "Encoder" else
                 lambda count: torch.randn(count, 8, dtype=self.code_type)) for part in PARTS]


    def test_decoder_stays_in_range(self):
        _, (_, decoder, codes), _ = self.networks()
        largest = decoder(50 * codes(5)).detach().abs().max()
        self.check(largest <= 1, f"the decoder's pixels reach {largest:.3g}: end it in tanh, and change nothing after "
                                 "it, so that they stay in [-1, 1]")

    def check_reach(self, which, value, words):
        """Check that over weights and inputs of several sizes, outputs get below -value and above value."""
        low = high = 0.0
        for size, _ in itertools.product((0.02, 1, 5, 25), range(5)):
            _, network, inputs = self.networks()[which]
            with torch.no_grad():
                outputs = torch.cat([shaken(network, size)(scale * inputs(32)) for scale in (1, 30, 1000)])
            outputs = outputs[outputs.isfinite()]
            low, high = min(low, float(outputs.min())), max(high, float(outputs.max()))
            if low < -value and value < high:
                return
        self.check(False, f"{words} (here its outputs lie between {low:.2f} and {high:.2f})")

    def test_20_codes_can_be_any_numbers(self):
        self.check_reach(0, 1.2, "Mistake 20: the encoder cannot make every code: end it in a linear layer, with no "
                                 "activation after it")
        for _ in range(3):  # a right encoder hardly looks like a normalized one, and not three times
            _, encoder, images = self.networks()[0]
            codes = torch.cat([encoder(scale * images(32)) for scale in (1, 30, 300)])
            codes = codes[codes.isfinite().all(1)]
            if not codes.norm(dim=1).std() < 0.02 * (codes - codes.mean(0)).norm(dim=1).mean():
                return
        self.check(False, "Mistake 20: all codes have the same length, unlike samples of N(0, I): remove the "
                          "normalization at the encoder's end")

    def test_20_pixels_can_be_dark_and_bright(self):
        self.check_reach(1, 0.5, "Mistake 20: the decoder cannot make every pixel from -1 to 1: end it in tanh, with "
                                 "no ReLU or sigmoid before it or after it")

    def test_08_discriminator_returns_logits(self):
        _, discriminator, codes = self.networks()[2]
        calls, logits = layer_calls(discriminator), discriminator(200 * codes(256)).flatten()
        last = calls[-1][2].flatten() if calls else logits[:0]
        if len(last) == 256 and last.std() > 1e-6 and (logits[last.argsort()].diff() >= 0).all():  # determines them
            self.check(torch.stack([last, logits]).double().corrcoef()[0, 1] > 0.99999, "Mistake 8: the "
                       "discriminator has an activation after its last linear layer, such as a sigmoid: remove it")
        self.check_reach(2, 1.2, "Mistake 8: the discriminator's outputs cannot be any number, as logits can: end it "
                                 "in a linear layer")

    def test_10_an_activation_between_layers(self):
        for part, network, inputs in self.networks():
            for kinds, enough, layers in (((nn.Linear,), any, "linear layers"),
                                          ((nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d), all, "convolutions")):
                calls, given = layer_calls(network, kinds), 50 * inputs(8)
                network(torch.cat([given, -given]))
                bare = [torch.equal(one.flatten(), other.flatten()) and one.min() < -0.1 and one.max() > 0.1  # no ReLU
                        for (_, _, one), (_, other, _) in itertools.pairwise(calls)]
                several = len([layer for layer, *_ in calls if not isinstance(layer, nn.BatchNorm2d)]) > 1
                self.check(not several or not enough(bare), f"Mistake 10: the {part.lower()} has no activation between "
                                                         f"two {layers} in a row: put one there")

    def test_35_images_of_a_batch_stay_apart(self):
        for part, network, inputs in self.networks():
            given = inputs(5).requires_grad_()
            (shaken(network)(given)[0].sum() + 0 * given.sum()).backward()
            self.check(given.grad[1:].norm() <= given.grad[:1].norm(), f"Mistake 35: the {part.lower()} mixes the "
                       "images of a batch: keep the batch as first dimension, as x.view(x.shape[0], -1) does")


def layer_calls(network, kinds=nn.Linear):
    """Return a list that collects (layer, copy of its input, copy of its output) of each call of a layer."""
    calls = []
    for module in (module for module in network.modules() if isinstance(module, kinds)):
        module.register_forward_hook(lambda module, args, output: calls.append(
            (module, args[0].detach().clone(), output.detach().clone())))
    return calls


class Placement(ModelGroup):
    """Weights and tensors: of the model, and on its device."""

    def test_34_all_weights_belong_to_the_model(self):
        model, other, x, made, passes = self.model(), self.model(), images_like_mnist(3), [], []
        other.load_state_dict(model.state_dict())
        hook = nn.modules.module.register_module_parameter_registration_hook(lambda *args: made.append(args) and None)
        for network in (model, model, other):
            torch.manual_seed(1)  # an encoder may add noise
            passes.append(torch.cat([output.flatten() for output in network(x)]))
        hook.remove()
        repeated, loaded = torch.equal(passes[0], passes[1]), torch.allclose(passes[0], passes[2], atol=1e-4)
        self.check(not made and (loaded or not repeated), "Mistake 34: the model has weights that are not in "
                   "model.parameters(), so nobody trains or saves them: make layers in __init__, and keep a list of "
                   "them in nn.ModuleList")

    def test_36_tensors_are_made_on_the_models_device(self):
        model, x, fault = self.model().to("meta"), images_like_mnist(64).to("meta"), ""  # shapes without numbers
        try:
            model.get_loss_discriminator(model(x)[1])
            model.sample(3)
        except RuntimeError as error:
            fault = str(error)
        chosen = "cuda" in ast.dump(ast.parse(inspect.getsource(self.models)))  # by models.py itself
        self.check(chosen or not re.search("cpu.*meta|meta.*cpu", fault), "Mistake 36: a tensor is made on the CPU, "
                   f"whatever the model's device: make it with device=self.device; a GPU would say: {fault}")
