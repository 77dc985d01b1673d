"""The pictures of an epoch."""

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from tests.common import TinyAAE, TrainGroup, read_events, read_png, same, snapshot
from training.random_state import random_states
from unittests import images_like_mnist

__unittest = True


class Pictures(TrainGroup):
    """generate_and_save and save_reconstruction: their files, and that nothing else changes."""

    def picture_model(self):
        """Return an AdversarialAE with BatchNorm and Dropout in its decoder, in training mode."""
        model = self.models.AdversarialAE(z_dim=3)
        model.decoder = nn.Sequential(model.decoder, nn.BatchNorm2d(1), nn.Dropout(0.5), nn.Tanh())
        return model.train()

    def test_tensorboard_has_the_picture_that_is_saved(self):
        writer = self.writer()
        self.train.generate_and_save(TinyAAE(), 7, writer, batch_size=5)
        writer.flush()
        event, = read_events(writer.log_dir).Images("samples")
        self.assertEqual(event.step, 7)
        pixels = read_png(Path(writer.log_dir) / "results" / "Prior_samples" / "samples_epoch_7.png")
        self.assertTrue(np.array_equal(read_png(io.BytesIO(event.encoded_image_string)), pixels))

    def test_samples_are_8_per_row_with_the_same_codes_each_time(self):
        writer, model = self.writer(), self.models.AdversarialAE()
        pictures = []
        for epoch in range(2):
            self.train.generate_and_save(model, epoch, writer)
            pictures.append(read_png(Path(writer.log_dir) / f"results/Prior_samples/samples_epoch_{epoch}.png"))
            torch.rand(1)  # as training would
        self.assertEqual(pictures[0].shape, (8 * 30 + 2, 8 * 30 + 2))
        self.assertTrue(np.array_equal(*pictures))

    def test_reconstructions_are_below_their_inputs(self):
        writer, x = self.writer(), images_like_mnist(20)
        for count, given in ((8, {}), (10, {"count": 10})):
            self.train.save_reconstruction(TinyAAE(), count, writer, x, **given)
            pixels = read_png(Path(writer.log_dir) / "results" / "Reconstruction" / f"reconstruction_{count}.png")
            self.assertEqual(pixels.shape, (2 * 30 + 2, count * 30 + 2))
            for i in (0, count - 1):
                for row, images in enumerate((x, 0.9 * 0.7 * x)):
                    tile = pixels[2 + 30 * row:30 + 30 * row, 2 + 30 * i:30 + 30 * i]
                    expected = (images[i, 0].numpy() + 1) * 127.5
                    self.assertLessEqual(np.abs(tile - expected).max(), 1)

    def test_fewer_inputs_than_columns(self):
        writer = self.writer()
        self.train.save_reconstruction(TinyAAE(), 1, writer, images_like_mnist(3))
        pixels = read_png(Path(writer.log_dir) / "results" / "Reconstruction" / "reconstruction_1.png")
        self.assertEqual(pixels.shape, (62, 92))

    def test_11_pictures_change_nothing(self):
        model, writer, x = self.picture_model(), self.writer(), images_like_mnist(8)
        model.decoder[2].eval()
        before, streams = snapshot(model), random_states(model)
        self.train.generate_and_save(model, 0, writer)
        self.train.save_reconstruction(model, 0, writer, x)
        after = snapshot(model)
        self.check(same(before[0], after[0]), "Mistake 11: saving pictures changes the model's weights or statistics")
        self.check(before[1] == after[1], "Mistake 11: saving pictures changes the model's modes")
        self.check(same(streams, random_states(model)), "saving pictures changes a random state")

    def test_careless_sample_does_not_change_the_global_generator(self):
        model, stream = TinyAAE(), torch.get_rng_state()
        self.train.generate_and_save(model, 0, self.writer())
        self.assertTrue(torch.equal(stream, torch.get_rng_state()))
