"""The evaluation of a trained model."""

import json
import math
from unittest import mock

import numpy as np
import torch
import torch.nn as nn

from tests.common import TinyAAE, TrainGroup, read_png, same, snapshot
from unittests import Recorder, images_like_mnist

__unittest = True


class Evaluation(TrainGroup):
    """python -m evaluation on models of the bundled digits."""

    needs = (*TrainGroup.needs, "training.checkpoint", *(f"evaluation.{name}" for name in (
        "__main__", "classifier", "measures", "metrics", "model_files", "monitoring", "pictures")))

    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.object(self.measures, "SAMPLES", 300))
        self.enterContext(mock.patch.object(self.metrics, "STEPS", 60))

    def a_run(self, z_dim=3, **settings):
        """Return a run's folder with the weights of a new model, and the path of the weights."""
        run = self.folder() / "run"
        (run / "checkpoints").mkdir(parents=True)
        settings = {"z_dim": z_dim, "networks": "residual", "trained_on": "digits", "data_dir": "nowhere", **settings}
        (run / "hparams.json").write_text(json.dumps(settings))
        torch.save(self.models.AdversarialAE(z_dim).state_dict(), run / "checkpoints" / "model_checkpoint.pt")
        return run, run / "checkpoints" / "model_checkpoint.pt"

    def evaluate_cli(self, *flags):
        """Run `python -m evaluation` in this process; return its exit status, standard output and standard error."""
        with mock.patch.object(self.train, "cli", self.__main__.cli):
            return self.run_cli(*flags, "--no-cuda")

    def metrics_of(self, run, *flags, folder=None):
        status, out, err = self.evaluate_cli(run, *flags)
        self.assertEqual((status, err), (0, ""))
        return json.loads(((folder or run) / "evaluation" / "metrics.json").read_text()), out

    def assert_evaluation_refused(self, run, *fragments, flags=()):
        self.assert_refused(self.evaluate_cli(run, *flags), 1, *fragments)

    def test_a_trained_run(self):
        run, state = self.train_quietly("--epochs", "1", "--z_dim", "2")
        before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
        metrics, out = self.metrics_of(run)
        self.check(all(file.read_bytes() == content for file, content in before.items()), "a file of the run changed")
        model = self.models.AdversarialAE(z_dim=2)
        model.load_state_dict(state)
        images, labels = self.mnist.load_digits(train=False)
        with torch.no_grad():
            recon_x, codes = model.eval()(images)
            seen_recon_x, seen_codes = model(self.mnist.load_digits(train=True)[0][:749])
        errors, match = ((recon_x - images).double()**2).mean((1, 2, 3)), metrics["prior_match"]
        for name, value, expected in (
                ("the reconstruction error", metrics["reconstruction"]["mse"], errors.mean()),
                ("the codes' deviation", match["codes"]["std"][1], codes[:, 1].double().std()),
                ("the training codes' mean", match["training_codes"]["mean"][1], seen_codes[:, 1].double().mean()),
                ("the KS distance", match["codes"]["ks"], self.metrics.ks_distance(codes))):
            self.check_close(value, expected, f"{name} is wrong")
        for label in range(10):
            self.check_close(metrics["reconstruction"]["mse_per_label"][str(label)], errors[labels == label].mean(),
                             f"the reconstruction error of label {label} is wrong")
        quality = self.measures.classifier_quality({"test_images": images, "seen": seen_recon_x})["seen"]
        for name in ("images", "frechet_to_test_images", "sure"):
            ratio = metrics["digit_classifier"]["training_reconstructions"][name] / quality[name]
            self.check_close(ratio, 1, f"{name} is not that of the reconstructions of training images")
        self.check_close(match["prior_draws"]["ks"], 0.8687 / math.sqrt(299), "this is no sample of the prior", 0.03)
        for name, low, high in (("codes", 0.8, 1), ("training_codes", 0.8, 1), ("prior_draws", 0.4, 0.6)):
            self.assertTrue(low <= match[name]["two_sample_accuracy"] <= high, (name, match[name]))
        self.assertEqual((metrics["test_images"], metrics["z_dim"], metrics["trained_on"]), (299, 2, "digits"))
        self.assertRegex(out, "(?s)z_dim 2, deterministic encoder, residual networks, 299 test images of the bundled "
                              rf"digits.* {errors.mean():.4f} .*Parzen .*  nats +-?\d+\.\d \+- \d+\.\d")
        self.check_pictures(run, images[labels == 3][0, 0])

    def check_pictures(self, run, first_three):
        """Check the pictures of a model with two dimensions: their sizes, and a place in reconstructions.png."""
        sizes = {"samples": (8, 8), "nearest": (2, 8), "manifold": (20, 20), "reconstructions": (8, 10),
                 "interpolations": (10, 12)}  # rows and columns
        expected = {name: tuple(2 * (30 * count + 2) for count in counts) for name, counts in sizes.items()}
        self.assertEqual({file.stem: read_png(file).shape for file in (run / "evaluation").glob("*.png")},
                         expected | {"codes": (800, 910)})
        shown = read_png(run / "evaluation" / "reconstructions.png")[4:60:2, 4 + 3 * 60:60 * 4:2]
        self.assertTrue(np.array_equal(shown, ((first_three + 1) * 127.5).round()),
                        "the first image of the fourth column is not the first 3")

    def test_nearest_training_images(self):
        images, _ = self.mnist.load_digits()
        neighbours = self.pictures.nearest(images[[700, 3]] + 0.1 * images_like_mnist(2), images)
        self.assertTrue(torch.equal(neighbours, images[[700, 3]]))

    def test_training_images_are_split_evenly(self):
        for count, seen, last in ((60_000, range(0, 50_000, 5), range(59_000, 60_000)), (10, range(5), range(5, 10))):
            parts = self.measures.split_training_images(torch.arange(count))
            self.assertEqual([part.tolist() for part in parts], [list(seen), list(last)])

    def test_log_likelihood_is_that_of_images_in_0_1(self):
        samples, held_out, images = self.mnist.load_digits()[0][:600].split((300, 200, 100))
        result = self.measures.log_likelihood(samples, held_out, images)
        values = self.metrics.parzen_log_likelihood((samples + 1) / 2, (images + 1) / 2, result["sigma"])
        self.assertTrue(0.06 < result["sigma"] < 0.15, result)  # twice as much for images in [-1, 1]
        self.check_close(result["mean"], values.mean(), "the mean log-likelihood is wrong")
        self.check_close(result["standard_error"], values.std() / 10, "the standard error is wrong")

    def test_classifier_quality_tells_good_samples_from_bad_ones(self):
        images, labels = self.mnist.load_digits()
        quality = self.measures.classifier_quality({
            "good": images[:500], "threes": images[labels == 3], "noise": images_like_mnist(300),
            "test_images": images[500:1000]})
        distances = [quality[name]["frechet_to_test_images"] for name in ("good", "threes", "noise")]
        self.assertLess(5 * distances[0], min(distances[1:]), distances)
        self.assertGreater(quality["threes"]["labels"]["3"], 0.8)
        self.check_close(sum(quality["noise"]["labels"].values()), 1, "the shares of the labels do not add up to 1")
        with torch.no_grad():
            probabilities = self.classifier.load_classifier()(images[:500]).softmax(1)
        self.check_close(quality["good"]["sure"], (probabilities.amax(1) >= 0.95).double().mean(),
                         "the share of confidences of at least 0.95 is wrong")
        self.assertGreater((probabilities.argmax(1) == labels[:500]).double().mean(), 0.85, "it does not know digits")

    def test_seed_alone_determines_the_numbers(self):
        results = []
        model, (images, labels) = self.models.AdversarialAE(z_dim=2).train(), self.mnist.load_digits(train=False)
        for seed in (5, 5, 6):
            torch.manual_seed(len(results))
            before = snapshot(model)
            results.append(self.measures.evaluate(model, images, images[:50], labels[:50], seed))
            self.pictures.draw_pictures(model, images, images[:50], labels[:50])
            self.assertTrue(same(before, snapshot(model)), "the model or a random state has changed")
        self.assertEqual(results[0], results[1])
        self.assertNotEqual(results[0]["log_likelihood"], results[2]["log_likelihood"])
        self.assertEqual(results[0]["log_likelihood"]["training_images"]["samples"], 150)
        self.assertGreater(results[0]["log_likelihood"]["training_images"]["mean"],
                           results[0]["log_likelihood"]["training_reconstructions"]["mean"] + 10)

    def test_interpolation_is_spherical(self):
        start, end = torch.randn(8), 2 * torch.randn(8)
        path = self.pictures.interpolate(start, end, torch.linspace(0, 1, 5))
        for code, expected in ((path[0], start), (path[4], end)):
            self.assertTrue(torch.allclose(code, expected, atol=1e-5), "the path does not connect the two codes")
        changes, turns = path.norm(dim=1).diff(), nn.functional.cosine_similarity(path[1:], path[:-1]).acos()
        self.assertLess(changes.max() - changes.min(), 1e-4, "the norm changes unevenly")
        self.assertLess(turns.max() - turns.min(), 2e-3, "the direction rotates unevenly")
        for end in (-start, start, torch.zeros(8)):
            self.assertTrue(self.pictures.interpolate(start, end, torch.linspace(0, 1, 5)).isfinite().all())

    def test_manifold_has_the_prior_quantiles(self):
        model = TinyAAE()
        model.decoder = Recorder(self.models.ConvDecoder(2))
        with torch.no_grad():
            self.pictures.draw_manifold(model, side=4)
        first, second = (8 * torch.special.ndtr(model.decoder.inputs[0])).round(decimals=3).T.tolist()
        self.assertEqual(first, [1, 3, 5, 7] * 4, "the first dimension does not increase to the right, by quantiles")
        self.assertEqual(second[::4], [7, 5, 3, 1], "the second dimension does not increase upwards, by quantiles")

    def test_weights_without_a_run_or_discriminator(self):
        folder, weights, found = self.folder(), self.models.AdversarialAE(5).half().state_dict(), []
        few = [tensor[:200] for tensor in self.mnist.load_digits()]
        for prefix, parts in (("", ("encoder", "decoder", "discriminator")), ("module._orig_mod.", ("enc", "dec"))):
            torch.save({prefix + name: weights[name] for name in weights if name.startswith(parts)}, folder / "some.pt")
            with mock.patch.object(self.model_files, "load_mnist", return_value=few) as load:
                metrics, out = self.metrics_of(folder / "some.pt", "--data_dir", "there", folder=folder)
            self.assertEqual(load.call_args.args[0], "there")
            self.assertIn("z_dim 5, deterministic encoder, residual networks, 200 test images of MNIST", out)
            found.append({name: value for name, value in metrics.items() if name not in ("seconds", "weights_md5")})
        self.assertEqual(*found)

    def test_each_posterior_with_and_without_a_run(self):
        for kind in (("gaussian", "residual"), ("universal", "residual"), ("deterministic", "base"),
                     ("universal", "base")):
            run, path = self.a_run(posterior=kind[0], networks=kind[1])
            model = self.models.AdversarialAE(3, *kind)
            torch.save(model.state_dict(), path)
            recorded, weights = self.model_files.find_run(run)[2], self.model_files.read_weights(path)
            for settings in (recorded, self.model_files.settings_from_weights(path, weights)):
                self.assertEqual((settings["posterior"], settings["networks"]), kind)
            loaded = self.model_files.load_model(path, weights, recorded).state_dict()
            self.assertTrue(same(model.state_dict(), loaded))
        self.metrics_of(run)

    def test_what_is_not_a_run(self):
        run, weights = self.a_run()
        self.metrics_of(weights, folder=run)  # the weights of a run belong to the run
        for wrong in (run / "none", run.parent):
            self.assert_evaluation_refused(wrong, wrong, "does not exist")
        (run / "evaluation").rename(run / "moved")
        (run / "evaluation").write_text("a file")
        self.assert_evaluation_refused(run, run / "evaluation", "cannot be written")
        for content in ("", "[]", '{"z_dim": "8"}', '{"z_dim": 0}', '{"z_dim": true}', '{"z_dim": 8, "networks": "?"}',
                        '{"z_dim": 8, "posterior": []}', '{"z_dim": 8, "data_dir": 3}', "\ud8ff", "[" * 100_000):
            (run / "hparams.json").write_bytes(content.encode("utf-8", "surrogatepass"))
            self.assert_evaluation_refused(run, "hparams.json is damaged")
        self.assertEqual([self.evaluate_cli(*flags)[0] for flags in ((), (run, "--seed", -1))], [2, 2])
        run, _ = self.a_run(trained_on="mnist")
        with mock.patch("torchvision.datasets.MNIST.mirrors", []):
            self.assert_evaluation_refused(run, "could not be downloaded", flags=("--data_dir", self.folder()))

    def test_damaged_weights(self):
        run, weights = self.a_run()
        whole, huge = weights.read_bytes(), {name: 1e10 * tensor for name, tensor in torch.load(weights).items()}
        for content in (b"", whole[:-100], whole[:5000] + bytes(64) + whole[5064:]):
            weights.write_bytes(content)
            self.assert_evaluation_refused(run, weights, "is damaged")
        for content, words in (([1, 2], "not contain"), ({"encoder": {}}, "not contain"), ({}, "does not fit"),
                               (self.models.AdversarialAE(4).state_dict(), "does not fit"),
                               ({"weight": torch.tensor([math.nan])}, "has diverged"), (huge, "has diverged")):
            torch.save(content, weights)
            self.assert_evaluation_refused(run, words)
        decoder = {f"decoder.{name}": tensor for name, tensor in self.models.ConvDecoder(3).state_dict().items()}
        for content in ({"weight": torch.zeros(3)}, {"decoder.net.0.weight": torch.zeros(3)}, decoder):
            torch.save(content, run / "other.pt")
            self.assert_evaluation_refused(run / "other.pt", run / "other.pt", "another model")

    def test_missing_or_damaged_classifier(self):
        (run, _), weights = self.a_run(), self.folder() / "digit_classifier.pt"
        whole = bytearray(self.checkpoint.serialize(self.classifier.DigitClassifier().half().state_dict()))
        whole[len(whole) // 2] ^= 64  # one bit, which torch.load does not notice
        with mock.patch.object(self.classifier, "WEIGHTS", weights):
            self.assert_evaluation_refused(run, weights, "is missing; restore it")
            for content in (bytes(whole), self.checkpoint.serialize([1])):
                weights.write_bytes(content)
                self.assert_evaluation_refused(run, weights, "is damaged")
        self.assertFalse((run / "evaluation").exists())
