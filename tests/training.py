"""The training step, the moving average of the weights, pictures, the logger, and the model beyond its interface."""

import copy
import io
import itertools
import math
from argparse import Namespace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn

from tests.common import TrainGroup, read_events, same, snapshot
from tests.train_run import read_png
from training.run import load_state
from unittests import images_like_mnist

__unittest = True


class Training(TrainGroup):
    """Beyond what the tests for students ask: train_aae and what it trains, pictures, means, posteriors."""

    needs = (*TrainGroup.needs, "utils")

    def test_each_player_follows_its_own_gradient_even_with_a_careless_model(self):
        def players(aae):
            return [*aae.encoder.parameters(), *aae.decoder.parameters()], [*aae.discriminator.parameters()]

        model, rates = self.models.AdversarialAE(networks="base"), (0.5, 2.0)
        expected = copy.deepcopy(model)
        for aae in (model, expected):  # detaches no codes
            aae.get_loss_discriminator = lambda z, network=aae.discriminator: (network(z).exp().mean() / 4, {})
        optimizers = [torch.optim.SGD(player, rate) for player, rate in zip(players(model), rates, strict=True)]
        batches = [(images_like_mnist(count), None) for count in (6, 2)]
        self.train.train_aae(1, model, batches, mock.Mock(), mock.Mock(), *optimizers, 0.4)
        for x, _ in batches:
            recon_x, z = expected(x)
            losses = expected.get_loss_autoencoder(x, recon_x, z, 0.4)[0], expected.get_loss_discriminator(z)[0]
            slopes = [torch.autograd.grad(loss, player, retain_graph=True)
                      for loss, player in zip(losses, players(expected), strict=True)]
            for player, slope, rate in zip(players(expected), slopes, rates, strict=True):
                with torch.no_grad():
                    torch._foreach_sub_(player, slope, alpha=rate)
        torch.testing.assert_close(model.state_dict(), expected.state_dict())

    def test_average_agrees_with_the_formula(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
        model[2].weight = model[0].weight  # a shared weight, averaged once per step
        average = self.train.EMA(model, 0.5)
        expected = {name: tensor.double() for name, tensor in model.state_dict().items()}
        for step in range(1, 12):
            with torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    tensor.add_(torch.rand_like(tensor) if tensor.is_floating_point() else 1)
            average.update()
            decay = min(0.5, (1 + step) / (10 + step))  # 0.5 from step 8 on
            for name, tensor in model.state_dict().items():
                expected[name] = decay * expected[name] + (1 - decay) * tensor
        expected["1.num_batches_tracked"] = torch.tensor(11)  # a counter, not averaged
        torch.testing.assert_close(average.state_dict()["weights"], expected, check_dtype=False)

    def test_bf16_differs_only_by_rounding(self):
        with mock.patch("training.device.check_bf16"):  # rejects it on most CPUs
            runs = [self.train_quietly("--epochs", "1", "--precision", precision) for precision in ("fp32", "bf16")]
        losses = [load_state(run)["run"]["means"] for run, _ in runs]
        for values in losses:
            del values["accuracy"]  # logits near 0 may flip
        torch.testing.assert_close(*losses, rtol=0, atol=0.02)
        self.assertNotEqual(*(values["ae_loss"] for values in losses))
        self.assertNotIn(torch.bfloat16, {weight.dtype for _, weights in runs for weight in weights.values()})

    def test_other_peoples_models_are_trained(self):
        class Student(self.models.AdversarialAE):
            device = "cpu"

            def __init__(self, z_dim=8):
                super().__init__(z_dim, networks="base")
                self.decoder.net[5] = self.encoder.net[6]  # shared weights

            def get_loss_autoencoder(self, x, recon_x, z_fake, lambda_=1):
                loss, values = super().get_loss_autoencoder(x, recon_x, z_fake, lambda_)
                return loss, {**values, "errors": recon_x - x}

        with mock.patch("training.model.AdversarialAE", Student):
            run, _ = self.train_quietly("--epochs", "1")
            self.assert_refused(self.run_digits("--base"), 2, "accepts z_dim only", "omit --base")
        state = load_state(run)
        self.assertEqual({float(weight["step"]) for weight in state["optimizer_ae"]["state"].values()}, {2.0})
        self.assertEqual(state["run"]["means"].keys() - {"gen_loss", "recon_loss", "ae_loss"},
                         {"disc_loss", "loss_real", "loss_fake", "accuracy"})
        lazy = self.models.AdversarialAE(networks="base")
        lazy.encoder.net[-1] = nn.LazyLinear(8)
        with mock.patch("training.model.AdversarialAE", return_value=lazy):
            model, *_ = self.parts()
        self.assertEqual(model.encoder.net[-1].weight.shape, (8, 1024))

    def test_recommended_optimizers_and_a_clipped_gradient_of_the_discriminator(self):
        model, *optimizers = self.parts()
        self.assertEqual([type(optimizer) for optimizer in optimizers], [torch.optim.Adam, torch.optim.SGD])
        adam, sgd = (optimizer.defaults for optimizer in optimizers)
        self.assertEqual((adam["lr"], adam["betas"][0], sgd["lr"], sgd["momentum"]), (1e-3, 0.5, 5e-3, 0.95))
        nn.init.constant_(model.discriminator.net[-1].weight, 10.0)
        before = nn.utils.parameters_to_vector(model.discriminator.parameters()).clone()
        self.train.train_step(model, *optimizers, 0.995, images_like_mnist(16))
        moved = (nn.utils.parameters_to_vector(model.discriminator.parameters()) - before).norm()
        self.check_close(moved, 5e-3 * self.train.MAX_GRAD_NORM, "a large gradient is not clipped", 1e-4)
        for drop_after, epoch, expected in ((10, 10, 1e-3), (10, 11, 1e-4), (0, 1000, 1e-3)):
            self.train.set_learning_rate(optimizers[0], epoch, Namespace(ae_lr=1e-3, drop_after=drop_after))
            self.assertEqual(optimizers[0].param_groups[0]["lr"], expected, (epoch, drop_after))

    def test_pictures_have_the_same_samples_each_time_and_inputs_above_reconstructions_and_change_nothing(self):
        model, writer, x = self.models.AdversarialAE(z_dim=3).train(), self.writer(), images_like_mnist(20)
        model.decoder = nn.Sequential(nn.Linear(3, 784), nn.Unflatten(1, (1, 28, 28)), nn.BatchNorm2d(1),
                                      nn.Dropout(0.5).eval(), nn.Tanh())
        recon_x, _ = copy.deepcopy(model).eval().requires_grad_(False)(x)
        results = Path(writer.log_dir) / "results"
        for epoch, (images, given, columns) in enumerate(((x, {}, 8), (x, {"count": 10}, 10), (x[:3], {}, 3))):
            before = snapshot(model)
            self.train.generate_and_save(model, epoch, writer, batch_size=11)
            self.train.save_reconstruction(model, epoch, writer, images, **given)
            self.check(same(snapshot(model), before), "saving pictures changes the model or the random state")
            torch.rand(1)  # as training would
            pixels = read_png(results / f"Reconstruction/reconstruction_{epoch}.png")
            self.assertEqual(pixels.shape, (2 * 30 + 2, columns * 30 + 2))
            tiles = pixels[2:, 2:].reshape(2, 30, columns, 30)[:, :28, :, :28].swapaxes(1, 2)
            for row, expected in zip(tiles, (images, recon_x), strict=True):
                np.testing.assert_allclose(row, (expected[:columns, 0] + 1) * 127.5, atol=1)
        writer.flush()
        shown = [io.BytesIO(event.encoded_image_string) for event in read_events(writer.log_dir).Images("samples")]
        first, *others = map(read_png, (*results.glob("Prior_samples/*"), *shown))
        self.assertEqual((first.shape, len(others)), ((2 * 30 + 2, 8 * 30 + 2), 5))
        self.check(all(np.array_equal(first, other) for other in others), "the samples are not the same")

    def test_means_of_windows_and_of_epochs(self):
        writer, epochs, overwritten = mock.Mock(), [], torch.zeros(())  # as by a replayed CUDA graph
        logger = self.utils.TensorBoardLogger(writer, avg_window=4, name="part")
        values, integers = np.random.default_rng(0).normal(size=10), np.arange(10)
        for i, value in enumerate(values):
            step = {"tensor": torch.tensor([value], requires_grad=True), "overwritten": overwritten.fill_(value),
                    "number": float(value), "truth": True, "count": torch.tensor(i) if i % 2 else np.int64(i)}
            logger.add_values(step if i % 2 else {**step, "seldom": 2.0})
            if i in (4, 9):
                epochs.append(logger.end_epoch())
        latest = logger.latest
        logger.flush()
        logger.flush()
        self.assertEqual(logger.global_step, 10)
        logged = [call.args for call in writer.add_scalar.call_args_list]
        for tag, series in {"tensor": values, "overwritten": values, "number": values, "count": integers,
                            "truth": np.ones(10), "seldom": np.full(10, 2)}.items():
            means = [(end, series[start:end].mean()) for start, end in ((0, 4), (4, 8), (8, 10))]
            points = [(step, value) for name, value, step in logged if name == f"part/{tag}"]
            np.testing.assert_allclose(points, means, rtol=1e-6, err_msg=tag)
            np.testing.assert_allclose(latest[tag], means[1][1], rtol=1e-6, err_msg=tag)
            np.testing.assert_allclose([epoch[tag] for epoch in epochs], [series[:5].mean(), series[5:].mean()], 1e-6)

    def test_sampling_follows_the_seed_and_changes_nothing_else(self):
        model = self.models.AdversarialAE().train()
        model.decoder = nn.Sequential(model.decoder, nn.BatchNorm2d(1), nn.Dropout(0.5).eval())  # mixed modes
        torch.manual_seed(0)
        before, images = snapshot(model), []
        for seed, default_device in ((5, "cpu"), (5, "meta"), (6, "cpu")):  # torch's default must not matter
            torch.manual_seed(seed)
            with torch.device(default_device):
                images.append(model.sample(8))
            torch.manual_seed(0)
            self.assertTrue(same(snapshot(model), before), "sampling changes the model")
        torch.testing.assert_close(images[0], images[1], rtol=0, atol=0)
        self.assertFalse(torch.equal(*images[1:]))

    def test_suggested_networks(self):
        model = self.models.AdversarialAE(z_dim=8, networks="base")
        self.assertEqual([sum(weight.numel() for weight in part.parameters()) for part in model.children()],
                         [110120, 111073, 267777], "the layers are not those of the assignment")
        self.check_close(model.sample(16).mean(), -0.74, "from a start brighter than MNIST's mean pixel, the first "
                         "steps drive the decoder's tanh to -1 everywhere, with every fourth seed", 0.1)

    def test_every_posterior_has_the_interface_in_every_number_type_and_its_encoder_is_exported(self):
        x = images_like_mnist(5)
        for posterior, networks in itertools.product(self.models.ENCODERS, self.models.NETWORKS):
            torch.manual_seed(0)
            model = self.models.AdversarialAE(z_dim=3, posterior=posterior, networks=networks)
            recon_x, z = model(x)
            self.assertEqual((recon_x.shape, z.shape), ((5, 1, 28, 28), (5, 3)))
            model.get_loss_autoencoder(x, recon_x, z, 0.5)[0].backward()
            self.assertTrue(all(weight.grad.abs().sum() > 0 for weight in model.encoder.parameters()), posterior)
            for codes, again in ((z, model.encoder(x)), [model.eval().encoder(x) for _ in range(2)]):
                self.assertEqual(torch.equal(codes, again), posterior == "deterministic", posterior)
            for dtype in (torch.float64, torch.bfloat16):
                other = copy.deepcopy(model).to(dtype)
                self.assertEqual({part.dtype for part in (*other(x.to(dtype)), other.sample(2))}, {dtype}, posterior)
            any_size = {0: torch.export.Dim("batch")},
            exported, codes = torch.export.export(model.encoder, (x[:2],), dynamic_shapes=any_size).module(), []
            for network in (model.encoder, exported):
                torch.manual_seed(1)
                codes.append(network(x))
            torch.testing.assert_close(*codes, msg=posterior)

    def test_gaussian_codes_have_the_networks_mean_and_variance(self):
        encoder = self.models.ENCODERS["gaussian"](2)
        outputs = torch.tensor([3.0, -1.0, math.log(4), math.log(0.25)]).expand(100_000, 4)
        with mock.patch.object(encoder.net, "forward", return_value=outputs):
            z = encoder(torch.zeros(100_000, 1, 1, 1))
        torch.testing.assert_close(z.mean(0), torch.tensor([3.0, -1.0]), atol=0.03, rtol=0)
        torch.testing.assert_close(z.T.cov(), torch.diag(torch.tensor([4, 0.25])), atol=0.08, rtol=0)
