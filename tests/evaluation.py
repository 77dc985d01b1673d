"""The evaluation of a trained model."""

import json
import math
from unittest import mock

import numpy as np
import torch

from tests.common import TinyAAE, TrainGroup, read_png, same, snapshot
from unittests import images_like_mnist, listen

__unittest = True


class Evaluation(TrainGroup):
    """python -m evaluation on models of the bundled digits."""

    needs = (*TrainGroup.needs, "training.checkpoint", *(f"evaluation.{name}" for name in (
        "__main__", "classifier", "measures", "metrics", "model_files", "pictures")))

    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.object(self.measures, "SAMPLES", 300))
        self.enterContext(mock.patch.object(self.metrics, "STEPS", 60))

    def a_run(self, **settings):
        """Return a run's folder with the weights of a new model, and the path of the weights."""
        run, settings = self.folder() / "run", {"z_dim": 3, "trained_on": "digits", "data_dir": "nowhere", **settings}
        (run / "checkpoints").mkdir(parents=True)
        (run / "hparams.json").write_text(json.dumps(settings))
        model = self.models.AdversarialAE(3, settings.get("posterior", "deterministic"),
                                          settings.get("networks", "base"))  # older runs do not record them
        torch.save(model.state_dict(), run / "checkpoints" / "model_checkpoint.pt")
        return run, run / "checkpoints" / "model_checkpoint.pt"

    def evaluate_cli(self, *flags):
        with mock.patch.object(self.train, "cli", self.__main__.cli):
            return self.run_cli(*flags, "--no-cuda")

    def metrics_of(self, run, *flags, folder=None):
        status, out, err = self.evaluate_cli(run, *flags)
        self.assertEqual((status, err), (0, ""))
        return json.loads(((folder or run) / "evaluation" / "metrics.json").read_text()), out

    def assert_run_refused(self, run, *words):
        self.assert_refused(self.evaluate_cli(run), 1, "python -m evaluation: error: ", *words)

    def assert_close(self, value, expected):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)

    def test_a_trained_run(self):
        run, state = self.train_quietly("--epochs", "1", "--z_dim", "2")
        before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
        metrics, out = self.metrics_of(run)
        self.check(all(file.read_bytes() == content for file, content in before.items()), "a file of the run changed")
        model = self.models.AdversarialAE(z_dim=2).eval()
        model.load_state_dict(state)
        (images, labels), seen = self.mnist.load_digits(train=False), self.mnist.load_digits()[0][:749]
        with torch.no_grad():
            (recon_x, codes), (seen_recon_x, seen_codes) = model(images), model(seen)
        errors = ((recon_x - images).double()**2).mean((1, 2, 3))
        self.assertEqual((metrics["test_images"], metrics["z_dim"], metrics["trained_on"]), (299, 2, "digits"))
        self.assertRegex(out, r"(?s)z_dim 2, deterministic encoder, residual networks, 299 test images of the bundled "
                              rf"digits.* {errors.mean():.4f} .*Parzen log-likelihood.*  nats +-?\d+\.\d \+- \d+\.\d")
        per_label = {str(label): errors[labels == label].mean().item() for label in range(10)}
        self.assert_close(metrics["reconstruction"], {"mse": errors.mean().item(), "mse_per_label": per_label})
        match = metrics["prior_match"]
        self.assert_close(match["codes"]["std"], codes.double().std(0).tolist())
        self.assert_close(match["codes"]["ks"], self.metrics.ks_distance(codes))
        self.assert_close(match["training_codes"]["mean"], seen_codes.double().mean(0).tolist())
        self.check_close(match["prior_draws"]["ks"], 0.8687 / math.sqrt(299), "this is no sample of the prior", 0.03)
        for name, low, high in (("codes", 0.8, 1), ("training_codes", 0.8, 1), ("prior_draws", 0.4, 0.6)):
            self.assertTrue(low <= match[name]["two_sample_accuracy"] <= high, (name, match[name]))
        likelihood = metrics["log_likelihood"]["training_images"]
        values = self.metrics.parzen_log_likelihood((seen + 1) / 2, (images + 1) / 2, likelihood["sigma"])
        self.assertTrue(0.06 < likelihood["sigma"] < 0.15, likelihood)  # twice as much for images in [-1, 1]
        self.assert_close([likelihood[name] for name in ("mean", "standard_error", "samples", "sigma_images")],
                          [values.mean().item(), values.std().item() / math.sqrt(299), 749, 749])
        self.assertGreater(likelihood["mean"], metrics["log_likelihood"]["training_reconstructions"]["mean"] + 10)
        quality = self.measures.classifier_quality({"test_images": images, "seen": seen_recon_x})["seen"]
        self.assert_close(metrics["digit_classifier"]["training_reconstructions"], quality)
        self.check_pictures(run / "evaluation", (images[labels == 3][0, 0], recon_x[labels == 3][0, 0]))

    def check_pictures(self, folder, first_three):
        """Check the pictures of a model with two dimensions: their sizes, and the first 3 with its reconstruction."""
        sizes = {"samples.png": (484, 484), "nearest.png": (484, 124), "manifold.png": (1204, 1204),
                 "reconstructions.png": (604, 484), "interpolations.png": (724, 604), "codes.png": (910, 800)}
        self.assertEqual({file.name: read_png(file).shape[::-1] for file in folder.glob("*.png")}, sizes)
        column = read_png(folder / "reconstructions.png")[4:120:2, 4 + 3 * 60:60 * 4:2]  # enlarged by a factor of two
        for place, image in zip((slice(28), slice(30, 58)), first_three, strict=True):
            np.testing.assert_allclose(column[place], (image + 1) * 127.5, atol=1)

    def test_nearest_training_images(self):
        images, _ = self.mnist.load_digits()
        neighbours = self.pictures.nearest(images[[700, 3]] + 0.1 * images_like_mnist(2), images)
        self.assertTrue(torch.equal(neighbours, images[[700, 3]]))

    def test_training_images_are_split_evenly(self):
        for count, seen, last in ((60_000, range(0, 50_000, 5), range(59_000, 60_000)), (10, range(5), range(5, 10))):
            parts = self.measures.split_training_images(torch.arange(count))
            self.assertEqual([part.tolist() for part in parts], [list(seen), list(last)])

    def test_classifier_quality_tells_good_samples_from_bad_ones(self):
        (images, labels), classifier = self.mnist.load_digits(), self.classifier.load_classifier()
        good, test_images = images[:500], images[500:1000]
        quality = self.measures.classifier_quality({"good": good, "threes": images[labels == 3],
                                                    "noise": images_like_mnist(300), "test_images": test_images})
        with torch.no_grad():
            features, test_features = classifier.features(good), classifier.features(test_images)
            confidences, digits = classifier(good).softmax(1).max(1)
        distance = self.metrics.frechet(features, test_features)
        shares = (digits.bincount(minlength=10).double() / 500).tolist()
        self.assert_close(quality["good"], {
            "images": 500, "frechet_to_test_images": distance, "sure": (confidences >= 0.95).double().mean().item(),
            "labels": {str(label): share for label, share in enumerate(shares)}})
        self.assertGreater(quality["threes"]["labels"]["3"], 0.8)
        for name in ("threes", "noise"):
            self.assertGreater(quality[name]["frechet_to_test_images"], 5 * distance, name)

    def test_seed_alone_determines_the_numbers_and_the_model_stays_as_it_is(self):
        model, (images, labels) = self.models.AdversarialAE(2, "gaussian"), self.mnist.load_digits(train=False)
        results = []
        for seed in (5, 5, 6):
            torch.manual_seed(len(results))
            before = snapshot(model)
            results.append(self.measures.evaluate(model, images, images[:50], labels[:50], seed))
            self.pictures.draw_pictures(model, images, images[:50], labels[:50])
            self.assertTrue(same(before, snapshot(model)), "the model or a random state has changed")
        self.assertEqual(results[0], results[1])
        self.assertNotEqual(results[0]["log_likelihood"], results[2]["log_likelihood"])

    def test_interpolation_is_spherical(self):
        start, end = torch.randn(8), 2 * torch.randn(8)
        path = self.pictures.interpolate(start, end, torch.linspace(0, 1, 5))
        torch.testing.assert_close(path[[0, 4]], torch.stack([start, end]), atol=1e-5, rtol=0)
        changes, turns = path.norm(dim=1).diff(), torch.cosine_similarity(path[1:], path[:-1]).acos()
        self.assertLess(changes.max() - changes.min(), 1e-4, "the norm changes unevenly")
        self.assertLess(turns.max() - turns.min(), 2e-3, "the direction rotates unevenly")
        for end in (-start, start, torch.zeros(8)):
            self.assertTrue(self.pictures.interpolate(start, end, torch.linspace(0, 1, 5)).isfinite().all())

    def test_manifold_has_the_prior_quantiles(self):
        model = TinyAAE()
        model.decoder = self.models.ConvDecoder(2)
        calls = listen(model.decoder)
        with torch.no_grad():
            self.pictures.draw_manifold(model, side=4)
        first, second = (8 * torch.special.ndtr(calls[0][0])).round(decimals=3).T.tolist()
        self.assertEqual(first, [1, 3, 5, 7] * 4, "the first dimension does not increase to the right, by quantiles")
        self.assertEqual(second[::4], [7, 5, 3, 1], "the second dimension does not increase upwards, by quantiles")

    def test_each_posterior_with_and_without_a_run(self):
        for kind in ({}, {"posterior": "gaussian", "networks": "residual"}, {"posterior": "universal"},
                     {"posterior": "universal", "networks": "residual"}):
            run, path = self.a_run(**kind)
            state = {name: weight for name, weight in torch.load(path).items() if not name.startswith("discriminator")}
            torch.save({f"module._orig_mod.{name}": weight for name, weight in state.items()}, path)
            recorded, weights = self.model_files.find_run(run)[2], self.model_files.read_weights(path)
            expected = {"posterior": "deterministic", "networks": "base", **kind}
            for settings in (recorded, self.model_files.settings_from_weights(path, weights)):
                self.assertEqual({name: settings[name] for name in expected}, expected)
            loaded = self.model_files.load_model(path, weights, recorded).state_dict()
            self.assertTrue(same(state, {name: loaded[name] for name in state}))
        (run / "hparams.json").unlink()
        few = [tensor[:200] for tensor in self.mnist.load_digits()]
        with mock.patch.object(self.model_files, "load_mnist", return_value=few) as load:
            _, out = self.metrics_of(path, "--data_dir", "there", folder=path.parent)
        self.assertEqual(load.call_args.args[0], "there")
        self.assertIn("z_dim 3, universal encoder, residual networks, 200 test images of MNIST", out)

    def test_what_is_not_a_run(self):
        run, weights = self.a_run()
        self.metrics_of(weights, folder=run)  # the weights of a run belong to the run
        self.assert_run_refused(run / "none", run / "none", "does not exist")
        self.assert_run_refused(run.parent, run.parent, "no hparams.json")
        (run / "evaluation").rename(run / "moved")
        (run / "evaluation").write_text("a file")
        self.assert_run_refused(run, run / "evaluation", "cannot be written")
        for content in (b"", b"[]", b"{}", b'{"z_dim": "8"}', b'{"z_dim": 0}', b'{"z_dim": true}', b"\xff",
                        b'{"z_dim": 8, "networks": "?"}', b'{"z_dim": 8, "trained_on": "cifar"}',
                        b'{"z_dim": 8, "data_dir": 3}', b'{"z_dim": 8, "posterior": []}', b"[" * 100_000):
            (run / "hparams.json").write_bytes(content)
            self.assert_run_refused(run, "hparams.json is damaged")
        run, _ = self.a_run(trained_on="mnist", data_dir=str(self.folder()))
        with mock.patch("torchvision.datasets.MNIST.mirrors", []):
            self.assert_run_refused(run, "could not be downloaded")
        self.assertEqual([self.evaluate_cli(*flags)[0] for flags in ((), (run, "--seed", -1))], [2, 2])

    def test_damaged_weights(self):
        run, weights = self.a_run()
        whole, state = weights.read_bytes(), torch.load(weights)
        decoder = {name: weight for name, weight in state.items() if name.startswith("decoder")}
        for content, words in ((b"nonsense", "is damaged"), (whole[:-100], "is damaged"),
                               ([1, 2], "not contain"), ({"encoder": {}}, "not contain"), ({}, "does not fit"),
                               (self.models.AdversarialAE(4).state_dict(), "does not fit"),
                               ({"weight": torch.tensor([math.nan])}, "has diverged"),
                               ({name: 1e10 * weight for name, weight in state.items()}, "has diverged")):
            weights.write_bytes(content if isinstance(content, bytes) else self.checkpoint.serialize(content))
            self.assert_run_refused(run, words)
        weights.write_bytes(whole)
        with mock.patch.object(self.measures, "draw_samples", return_value=torch.full((1, 1, 28, 28), math.inf)):
            self.assert_run_refused(run, "has diverged")
        for content in ({"weight": torch.zeros(3)}, {"decoder.net.0.weight": torch.zeros(3)}, decoder):
            torch.save(content, run / "other.pt")
            self.assert_run_refused(run / "other.pt", run / "other.pt", "another model")

    def test_missing_or_damaged_classifier(self):
        (run, _), weights = self.a_run(), self.folder() / "digit_classifier.pt"
        self.enterContext(mock.patch.object(self.classifier, "WEIGHTS", weights))
        self.assert_run_refused(run, weights, "is missing; restore it")
        whole = bytearray(self.checkpoint.serialize(self.classifier.DigitClassifier().half().state_dict()))
        whole[len(whole) // 2] ^= 64  # one bit, which torch.load does not notice
        for content in (bytes(whole), self.checkpoint.serialize([1])):
            weights.write_bytes(content)
            self.assert_run_refused(run, weights, "is damaged")
        self.assertFalse((run / "evaluation").exists())
