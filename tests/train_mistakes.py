"""Mistakes in train.py outside train_aae: in main, and in drawing samples and saving pictures.

This file needs only unittests.py. Copy it to a folder tests/ next to unittests.py and your models.py, train.py,
mnist.py and utils.py:  python unittests.py TrainMistakes
"""

import contextlib
import importlib
import sys
from argparse import Namespace
from unittest import mock

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from unittests import MistakesGroup, images_like_mnist, listen

__unittest = True


def read_png(file):
    """Return the red channel of a picture, [H, W]."""
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))[:, :, 0].astype(int)


class TrainMistakes(MistakesGroup):
    """Mistakes in main, generate_and_save and save_reconstruction, numbered as in the documentation."""

    def run_main(self, words, train_aae, generate_and_save=None):
        """Run train.py's main on made-up images until it calls train_aae, or to its end if that returns."""
        called, folder = [], f"{self.folder()}/"

        def stand_in(*args, **kwargs):
            called.append(True)
            return train_aae(*args, **kwargs)

        def call(train):
            loader = DataLoader(TensorDataset(images_like_mnist(66), torch.arange(66) % 10), batch_size=64)
            mnist, stack = importlib.import_module("mnist"), contextlib.ExitStack()
            stand_ins = {id(train.train_aae): stand_in, id(mnist.mnist): lambda *_, **__: loader}
            for name, other in (("generate_and_save", generate_and_save), ("save_reconstruction", None)):
                if hasattr(train, name):
                    stand_ins[id(getattr(train, name))] = other or mock.Mock()
            for module in list(sys.modules.values()):  # wherever a function has been imported
                for name, value in list(getattr(module, "__dict__", {}).items()):
                    if id(value) in stand_ins:
                        stack.enter_context(mock.patch.object(module, name, stand_ins[id(value)]))
            with stack:
                try:
                    train.main(Namespace(z_dim=3, batch_size=64, lambda_=0.9, ae_lr=1e-3, d_lr=5e-3, data_dir=folder,
                                         epochs=1, seed=1, num_workers=0, log_dir=folder, no_cuda=True))
                except (Exception, SystemExit):
                    if not called:  # what comes later may need what the stand-ins do not do
                        raise

        self.attempt(words, call)

    def pictures(self, words, function, model, argument):
        """Call generate_and_save or save_reconstruction; return the pictures that it saves, [H, W] each."""
        def call(train):
            from torch.utils.tensorboard import SummaryWriter

            for name in ("Prior_samples", "Reconstruction"):
                (folder / "results" / name).mkdir(parents=True)
            with SummaryWriter(folder) as writer:
                getattr(train, function)(model, 7, writer, argument)
            return [read_png(file) for file in folder.rglob("*.png")]

        folder = self.folder()
        return self.attempt(words, call)

    def test_02_each_optimizer_has_its_own_parameters(self):
        held, learning = [], []  # parameters of each player's optimizer, and of its networks

        def train_aae(epoch, model, train_loader, logger_ae, logger_disc, optimizer_ae, optimizer_disc, *_, **__):
            held.extend({id(weight) for group in optimizer.param_groups for weight in group["params"]}
                        for optimizer in (optimizer_ae, optimizer_disc))
            learning.extend({id(weight) for network in networks for weight in network.parameters()
                             if weight.requires_grad}
                            for networks in ((model.encoder, model.decoder), (model.discriminator,)))
            raise SystemExit

        self.run_main("Mistake 2", train_aae)
        if not learning:
            self.skip("Mistake 2", "main does not call train_aae")
        for i, player, networks in ((0, "autoencoder", "encoder and decoder"),
                                    (1, "discriminator", "the discriminator")):
            self.check(learning[i] <= held[i] and not learning[1 - i] & held[i],
                       f"Mistake 2: the {player}'s optimizer must have the parameters of {networks}, and no others")

    def test_11_samples_are_drawn_in_evaluation_mode(self):
        model = self.model().train()
        calls, images = listen(model.decoder), model.sample(8)
        alone = torch.cat([model.eval().decoder(z[None]) for z in torch.cat([codes for codes, _ in calls])])
        if torch.allclose(alone, images, atol=1e-4):
            return
        words = "Mistake 11: sample() does not call eval(), so its caller must, and train() afterwards"
        modes, model = [], self.model().train()
        model.decoder.register_forward_pre_hook(lambda module, args: modes.append(module.training))
        self.pictures(words, "generate_and_save", model, 8)
        if any(modes):  # main may call eval()
            modes.clear()
            self.run_main(words, lambda epoch, model, *_, **__: model.train(),
                          lambda model, *_, **__: modes.append(model.decoder.training))
        if not modes:
            self.skip(words, "generate_and_save draws no samples, or main does not call it")
        self.check(not any(modes), "Mistake 11: samples are drawn in training mode, in which BatchNorm mixes a batch's "
                                   "images and updates its statistics: call model.eval() before, train() afterwards")

    def test_13_pictures_are_rescaled(self):
        levels = torch.linspace(-1, 1, 7).repeat_interleave(4).view(28, 1).expand(8, 1, 28, 28)
        for name, argument in (("generate_and_save", 8), ("save_reconstruction", levels)):
            model = self.model()
            model.sample = lambda *_, **__: levels
            model.decoder.register_forward_hook(lambda module, args, images: levels[:1].expand(images.shape))
            pictures = self.pictures("Mistake 13", name, model, argument)
            if not pictures:
                self.skip("Mistake 13", f"{name} saves no picture in the run's folder")
            values, counts = np.unique(pictures[0], return_counts=True)
            shown = values[counts > 100]
            self.check(all(np.abs(shown - level).min() < 2 for level in np.linspace(0, 255, 7)),
                       f"Mistake 13: {name} saves seven levels from -1 to 1 as {shown.tolist()}, not as seven from 0 "
                       "to 255: rescale images from [-1, 1] before saving, or the dark half is clipped")
