"""The evaluation of a trained model."""

import functools
import json
import math
from unittest import mock

import numpy as np
import torch

from tests.common import TinyAAE, TrainGroup, read_png, same, snapshot
from unittests import images_like_mnist, listen

__unittest = True
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


class Evaluation(TrainGroup):
    """python -m evaluation on models of the bundled digits."""

    needs = (*TrainGroup.needs, "training.files", *(f"evaluation.{name}" for name in (
        "__main__", "classifier", "measures", "metrics", "model_files", "monitoring", "pictures")))

    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.object(self.measures, "SAMPLES", 300))

    def a_run(self, **settings):
        """Return a run's folder with the weights of a new model, and the path of the weights."""
        run, settings = self.folder() / "run", {"z_dim": 3, "trained_on": "digits", "data_dir": "nowhere", **settings}
        weights = run / "checkpoints" / "model_checkpoint.pt"
        weights.parent.mkdir(parents=True)
        (run / "hparams.json").write_text(json.dumps(settings))
        kind = {"networks": "base", **{name: settings[name] for name in ("posterior", "networks") if name in settings}}
        torch.save(self.models.AdversarialAE(3, **kind).state_dict(), weights)  # older runs do not record the kind
        return run, weights

    def evaluate_cli(self, *flags):
        program = functools.partial(self.cli.run_program, "evaluation", self.__main__.main, self.__main__.parse_args)
        with mock.patch.object(self.train, "cli", program):
            return self.run_cli(*flags, "--no-cuda")

    def metrics_in(self, folder, *flags):
        """Return the metrics that the program, with these flags, writes into a folder, and what it prints."""
        status, out, err = self.evaluate_cli(*flags)
        self.assertEqual((status, err), (0, ""))
        return json.loads((folder / "metrics.json").read_text()), out

    def assert_run_refused(self, run, *words, flags=()):
        self.assert_refused(self.evaluate_cli(run, *flags), 1, *words)

    def test_a_trained_run(self):
        run, state = self.train_quietly("--epochs", "1", "--z_dim", "2")
        before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
        metrics, out = self.metrics_in(run / "evaluation", run)
        self.check(all(file.read_bytes() == content for file, content in before.items()), "a file of the run changed")
        model = self.models.AdversarialAE(z_dim=2).eval()
        model.load_state_dict(state)
        (images, labels), seen = self.mnist.load_digits(train=False), self.mnist.load_digits()[0][:749]
        with torch.no_grad():
            (recon_x, codes), (seen_recon_x, seen_codes) = model(images), model(seen)
        errors = ((recon_x - images).double()**2).mean((1, 2, 3))
        self.assertRegex(out, r"(?s)z_dim 2, deterministic encoder, residual networks, 299 test images of the bundled "
                              rf"digits.* {errors.mean():.4f} .*Parzen log-likelihood.*  nats +-?\d+\.\d \+- \d+\.\d")
        per_label = {str(label): errors[labels == label].mean().item() for label in range(10)}
        assert_close(metrics["reconstruction"], {"mse": errors.mean().item(), "mse_per_label": per_label})
        match, seen_match, prior_match = metrics["prior_match"].values()
        assert_close(match["ks"], self.monitoring.ks_distance(codes))
        assert_close([*match["std"], *seen_match["mean"]], [*codes.std(0).tolist(), *seen_codes.mean(0).tolist()])
        self.check_close(prior_match["ks"], 0.8687 / math.sqrt(299), "this is no sample of the prior", 0.03)
        likelihood = metrics["log_likelihood"]["training_images"]
        self.assertTrue(0.06 < likelihood["sigma"] < 0.15, likelihood)  # twice as much for images in [-1, 1]
        distances = self.metrics.squared_distances((seen + 1) / 2, (images + 1) / 2)
        values = self.metrics.parzen_log_likelihood(distances, 784, likelihood["sigma"])
        assert_close([likelihood[name] for name in ("mean", "standard_error", "samples", "sigma_images")],
                     [values.mean().item(), values.std().item() / math.sqrt(299), 749, 749])
        self.assertGreater(likelihood["mean"], metrics["log_likelihood"]["training_reconstructions"]["mean"] + 10)
        quality = self.measures.classifier_quality({"test_images": images, "seen": seen_recon_x})["seen"]
        assert_close(metrics["digit_classifier"]["training_reconstructions"], quality)
        sizes = {"samples.png": (484, 484), "nearest.png": (484, 124), "manifold.png": (1204, 1204),
                 "reconstructions.png": (604, 484), "interpolations.png": (724, 604)}
        pictures = {file.name: read_png(file) for file in run.glob("evaluation/*.png")}
        self.assertEqual({name: picture.shape[::-1] for name, picture in pictures.items()}, sizes)
        column = pictures["reconstructions.png"][4:120:2, 4 + 3 * 60:60 * 4:2]  # enlarged by a factor of two
        for place, shown in ((slice(28), images), (slice(30, 58), recon_x)):
            np.testing.assert_allclose(column[place], (shown[labels == 3][0, 0] + 1) * 127.5, atol=1)

    def test_the_table_is_printed_before_the_files_are_written_and_output_is_their_place(self):
        (run, _), data = self.a_run(), [tensor[:60] for tensor in self.mnist.load_digits()]
        self.enterContext(mock.patch.object(self.__main__, "load_images", return_value=[data[0], *data]))
        (run / "evaluation").write_text("a file")
        for flags in ((), ("--output", run / "evaluation"), ("--output", run / "hparams.json" / "new")):
            result = self.evaluate_cli(run, *flags)
            self.assert_refused(result, 1, flags[-1] if flags else run / "evaluation", "cannot be written", "--output")
            self.assertIn("Parzen log-likelihood of", result[1])
        place = self.folder() / "new" / "place"
        for _ in range(2):  # the second time, over its own files
            self.assertIn(f"see: {place}\n", self.metrics_in(place, run, "--output", place)[1])
            (place / "another").write_text("kept")
        (place / "samples.png").unlink()
        (place / "samples.png").mkdir()
        self.assert_run_refused(run, "samples.png", "another folder with --output", flags=("--output", place))
        self.assertEqual((place / "another").read_text(), "kept")

    def test_choice_of_images(self):
        images, _ = self.mnist.load_digits()
        neighbours = self.pictures.nearest(images[[700, 3]] + 0.1 * images_like_mnist(2), images)
        self.assertTrue(torch.equal(neighbours, images[[700, 3]]))
        for count, seen, last in ((60_000, range(0, 50_000, 5), range(59_000, 60_000)), (10, range(5), range(5, 10))):
            parts = self.measures.split_training_images(torch.arange(count))
            self.assertEqual([part.tolist() for part in parts], [list(seen), list(last)])
        indices = self.pictures.first_of_each_label(torch.tensor([7, 2, 7, 7, 7, 7, 2]))
        self.assertEqual(indices.T.tolist(), [[1, 6, 6, 6], [0, 2, 3, 4]])

    def test_classifier_quality_tells_good_samples_from_bad_ones(self):
        (images, labels), classifier = self.mnist.load_digits(), self.classifier.load_classifier()
        sets = {"good": images[:500], "test_images": images[500:1000], "threes": images[labels == 3],
                "noise": images_like_mnist(300)}
        quality = self.measures.classifier_quality(sets)
        with torch.no_grad():
            confidences, digits = classifier(sets["good"]).softmax(1).max(1)
            distance = self.metrics.frechet(*(classifier.features(sets[name]) for name in ("good", "test_images")))
        assert_close(quality["good"], {
            "images": 500, "frechet_to_test_images": distance, "sure": (confidences >= 0.95).double().mean().item(),
            "labels": {str(label): (digits == label).double().mean().item() for label in range(10)}})
        self.assertGreater(quality["threes"]["labels"]["3"], 0.8)
        for name in ("threes", "noise"):
            self.assertGreater(quality[name]["frechet_to_test_images"], 5 * distance, name)

    def test_seed_alone_determines_the_numbers_and_the_model_stays_as_it_is(self):
        model, tiny = self.models.AdversarialAE(2, "gaussian"), TinyAAE()
        images, labels = self.mnist.load_digits(train=False)
        results = []
        for seed in (5, 5, 6):
            torch.manual_seed(len(results))
            before = snapshot(model)
            results.append(self.measures.evaluate(model, images, images[:50], labels[:50], seed))
            self.pictures.draw_pictures(model, images, images[:50], labels[:50])
            self.measures.draw_samples(tiny, 3, seed)  # from torch's own generator
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
            model, settings, file, folder = self.model_files.load_run(run)
            self.assertEqual((file, folder, settings["data_dir"]), (path, run, "nowhere"))
            self.assertLessEqual({"posterior": "deterministic", "networks": "base", **kind}.items(), settings.items())
            self.assertTrue(same(state, {name: model.state_dict()[name] for name in state}))
        (run / "hparams.json").unlink()
        few = [tensor[:200] for tensor in self.mnist.load_digits()]
        with mock.patch.object(self.model_files, "load_mnist", return_value=few) as load:
            _, out = self.metrics_in(path.parent / "evaluation", path, "--data_dir", "there")
        self.assertEqual(load.call_args.args[0], "there")
        self.assertIn("z_dim 3, universal encoder, residual networks, 200 test images of MNIST", out)

    def test_what_is_not_a_run(self):
        run, weights = self.a_run()
        self.metrics_in(run / "evaluation", weights)  # the weights of a run belong to the run
        self.assert_run_refused(run / "none", run / "none", "does not exist")
        self.assert_run_refused(run.parent, run.parent, "no hparams.json")
        for content in (b"", b"[]", b'{"z_dim": "8"}', b'{"z_dim": 2}', b"\xff", b'{"z_dim": 3, "networks": "?"}',
                        b'{"trained_on": "cifar"}', b'{"data_dir": 3}', b'{"posterior": []}', b"[" * 100_000):
            (run / "hparams.json").write_bytes(content)
            self.assert_run_refused(run, "hparams.json", "is damaged, or is from another run")
        run, _ = self.a_run(trained_on="mnist", data_dir=str(self.folder()))
        with mock.patch("torchvision.datasets.MNIST.mirrors", []):
            self.assert_run_refused(run, "could not be downloaded")
        self.assertEqual([self.evaluate_cli(*flags)[0] for flags in ((), (run, "--seed", -1))], [2, 2])

    def test_damaged_weights(self):
        run, weights = self.a_run()
        whole, state = weights.read_bytes(), torch.load(weights)
        decoder = {name: weight for name, weight in state.items() if name.startswith("decoder")}
        for content, words in ((b"nonsense", "is damaged"), (whole[:-100], "is damaged"), ([1, 2], "not contain"),
                               ({"encoder": {}}, "not contain"), ({}, "another model"), (decoder, "another model"),
                               ({"decoder.net.0.weight": torch.tensor(3.0)}, "another model"),
                               (self.models.AdversarialAE(4).state_dict(), "from another run"),
                               ({"weight": torch.tensor([math.nan])}, "has diverged"),
                               ({name: 1e10 * weight for name, weight in state.items()}, "has diverged")):
            weights.write_bytes(content if isinstance(content, bytes) else self.files.serialize(content))
            self.assert_run_refused(run, words)
        weights.write_bytes(whole)
        with mock.patch.object(self.measures, "draw_samples", return_value=torch.full((1, 1, 28, 28), math.inf)):
            self.assert_run_refused(run, "has diverged")

    def test_missing_or_damaged_classifier(self):
        (run, _), weights = self.a_run(), self.folder() / "digit_classifier.pt"
        self.enterContext(mock.patch.object(self.classifier, "CLASSIFIER", weights))
        self.assert_run_refused(run, weights, "is missing; restore it")
        whole = bytearray(self.files.serialize(self.classifier.digit_classifier().half().state_dict()))
        whole[len(whole) // 2] ^= 64  # one bit, which torch.load does not notice
        for content in (bytes(whole), self.files.serialize([1])):
            weights.write_bytes(content)
            self.assert_run_refused(run, weights, "is damaged")
        self.assertFalse((run / "evaluation").exists())
