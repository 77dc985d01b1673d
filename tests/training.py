"""train_aae, the training step, and the pictures of an epoch."""

import io
import itertools
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn

from tests.common import TinyAAE, TrainGroup, read_events, read_png, snapshot
from unittests import images_like_mnist

__unittest = True


class Training(TrainGroup):
    """train_aae; the requirements for every train.py are in Mistakes in unittests.py."""

    LAMBDA, AE_LR, D_LR = 0.4, 0.5, 2.0

    def reference(self, batches):
        """Return a TinyAAE after one epoch in which each player follows only its own gradient."""
        model = TinyAAE()
        for x, _ in batches:
            recon_x, z = model(x)
            ae_loss, _ = model.get_loss_autoencoder(x, recon_x, z, self.LAMBDA)
            disc_loss, _ = model.get_loss_discriminator(z.detach())
            autoencoder = [model.encoder.weight, model.decoder.weight]
            gradients = torch.autograd.grad(ae_loss, autoencoder)
            gradient, = torch.autograd.grad(disc_loss, [model.discriminator.weight])
            with torch.no_grad():
                for weight, slope in zip(autoencoder, gradients, strict=True):
                    weight -= self.AE_LR * slope
                model.discriminator.weight -= self.D_LR * gradient
        return model

    def test_players_are_kept_apart_in_training_mode_with_a_careless_model(self):
        batches = [(images_like_mnist(count), torch.zeros(count)) for count in (6, 6, 2)]
        model, modes = TinyAAE().eval(), []
        for part in model.modules():
            part.register_forward_pre_hook(lambda module, args: modes.append(module.training))
        optimizer_ae = torch.optim.SGD([model.encoder.weight, model.decoder.weight], self.AE_LR)
        optimizer_disc = torch.optim.SGD([model.discriminator.weight], self.D_LR)
        self.train.train_aae(1, model, batches, mock.Mock(), mock.Mock(), optimizer_ae, optimizer_disc, self.LAMBDA)
        for part, weight in self.reference(batches).named_parameters():
            self.check_close(model.get_parameter(part), weight,
                             f"the steps of {part} do not follow only the gradient of its own loss")
        self.assertEqual(model.batches, [6, 6, 2])
        self.check(modes and all(modes), "train_aae does not train in training mode: call model.train() first")

    def test_training_succeeds_with_seeds_that_start_bright(self):
        for seed in (1, 2):  # with torch's initial bias in the decoder, every fourth seed gave black images
            _, model, _, _, _, *optimizers, _ = self.parts("--base", "--seed", str(seed))
            for epoch in (1, 2):
                logger = self.train.TensorBoardLogger(mock.Mock())
                self.train.train_aae(epoch, model, self.mnist.digits(), logger, mock.Mock(), *optimizers, 0.995)
            recon_loss = logger.end_epoch()["recon_loss"]
            self.check(recon_loss < 0.25, f"with seed {seed} recon_loss stays at {recon_loss:.3f}: the first steps "
                       "drive the decoder's tanh to -1 everywhere; start its bias at the mean pixel")

    def test_average_agrees_with_the_formula(self):
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        average, decays = self.train.EMA(model, 0.5), []
        expected = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
        for step in range(1, 12):
            with torch.no_grad():
                for tensor in model.state_dict().values():
                    tensor.add_(torch.rand_like(tensor) if tensor.is_floating_point() else 1)
            average.update()
            decays.append(min(0.5, (1 + step) / (10 + step)))
            for name, tensor in model.state_dict().items():
                expected[name] = decays[-1] * expected[name] + (1 - decays[-1]) * tensor.double().numpy()
        self.assertLess(decays[0], decays[5])
        self.assertEqual(decays[-1], 0.5)
        self.assertEqual(average.model.state_dict()["1.num_batches_tracked"], 11)
        for name in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"):
            np.testing.assert_allclose(average.model.state_dict()[name], expected[name], rtol=1e-5, err_msg=name)

    def test_average_updates_a_shared_weight_once(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        average = self.train.EMA(model, 0.5)
        expected = 2 / 11 * model[0].weight.detach().clone() + 9 / 11
        nn.init.ones_(model[0].weight)
        average.update()
        self.assertTrue(torch.allclose(average.model[1].weight, expected), "a shared weight is averaged twice per step")

    def test_bf16_differs_only_by_rounding(self):
        def after_one_step(precision):
            with mock.patch("training.device.set_precision"):  # rejects bf16 on CPUs without units for it
                _, model, _, _, _, *optimizers, _ = self.parts("--precision", precision)
            torch.manual_seed(1)
            with mock.patch.object(model, "get_loss_discriminator", wraps=model.get_loss_discriminator) as judged:
                values = self.train.train_step(model, *optimizers, 0.5, x)
            self.assertEqual(judged.call_args.args[0].dtype, torch.float32)  # and therefore the prior samples
            self.assertEqual({output.dtype for output in model(x)}, {torch.float32}, "a pasted train_aae would crash")
            return model, {**values[0], **values[1]}

        x = images_like_mnist(16)
        (_, values), (rounded, rounded_values) = (after_one_step(precision) for precision in ("fp32", "bf16"))
        for name, value in values.items():
            self.check_close(rounded_values[name], value, f"{name} in bf16 differs from fp32", 0.02)
        self.assertNotEqual(rounded_values["ae_loss"], values["ae_loss"])
        self.assertEqual({weight.dtype for weight in rounded.parameters()}, {torch.float32})
        self.assertEqual({value.dtype for value in rounded_values.values()}, {torch.float32})
        self.assertFalse(any(value.requires_grad for value in rounded_values.values()))

    def test_a_model_with_lazy_layers_is_trained(self):
        class Lazy(self.models.AdversarialAE):
            def __init__(self, z_dim):
                super().__init__(z_dim, networks="base")
                self.encoder.net[-1] = nn.LazyLinear(z_dim)

        with mock.patch.object(self.train, "AdversarialAE", Lazy):
            _, model, *_ = self.parts()
        self.assertEqual(model.encoder.net[-1].weight.shape, (8, 1024))

    def test_recommended_optimizers_and_a_clipped_gradient(self):
        _, model, _, _, _, adam, sgd, lambda_ = self.parts("--d_momentum", "0")
        self.assertEqual((type(adam), type(sgd), lambda_), (torch.optim.Adam, torch.optim.SGD, 0.995))
        self.assertEqual((adam.defaults["lr"], adam.defaults["betas"][0], sgd.defaults["lr"]), (1e-3, 0.5, 5e-3))
        self.assertEqual(self.parts()[6].defaults["momentum"], 0.95)
        nn.init.constant_(model.discriminator.net[-1].weight, 10.0)
        before = nn.utils.parameters_to_vector(model.discriminator.parameters()).clone()
        self.train.train_step(model, adam, sgd, 0.5, images_like_mnist(16))
        moved = (nn.utils.parameters_to_vector(model.discriminator.parameters()) - before).norm()
        self.check_close(moved, 5e-3 * self.train.MAX_GRAD_NORM,
                         "a large gradient of the discriminator is not clipped", 1e-4)

    def test_rate_drops_after_the_epochs_of_the_flag(self):
        args = self.train.parse_args(["--drop_after", "10"])
        for rate in (args.ae_lr, torch.tensor(args.ae_lr)):  # on CUDA, a tensor that a captured graph reads
            optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=rate, foreach=False)
            for epoch, expected in ((1, 1e-3), (10, 1e-3), (11, 1e-4), (40, 1e-4)):
                self.train.set_learning_rate(optimizer, epoch, args)
                self.check_close(1e3 * optimizer.param_groups[0]["lr"], 1e3 * expected,
                                 f"the learning rate of epoch {epoch} is wrong")
            self.assertTrue(not torch.is_tensor(rate) or optimizer.param_groups[0]["lr"] is rate)
        self.train.set_learning_rate(optimizer, 1000, self.train.parse_args(["--drop_after", "0"]))
        self.check_close(1e3 * optimizer.param_groups[0]["lr"], 1, "the learning rate drops with --drop_after 0")


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
