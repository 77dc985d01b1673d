"""The evaluation of a trained model, and the digit classifier."""

import contextlib
import io
import json
import math
from unittest import mock

import numpy as np
import torch
import torch.nn as nn

from tests.common import TinyAAE, TrainGroup, read_png
from training.random_state import random_states
from unittests import Recorder, images_like_mnist, same, snapshot

__unittest = True


class Evaluation(TrainGroup):
    """python -m evaluation on models of the bundled digits, and the digit classifier."""

    needs = (*TrainGroup.needs, "evaluation.__main__", "evaluation.classifier", "evaluation.measures",
             "evaluation.metrics", "evaluation.model_files", "evaluation.pictures", "training.checkpoint")

    def setUp(self):
        super().setUp()
        few = mock.patch.object(self.measures, "SAMPLES", 300)
        few.start()
        self.addCleanup(few.stop)

    def a_run(self, z_dim=3, **settings):
        """Return a run's folder with the weights of a new model."""
        run = self.folder() / "run"
        (run / "checkpoints").mkdir(parents=True)
        settings = {"z_dim": z_dim, "networks": "residual", "trained_on": "digits", "data_dir": "nowhere", **settings}
        (run / "hparams.json").write_text(json.dumps(settings))
        torch.save(self.models.AdversarialAE(z_dim).state_dict(), run / "checkpoints" / "model_checkpoint.pt")
        return run

    def evaluate_cli(self, *flags):
        """Run the command line in this process; return its exit status, standard output and standard error."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = self.__main__.cli([str(flag) for flag in flags] + ["--no-cuda"])
            except SystemExit as stop:
                status = stop.code
        return status, out.getvalue(), err.getvalue()

    def metrics_of(self, run, *flags):
        status, out, err = self.evaluate_cli(run, *flags)
        self.assertEqual((status, err), (0, ""))
        return json.loads((run / "evaluation" / "metrics.json").read_text()), out

    def assert_refused(self, *fragments, flags):
        status, _, err = self.evaluate_cli(*flags)
        self.assertEqual(status, 1, err)
        self.assertRegex(err, r"\Apython -m evaluation: error: [^\n]+\n\Z")
        for fragment in fragments:
            self.assertIn(str(fragment), err)

    def test_a_trained_run(self):
        run, state = self.train_quietly("--epochs", "1", "--z_dim", "2")
        before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
        metrics, out = self.metrics_of(run)
        for file, content in before.items():
            self.assertEqual(file.read_bytes(), content, f"{file} was changed")
        model = self.models.AdversarialAE(z_dim=2)
        model.load_state_dict(state)
        images, labels = self.mnist.load_digits(train=False)
        with torch.no_grad():
            recon_x, codes = model.eval()(images)
        errors = ((recon_x - images).double()**2).mean((1, 2, 3))
        self.check_close(metrics["reconstruction"]["mse"], errors.mean(), "the reconstruction error is wrong")
        for label in range(10):
            self.check_close(metrics["reconstruction"]["mse_per_label"][str(label)], errors[labels == label].mean(),
                             f"the reconstruction error of label {label} is wrong")
        self.check_prior_match(metrics["prior_match"], model, codes)
        self.assertEqual((metrics["test_images"], metrics["z_dim"], metrics["trained_on"]), (299, 2, "digits"))
        self.assertRegex(out, r"(?s)z_dim 2, deterministic encoder, residual networks, 299 test images of the bundled "
                              r"digits.*Parzen log-likelihood of.*  nats +-?\d+\.\d \+- \d+\.\d")
        self.assertIn(f"{errors.mean():.4f}", out)

    def check_prior_match(self, match, model, codes):
        """Check metrics["prior_match"] against a model's codes of the test images and of the training images."""
        self.check_close(match["codes"]["std"][1], codes[:, 1].double().std(), "the codes' deviation is wrong")
        self.check_close(match["codes"]["ks"], self.metrics.ks_distance(codes),
                         "the KS distance is not the test codes'")
        with torch.no_grad():
            seen = model.encoder(self.mnist.load_digits(train=True)[0][:749])
        self.check_close(match["training_codes"]["mean"][1], seen[:, 1].double().mean(),
                         "the training codes' mean is wrong")
        self.check_close(match["prior_draws"]["ks"], 0.8687 / math.sqrt(299),
                         "the prior samples are not from the prior", 0.03)

    def test_pictures(self):
        from PIL import Image

        run = self.a_run(z_dim=2)
        self.metrics_of(run)
        columns_and_rows = {"samples": (8, 8), "nearest": (8, 2), "manifold": (20, 20), "reconstructions": (10, 8),
                            "interpolations": (12, 10)}
        expected = {f"{name}.png": tuple(2 * (30 * count + 2) for count in counts)
                    for name, counts in columns_and_rows.items()} | {"codes.png": (910, 800)}
        sizes = {}
        for file in (run / "evaluation").glob("*.png"):
            with Image.open(file) as image:
                sizes[file.name] = image.size
        self.assertEqual(sizes, expected)
        images, labels = self.mnist.load_digits(train=False)
        shown = read_png(run / "evaluation" / "reconstructions.png")[4:60:2, 4 + 3 * 60:60 * 4:2]
        third = images[labels == 3][0, 0]
        self.assertTrue(np.array_equal(shown, ((third + 1) * 127.5).round()),
                        "the first image of the fourth column is not the first 3")

    def test_training_images_are_split_evenly(self):
        images = torch.arange(60_000)
        seen, last = self.measures.split_training_images(images)
        self.assertEqual((len(seen), len(last), last[0], last[-1]), (10_000, 1_000, 59_000, 59_999))
        self.assertEqual(seen.diff().unique().tolist(), [5])
        seen, last = self.measures.split_training_images(images[:10])
        self.assertEqual((seen.tolist(), last.tolist()), ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9]))

    def test_log_likelihood_is_compared_with_that_of_training_images(self):
        model, (images, labels) = self.models.AdversarialAE(z_dim=2), self.mnist.load_digits()
        with mock.patch.object(self.measures, "SAMPLES", 300):
            likelihood = self.measures.evaluate(model, images, images[-300:], labels[-300:])["log_likelihood"]
        with torch.no_grad():
            reconstructions = model.eval()(images[:749])[0]
        for name, windows in (("training_images", images[:749]), ("training_reconstructions", reconstructions)):
            expected = self.measures.log_likelihood(windows, images[749:], images[-300:])
            self.assertEqual(likelihood[name]["samples"], 749)
            self.check_close(likelihood[name]["mean"], expected["mean"], f"the log-likelihood with {name} is wrong")
        self.assertGreater(likelihood["training_images"]["mean"], likelihood["training_reconstructions"]["mean"] + 10)

    def test_log_likelihood_is_that_of_images_in_0_1(self):
        images, _ = self.mnist.load_digits()
        samples, held_out, test = images[:300], images[300:500], images[500:600]
        result = self.measures.log_likelihood(samples, held_out, test)
        values = self.metrics.parzen_log_likelihood((samples + 1) / 2, (test + 1) / 2, result["sigma"])
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
        for name in ("good", "noise"):
            self.check_close(sum(quality[name]["labels"].values()), 1, "the shares of the labels do not add up to 1")
        classifier = self.classifier.load_classifier()
        with torch.no_grad():
            confident = (classifier(images[:500]).softmax(1).amax(1) >= 0.95).double().mean()
        self.check_close(quality["good"]["sure"], confident, "the share of confidences of at least 0.95 is wrong")

    def test_same_seed_same_numbers(self):
        run = self.a_run()
        results = []
        for seed in (5, 5, 6):
            torch.manual_seed(len(results))
            metrics, _ = self.metrics_of(run, "--seed", seed)
            results.append({name: value for name, value in metrics.items() if name not in ("seconds", "seed")})
        self.assertEqual(results[0], results[1])
        self.assertNotEqual(results[0]["log_likelihood"], results[2]["log_likelihood"])

    def test_model_and_random_states_do_not_change(self):
        model = self.models.AdversarialAE(z_dim=2).train()
        images, labels = self.mnist.load_digits(train=False)
        before, streams = snapshot(model), random_states(model)
        self.measures.evaluate(model, images, images[:50], labels[:50])
        self.pictures.draw_pictures(model, images, images[:50], labels[:50])
        self.assertTrue(same(before[0], snapshot(model)[0]))
        self.assertEqual(before[1], snapshot(model)[1])
        for name, stream in random_states(model).items():
            self.assertTrue(torch.equal(stream, streams[name]), f"the random state {name} has changed")

    def test_interpolation_is_spherical(self):
        start, end = torch.randn(8), 2 * torch.randn(8)
        path = self.pictures.interpolate(start, end, torch.linspace(0, 1, 5))
        for code, expected in ((path[0], start), (path[4], end)):
            self.assertTrue(torch.allclose(code, expected, atol=1e-5), "the path does not connect the two codes")
        norms = path.norm(dim=1)
        self.assertTrue(torch.allclose(norms.diff(), norms.diff().mean().expand(4), atol=1e-5),
                        "the norm changes unevenly")
        turns = nn.functional.cosine_similarity(path[1:], path[:-1]).acos()
        self.assertTrue(torch.allclose(turns, turns.mean().expand(4), atol=1e-3), "the direction rotates unevenly")
        for end in (-start, start, torch.zeros(8)):
            self.assertTrue(self.pictures.interpolate(start, end, torch.linspace(0, 1, 5)).isfinite().all())

    def test_nearest_training_image(self):
        images, _ = self.mnist.load_digits()
        neighbours = self.pictures.nearest(images[[700, 3]] + 0.1 * images_like_mnist(2), images)
        self.assertTrue(torch.equal(neighbours, images[[700, 3]]))

    def test_manifold_has_the_prior_quantiles(self):
        model = TinyAAE()
        model.decoder = Recorder(self.models.ConvDecoder(2))
        with torch.no_grad():
            self.pictures.draw_manifold(model, side=4)
        codes, = model.decoder.inputs
        quantiles = torch.erf(codes / math.sqrt(2)) / 2 + 0.5
        self.assertTrue(torch.allclose(quantiles[:5, 0], torch.tensor([1, 3, 5, 7, 1]) / 8),
                        "the first dimension does not increase to the right, by quantiles")
        self.assertTrue(torch.allclose(quantiles[::4, 1], torch.tensor([7, 5, 3, 1]) / 8),
                        "the second dimension does not increase upwards, by quantiles")

    def test_weights_without_a_run_or_discriminator(self):
        folder, weights, found = self.folder(), self.models.AdversarialAE(5).half().state_dict(), []
        few = [tensor[:200] for tensor in self.mnist.load_digits()]
        for parts in ("encoder.", "decoder.", "discriminator."), ("encoder.", "decoder."):
            torch.save({name: weights[name] for name in weights if name.startswith(parts)}, folder / "some.pt")
            with mock.patch.object(self.model_files, "load_mnist", return_value=few) as load:
                status, out, err = self.evaluate_cli(folder / "some.pt", "--data_dir", "there")
            self.assertEqual((status, err, load.call_args.args[0]), (0, "", "there"))
            self.assertIn("z_dim 5, deterministic encoder, residual networks, 200 test images of MNIST", out)
            metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
            found.append({name: value for name, value in metrics.items() if name not in ("seconds", "weights_md5")})
        self.assertEqual(*found)
        torch.save({name: weights[name] for name in weights if name.startswith("decoder.")}, folder / "some.pt")
        self.assert_refused(folder / "some.pt", "another model", flags=[folder / "some.pt"])

    def test_each_posterior_with_and_without_a_run(self):
        for kind in (("gaussian", "residual"), ("universal", "residual"), ("deterministic", "base"),
                     ("universal", "base")):
            run = self.a_run(posterior=kind[0], networks=kind[1])
            model, path = self.models.AdversarialAE(3, *kind), run / "checkpoints" / "model_checkpoint.pt"
            torch.save(model.state_dict(), path)
            inferred = self.model_files.settings_from_weights(path, model.state_dict())
            for settings in (self.metrics_of(run)[0], inferred):
                self.assertEqual((settings["posterior"], settings["networks"]), kind)

    def test_older_runs_have_base_networks(self):
        run = self.a_run(networks="base")
        settings = json.loads((run / "hparams.json").read_text())
        del settings["networks"]
        (run / "hparams.json").write_text(json.dumps(settings))
        weights = self.models.AdversarialAE(3, networks="base").state_dict()
        torch.save(weights, run / "checkpoints" / "model_checkpoint.pt")
        self.assertEqual(self.metrics_of(run)[0]["networks"], "base")

    def test_weights_within_a_run(self):
        run = self.a_run()
        self.assertEqual(self.evaluate_cli(run / "checkpoints" / "model_checkpoint.pt")[0], 0)
        self.assertTrue((run / "evaluation" / "metrics.json").is_file())

    def test_paths_that_are_not_runs(self):
        folder = self.folder()
        self.assert_refused(folder / "none", "does not exist", flags=[folder / "none"])
        self.assert_refused(folder, "no hparams.json", flags=[folder])
        (folder / "hparams.json").write_text('{"z_dim": 8}')
        self.assert_refused(folder, "model_checkpoint.pt yet", flags=[folder])
        self.assertEqual(self.evaluate_cli()[0], 2)
        self.assertEqual(self.evaluate_cli(folder, "--seed", -1)[0], 2)

    def test_diverged_model_is_rejected(self):
        run = self.a_run()
        file = run / "checkpoints" / "model_checkpoint.pt"
        weights = torch.load(file, weights_only=True)
        torch.save({name: 1e10 * tensor for name, tensor in weights.items()}, file)
        status, _, err = self.evaluate_cli(run)
        self.assertEqual((status, err.count("\n")), (1, 1), err)
        self.assertIn("its training has diverged", err)

    def test_damaged_settings(self):
        run = self.a_run()
        for content in ("", "{", "[]", "null", "{}", '{"z_dim": "8"}', '{"z_dim": 0}', '{"z_dim": true}', "\ud8ff",
                        '{"z_dim": 8, "trained_on": "cifar"}', '{"z_dim": 8, "posterior": "none"}',
                        '{"z_dim": 8, "posterior": []}', '{"z_dim": 8, "data_dir": 3}', "[" * 100_000):
            (run / "hparams.json").write_bytes(content.encode("utf-8", "surrogatepass"))
            self.assert_refused("hparams.json is damaged", flags=[run])

    def test_damaged_weights(self):
        run = self.a_run()
        weights = run / "checkpoints" / "model_checkpoint.pt"
        whole = weights.read_bytes()
        for content in (b"", b"nonsense", whole[:-100], whole[:5000] + bytes(64) + whole[5064:]):
            weights.write_bytes(content)
            self.assert_refused(weights, "is damaged", flags=[run])
        for content, words in (([1, 2], "not contain"), ({"encoder": {}}, "not contain"), ({}, "does not fit"),
                               (self.models.AdversarialAE(4).state_dict(), "does not fit"),
                               ({"weight": torch.tensor([math.nan])}, "diverged")):
            torch.save(content, weights)
            self.assert_refused(weights, words, flags=[run])
        torch.save({"weight": torch.zeros(3)}, run / "other.pt")
        self.assert_refused(run / "other.pt", "another model", flags=[run / "other.pt"])

    def test_missing_mnist(self):
        run = self.a_run(trained_on="mnist")
        with mock.patch("torchvision.datasets.MNIST.mirrors", []):
            self.assert_refused("could not be downloaded", flags=[run, "--data_dir", self.folder()])

    def test_folder_that_cannot_be_written(self):
        run = self.a_run()
        (run / "evaluation").write_text("a file")
        self.assert_refused(run / "evaluation", "cannot be written", flags=[run])

    def test_full_disk(self):
        run = self.a_run()
        with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
            self.assert_refused(run / "evaluation", "No space left", flags=[run])
        self.assertEqual(list((run / "evaluation").iterdir()), [])

    def test_programming_errors_keep_their_traceback(self):
        with mock.patch.object(self.__main__, "main", side_effect=RuntimeError("a bug")), \
                self.assertRaises(RuntimeError):
            self.evaluate_cli("run")

    def test_missing_or_damaged_classifier(self):
        run, weights = self.a_run(), self.folder() / "digit_classifier.pt"
        with mock.patch.object(self.classifier, "WEIGHTS", weights):
            self.assert_refused(weights, "is missing; restore it", flags=[run])
            whole = bytearray(self.checkpoint.serialize(self.classifier.DigitClassifier().half().state_dict()))
            whole[len(whole) // 2] ^= 64  # one bit, which torch.load does not notice
            for content in (b"half", bytes(whole), self.checkpoint.serialize([1])):
                weights.write_bytes(content)
                self.assert_refused(weights, "is damaged", flags=[run])
        self.assertFalse((run / "evaluation").exists())

    def test_classifier_knows_digits(self):
        classifier = self.classifier.load_classifier()
        images, labels = self.mnist.load_digits(train=False)
        self.assertGreater(self.classifier.accuracy(classifier, images, labels), 0.85)
        features, probabilities = self.classifier.features_and_probabilities(classifier, images)
        self.assertEqual((features.shape, probabilities.shape), ((299, 64), (299, 10)))
        self.assertGreaterEqual(float(features.min()), 0)
        self.assertTrue(torch.allclose(probabilities, classifier(images).softmax(1), atol=1e-5))
        self.assertEqual({tensor.dtype for tensor in classifier.parameters()}, {torch.float32})
        self.assertLess(self.classifier.WEIGHTS.stat().st_size, 1e6)

    def test_classifier_is_trained(self):
        images, labels = (tensor[:600] for tensor in self.mnist.load_digits())
        trained = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            trained.append(self.classifier.train_classifier(self.mnist.BatchLoader(images, labels, 60), 2, seed))
        self.assertGreater(self.classifier.accuracy(trained[0], images, labels), 0.7)
        self.assertTrue(same(trained[0].state_dict(), trained[1].state_dict()), "two trainings with one seed differ")
        self.assertFalse(same(trained[0].state_dict(), trained[2].state_dict()), "two seeds gave the same weights")

    def test_distorted_images_stay_digits(self):
        image = self.mnist.load_digits()[0][:1].expand(200, 1, 28, 28)
        distorted = self.classifier.distorted(image)
        self.assertLessEqual(float(distorted.abs().max()), 1 + 1e-6)
        self.assertTrue((distorted[:, :, 0, 0] == -1).all(), "padding is not the background")
        ink = [(images + 1).sum((1, 2, 3)).mean() for images in (distorted, image)]
        self.check_close(ink[0] / ink[1], 1, "the digits become thinner or thicker", 0.05)
        self.assertLess(float((distorted.mean(0) - image[0]).abs().mean()), 0.3)
