"""The evaluation of a trained model, and its metrics against independent computations."""

import functools
import hashlib
import json
import math
from unittest import mock

import numpy as np
import torch

from tests.common import TrainGroup, same, snapshot
from tests.train_run import read_png
from unittests import images_like_mnist, listen

__unittest = True
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


class Evaluation(TrainGroup):
    """python -m evaluation on a few of the bundled digits, and its metrics compared with other ways to compute them."""

    needs = (*TrainGroup.needs, "training.files", "training.monitoring", *(f"evaluation.{name}" for name in (
        "__main__", "classifier", "measures", "metrics", "model_files", "pictures")))

    def setUp(self):
        super().setUp()
        (self.seen, self.held_out), (self.images, self.labels) = self.few[0].split(20), self.few_tests
        self.enterContext(mock.patch.object(self.model_files, "load_digits",
                                            lambda train: self.few if train else self.few_tests))
        self.enterContext(mock.patch.object(self.measures, "SAMPLES", 100))

    def a_run(self, networks="base", posterior="deterministic"):
        """Return a run's folder with the weights of a new model, and the path of the weights."""
        settings = {"z_dim": 3, "trained_on": "digits", "data_dir": "nowhere"}  # as of an older run
        state = self.models.AdversarialAE(3, posterior, networks).state_dict()
        run = self.folder({"run/checkpoints/model_checkpoint.pt": self.files.serialize(state),
                           "run/hparams.json": json.dumps(settings)}) / "run"
        return run, run / "checkpoints" / "model_checkpoint.pt"

    def evaluate_cli(self, *flags):
        program = functools.partial(self.cli.run_program, "evaluation", self.__main__.main, self.__main__.parse_args)
        return self.run_cli(*flags, "--no-cuda", cli=program)

    def metrics_in(self, folder, *flags):
        """Return the metrics that the program, with these flags, writes into a folder, and what it prints."""
        status, out, err = self.evaluate_cli(*flags)
        self.assertEqual((status, err), (0, ""))
        return json.loads((folder / "metrics.json").read_text()), out

    def test_a_trained_run(self):
        run, state = self.train_quietly("--epochs", "1", "--z_dim", "2")
        before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
        metrics, out = self.metrics_in(run / "evaluation", run)
        self.check(all(file.read_bytes() == content for file, content in before.items()), "a file of the run changed")
        model = self.models.AdversarialAE(z_dim=2).eval()
        model.load_state_dict(state)
        with torch.no_grad():
            (recon_x, codes), (seen_recon_x, seen_codes) = model(self.images), model(self.seen)
        errors = ((recon_x - self.images).double()**2).mean((1, 2, 3))
        self.assertRegex(out, r"(?s)z_dim 2, deterministic encoder, residual networks, 30 test images of digits, on cpu"
                              rf".* {errors.mean():.4f} .*Parzen log-likelihood.*  nats +-?\d+\.\d \+- \d+\.\d")
        per_label = {str(label): errors[self.labels == label].mean().item() for label in range(10)}
        assert_close(metrics["reconstruction"], {"mse": errors.mean().item(), "mse_per_label": per_label})
        for name, part in (("codes", codes), ("training_codes", seen_codes)):
            assert_close(metrics["prior_match"][name], {"mean": part.mean(0).tolist(), "std": part.std(0).tolist(),
                                                        "ks": self.monitoring.ks_distance(part)})
        self.assertTrue(0.08 < metrics["prior_match"]["prior_draws"]["ks"] < 0.3)  # on average 0.16
        seen, held_out, images = ((part + 1) / 2 for part in (self.seen, self.held_out, self.images))
        sigma = self.metrics.choose_sigma(seen, held_out)
        values = self.metrics.parzen_log_likelihood(self.metrics.squared_distances(seen, images), 784, sigma)
        assert_close(metrics["log_likelihood"]["training_images"], {
            "mean": values.mean().item(), "standard_error": values.std().item() / math.sqrt(30), "sigma": sigma,
            "samples": 20, "sigma_images": 20})
        quality = self.measures.classifier_quality({"test_images": self.images, "seen": seen_recon_x})["seen"]
        assert_close(metrics["digit_classifier"]["training_reconstructions"], quality)
        pictures = {file.name: read_png(file) for file in run.glob("evaluation/*.png")}
        self.assertEqual({name: picture.shape[::-1] for name, picture in pictures.items()}, {
            "samples.png": (484, 484), "nearest.png": (484, 124), "manifold.png": (1204, 1204),
            "reconstructions.png": (604, 124), "interpolations.png": (724, 604)})
        column = pictures["reconstructions.png"][4:120:2, 4 + 3 * 60:60 * 4:2]  # of label 3, enlarged
        for place, shown in ((slice(28), self.images), (slice(30, 58), recon_x)):
            np.testing.assert_allclose(column[place], (shown[self.labels == 3][0, 0] + 1) * 127.5, atol=1)

    def test_the_table_is_printed_before_the_files_are_written_and_output_is_their_place(self):
        run, weights = self.a_run()
        (run / "evaluation").write_text("a file")
        for folder, flags in ((run / "evaluation", ()), (run / "hparams.json", ("--output", run / "hparams.json/new"))):
            result = self.evaluate_cli(run, *flags)
            self.assert_refused(result, 1, folder, "choose another folder")
            self.assertIn("Parzen log-likelihood of", result[1])
        place, build = self.folder() / "new" / "place", self.models.AdversarialAE
        others = self.files.serialize(build(3, networks="base").state_dict())
        for path in (run, weights):  # the weights of a run belong to the run; the second time, over its own files
            content = weights.read_bytes()
            with mock.patch.object(self.model_files, "AdversarialAE", lambda *kind: weights.write_bytes(others) and
                                   build(*kind)):  # as if a training run saved others meanwhile
                metrics, out = self.metrics_in(place, path, "--output", place)
            self.assertEqual(metrics["trained_on"], "digits")
            self.assertEqual(metrics["weights_md5"], hashlib.md5(content, usedforsecurity=False).hexdigest())
            self.assertIn(f"see: {place}\n", out)

    def test_choice_of_images(self):
        neighbours = self.pictures.nearest(self.seen[[14, 3]] + 0.1 * images_like_mnist(2), self.seen)
        self.assertTrue(torch.equal(neighbours, self.seen[[14, 3]]))
        for count, seen, last in ((60_000, range(0, 50_000, 5), range(59_000, 60_000)), (10, range(5), range(5, 10))):
            parts = self.measures.split_training_images(torch.arange(count))
            self.assertEqual([part.tolist() for part in parts], [list(seen), list(last)])

    def test_classifier_quality_tells_good_samples_from_bad_ones(self):
        (images, labels), classifier = self.mnist.load_digits(), self.classifier.load_classifier()
        good, others = images[:500].split(250)
        quality = self.measures.classifier_quality({
            "good": good, "test_images": others, "threes": images[labels == 3][:100], "noise": images_like_mnist(100)})
        with torch.no_grad():
            confidences, digits = classifier(good).softmax(1).max(1)
            distance = self.metrics.frechet(classifier.features(good), classifier.features(others))
        assert_close(quality["good"], {
            "images": 250, "frechet_to_test_images": distance, "sure": (confidences >= 0.95).double().mean().item(),
            "labels": {str(label): (digits == label).double().mean().item() for label in range(10)}})
        self.assertGreater(quality["threes"]["labels"]["3"], 0.8)
        for name in ("threes", "noise"):
            self.assertGreater(quality[name]["frechet_to_test_images"], 5 * distance, name)

    def test_seed_alone_determines_the_numbers_and_the_model_stays_as_it_is(self):
        model, results = self.models.AdversarialAE(2, "gaussian"), []
        for seed in (5, 5, 6):
            torch.manual_seed(len(results))
            before = snapshot(model)
            results.append(self.measures.evaluate(model, *self.few[:1], *self.few_tests, seed))
            self.pictures.draw_pictures(model, *self.few[:1], *self.few_tests, seed)
            self.assertTrue(same(before, snapshot(model)), "the model or a random state has changed")
        self.assertEqual(results[0], results[1])
        self.assertNotEqual(results[0]["log_likelihood"], results[2]["log_likelihood"])

    def test_interpolation_is_spherical(self):
        start, end, fractions = torch.randn(8), 2 * torch.randn(8), torch.linspace(0, 1, 5)
        path = self.pictures.interpolate(start, end, fractions)
        torch.testing.assert_close(path[[0, 4]], torch.stack([start, end]), atol=1e-5, rtol=0)
        changes, turns = path.norm(dim=1).diff(), torch.cosine_similarity(path[1:], path[:-1]).acos()
        self.assertLess(changes.max() - changes.min(), 1e-4, "the norm changes unevenly")
        self.assertLess(turns.max() - turns.min(), 2e-3, "the direction rotates unevenly")
        for end in (-start, start, torch.zeros(8)):
            self.assertTrue(self.pictures.interpolate(start, end, fractions).isfinite().all())

    def test_manifold_has_the_prior_quantiles(self):
        model = self.models.AdversarialAE(2).requires_grad_(False)
        calls = listen(model.decoder)
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
            model, settings, folder = self.model_files.load_run(run)
            self.assertEqual((folder, settings["weights"]), (run / "evaluation", str(path)))
            self.assertEqual(settings["data_dir"], "nowhere")
            self.assertLessEqual({"posterior": "deterministic", "networks": "base", **kind}.items(), settings.items())
            self.assertTrue(same(state, {name: model.state_dict()[name] for name in state}))
        path = path.rename(self.folder() / "weights.pt")
        with mock.patch.object(self.model_files, "load_mnist", return_value=self.few_tests) as load:
            _, out = self.metrics_in(path.parent / "weights_evaluation", path, "--data_dir", "there")
        self.assertEqual(load.call_args.args[0], "there")
        self.assertIn("z_dim 3, universal encoder, residual networks, 30 test images of mnist", out)

    def test_what_cannot_be_evaluated(self):
        run, weights = self.a_run()
        hparams, whole, state = run / "hparams.json", weights.read_bytes(), torch.load(weights)
        copy = self.enterContext(mock.patch.object(self.classifier, "CLASSIFIER", self.folder() / "classifier.pt"))
        copy.write_bytes(self.files.serialize(self.classifier.digit_classifier().half().state_dict()))
        one_bit = bytearray(copy.read_bytes())
        one_bit[len(one_bit) // 2] ^= 64  # which torch.load does not notice
        decoder = {name: weight for name, weight in state.items() if name.startswith("decoder")}
        damaged = {
            (copy, "is damaged, or not a checkpoint; restore it"): [one_bit],
            (hparams, f"{hparams} is missing, damaged, or from another run"): [
                b"", b"[]", b'{"z_dim": "8"}', b'{"z_dim": 2}', b"\xff", b'{"z_dim": 3, "networks": "?"}',
                b'{"trained_on": "cifar"}', b'{"data_dir": 3}', b'{"posterior": []}', b"[" * 100_000],
            (weights, "is damaged"): [b"nonsense", whole[:-100]],
            (weights, "not have weights of models.AdversarialAE"): [
                [1, 2], {"encoder": {}}, {}, decoder, {"decoder.net.0.weight": torch.tensor(3.0)}],
            (weights, "from another run"): [self.models.AdversarialAE(4).state_dict()],
            (weights, "has diverged"): [{name: factor * weight for name, weight in state.items()}
                                        for factor in (1e10, math.nan)]}
        for (file, words), contents in damaged.items():
            before = file.read_bytes()
            for content in contents:
                file.write_bytes(content if isinstance(content, bytes | bytearray) else self.files.serialize(content))
                self.assert_refused(self.evaluate_cli(run), 1, words)
            file.write_bytes(before)
        for missing in (run / "none", run.parent):
            self.assert_refused(self.evaluate_cli(missing), 1, missing, "No such file")
        self.assertFalse((run / "evaluation").exists())
        self.assertEqual([self.evaluate_cli(*flags)[0] for flags in ((), (run, "--seed", -1))], [2, 2])

    def test_ks_distance_is_the_mean_over_projections_of_the_largest_step(self):
        def ks_distance(values):
            return max(abs(sum(other <= point for other in values) / len(values) - math.erfc(-point / math.sqrt(2)) / 2)
                       for value in values for point in (value, value - 1e-9))

        codes = torch.randn(30, 4) @ torch.randn(4, 4) + torch.randn(4)  # correlated, and far from N(0, I)
        directions = torch.randn(4, 27, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        projections = codes.double() @ (directions / directions.norm(dim=0))
        expected = sum(ks_distance(values) for values in projections.T.tolist()) / 27
        self.check_close(self.monitoring.ks_distance(codes, 27, seed=5), expected, "the KS distance is wrong")
        self.check_close(self.monitoring.ks_distance(torch.randn(10_000, 8)), 0.8687 / 100,
                         "the KS distance of 10,000 prior samples is not the mean of Kolmogorov's distribution", 1e-3)

    def test_frechet_distance(self):
        pair = [torch.randn(count, 5).double() @ torch.rand(5, 5).double() + 1 for count in (50, 60)]
        (mean, covariance), (other_mean, other) = ((part.mean(0).numpy(), np.cov(part.T)) for part in pair)
        overlap = np.sqrt(np.linalg.eigvals(covariance @ other).real).sum()
        expected = ((mean - other_mean)**2).sum() + np.trace(covariance + other) - 2 * overlap
        self.check_close(self.metrics.frechet(*pair), expected, "the distance is wrong")
        features = torch.randn(20, 64) @ torch.randn(64, 64)  # fewer than dimensions: a singular covariance
        self.check_close(self.metrics.frechet(features, features), 0, "the distance of a set to itself is not 0", 1e-4)

    def test_parzen_log_likelihood_and_its_best_sigma(self):
        samples, images, sigma = torch.rand(30, 784), torch.rand(7, 784), 0.3
        density = torch.distributions.Normal(samples.double(), sigma).log_prob(images[:, None].double())
        distances = self.metrics.squared_distances(samples, images)
        torch.testing.assert_close(self.metrics.parzen_log_likelihood(distances, 784, sigma),
                                   density.sum(2).logsumexp(1) - math.log(30), rtol=1e-6, atol=0)
        samples, noise = torch.rand(1, 784).expand(20, 784), 0.37 * torch.randn(600, 784)
        sigma = self.metrics.choose_sigma(samples, samples[:1] + noise)
        self.check_close(sigma, noise.square().mean().sqrt(), "it is not the maximum likelihood estimate", 0.005)
        for edges in ({"low": 0.5}, {"high": 0.1}):
            self.assertRaises(ValueError, self.metrics.choose_sigma, samples, samples[:1] + noise, **edges)
        distances, = self.metrics.squared_distances(torch.ones(3, 784), torch.ones(3, 784) + 1e-3)
        self.check_close(distances.mean() / 784e-6, 1, "squared distances of similar images are lost in rounding", 1e-3)
