"""Mistakes in train.py outside train_aae: in main, and in drawing samples and saving pictures.

This file needs only unittests.py. Copy it to a folder tests/ next to unittests.py and your models.py, train.py,
mnist.py and utils.py:  python unittests.py TrainMistakes
"""

import contextlib
import importlib
import sys
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from unittests import MistakesGroup, loader_like_mnist

__unittest = True


def read_png(file):
    """Return the red channel of a picture, [H, W]."""
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))[:, :, 0].astype(int)


class TrainMistakes(MistakesGroup):
    """Mistakes in main, generate_and_save and save_reconstruction, numbered as in the documentation."""

    def run_main(self, words, train_aae, generate_and_save=None):
        """Run train.py's main on made-up images, with mock functions that may raise SystemExit."""
        folder = f"{self.folder()}/"
        with self.attempt(words), contextlib.ExitStack() as stack:
            train, mnist = importlib.import_module("train"), importlib.import_module("mnist")
            for original, stand_in in ((mnist.mnist, lambda *_, **__: loader_like_mnist()),
                                       (train.train_aae, train_aae),
                                       (train.generate_and_save, generate_and_save or mock.Mock()),
                                       (train.save_reconstruction, mock.Mock())):
                for module in list(sys.modules.values()):  # wherever it has been imported
                    for name in [name for name, value in getattr(module, "__dict__", {}).items() if value is original]:
                        stack.enter_context(mock.patch.object(module, name, stand_in))
            with contextlib.suppress(SystemExit):
                train.main(Namespace(z_dim=3, batch_size=64, lambda_=0.9, ae_lr=1e-3, d_lr=5e-3, data_dir=folder,
                                     epochs=1, seed=1, num_workers=0, log_dir=folder, no_cuda=True))

    def stand_in_writer(self):
        folder = self.folder()
        for name in ("Prior_samples", "Reconstruction"):
            (folder / "results" / name).mkdir(parents=True)
        return mock.MagicMock(log_dir=str(folder))

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

    def modes_in_generate_and_save(self, words):
        """Return the value of decoder.training at each call of the decoder in generate_and_save."""
        modes, model = [], self.models.AdversarialAE(z_dim=4).train()
        model.decoder.register_forward_pre_hook(lambda module, args: modes.append(module.training))
        with self.attempt(words):
            importlib.import_module("train").generate_and_save(model, 1, self.stand_in_writer())
        return modes

    def modes_in_main(self, words):
        """Return the value of decoder.training at each call of generate_and_save in main."""
        modes = []
        self.run_main(words, lambda epoch, model, *_, **__: model.train(),
                      lambda model, *_, **__: modes.append(model.decoder.training))
        return modes

    def test_11_samples_are_drawn_in_evaluation_mode(self):
        if not self.sample_leaves_the_mode_to_its_caller():
            return
        words = "Mistake 11: sample() does not call eval(), so its caller must, and train() afterwards"
        modes = self.modes_in_generate_and_save(words)
        if any(modes):
            modes = self.modes_in_main(words)
        if not modes:
            self.skip(words, "generate_and_save draws no samples, or main does not call it")
        self.check(not any(modes), "Mistake 11: samples are drawn in training mode, in which BatchNorm mixes a batch's "
                                   "images and updates its statistics: call model.eval() before, train() afterwards")

    def test_13_pictures_are_rescaled(self):
        levels = torch.linspace(-1, 1, 7).repeat_interleave(4).view(28, 1).expand(8, 1, 28, 28)
        for name, argument in (("generate_and_save", 8), ("save_reconstruction", levels)):
            model, writer = self.models.AdversarialAE(z_dim=4), self.stand_in_writer()
            model.sample = lambda *_, **__: levels
            model.decoder.register_forward_hook(lambda module, args, images: levels[:1].expand(images.shape))
            with self.attempt("Mistake 13"):
                getattr(importlib.import_module("train"), name)(model, 7, writer, argument)
                pixels = read_png(next(Path(writer.log_dir, "results").rglob("*.png")))
            values, counts = np.unique(pixels, return_counts=True)
            shown = values[counts > 100]
            self.check(all(np.abs(shown - level).min() < 2 for level in np.linspace(0, 255, 7)),
                       f"Mistake 13: {name} saves seven levels from -1 to 1 as {shown.tolist()}, not as seven from 0 "
                       "to 255: rescale images from [-1, 1] before saving, or the dark half is clipped")
