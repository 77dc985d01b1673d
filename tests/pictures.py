"""The pictures of an epoch."""

import io
import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from tests.common import TinyAAE, TrainGroup, read_events, read_png, snapshot
from unittests import images_like_mnist

__unittest = True


class Pictures(TrainGroup):
    """generate_and_save and save_reconstruction: their files, and that nothing else changes."""

    def setUp(self):
        super().setUp()
        self.summaries = self.writer()

    def picture(self, name):
        return read_png(Path(self.summaries.log_dir) / "results" / name)

    def test_samples_are_8_per_row_with_the_same_codes_each_time_also_in_tensorboard(self):
        model = self.models.AdversarialAE()
        for epoch in range(2):
            self.train.generate_and_save(model, epoch, self.summaries)
            torch.rand(1)  # as training would
        first, second = (self.picture(f"Prior_samples/samples_epoch_{epoch}.png") for epoch in range(2))
        self.assertEqual(first.shape, (8 * 30 + 2, 8 * 30 + 2))
        self.assertTrue(np.array_equal(first, second))
        self.summaries.flush()
        events = read_events(self.summaries.log_dir).Images("samples")
        self.assertEqual([event.step for event in events], [0, 1])
        self.assertTrue(np.array_equal(read_png(io.BytesIO(events[1].encoded_image_string)), second))

    def test_reconstructions_are_below_their_inputs(self):
        x = images_like_mnist(20)
        for count, data, given in ((8, x, {}), (10, x, {"count": 10}), (3, x[:3], {})):
            self.train.save_reconstruction(TinyAAE(), count, self.summaries, data, **given)
            pixels = self.picture(f"Reconstruction/reconstruction_{count}.png")
            self.assertEqual(pixels.shape, (2 * 30 + 2, count * 30 + 2))
            for i, (row, images) in itertools.product((0, count - 1), enumerate((x, 0.9 * 0.7 * x))):
                tile = pixels[2 + 30 * row:30 + 30 * row, 2 + 30 * i:30 + 30 * i]
                self.assertLessEqual(np.abs(tile - (images[i, 0].numpy() + 1) * 127.5).max(), 1)

    def test_11_pictures_change_nothing(self):
        ours, x = self.models.AdversarialAE(z_dim=3).train(), images_like_mnist(8)
        ours.decoder = nn.Sequential(ours.decoder, nn.BatchNorm2d(1), nn.Dropout(0.5).eval(), nn.Tanh())
        for model in (ours, TinyAAE()):  # which samples from torch's global generator
            before = snapshot(model)
            self.train.generate_and_save(model, 0, self.summaries)
            self.train.save_reconstruction(model, 0, self.summaries, x)
            after = snapshot(model)
            changed = [name for name in before if not torch.equal(before[name], after[name])]
            self.check(not changed, f"Mistake 11: saving pictures changes {changed}")
