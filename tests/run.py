"""Whole runs of main, in this process and in one of their own; flags, and errors that the user can fix."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import unittest
from argparse import Namespace
from unittest import mock

import numpy as np
import torch
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from tests.common import TrainGroup, read_events
from tests.train_run import read_png
from training import files
from training import run as runs
from unittests import HERE

__unittest = True


class WholeRun(TrainGroup):
    """`main` from start to end on the bundled digits."""

    needs = (*TrainGroup.needs, "training.monitoring")

    def test_everything_is_written(self):
        run, weights = self.train_quietly("--epochs", "5", "--z_dim", "2")
        self.assertRegex(run.name, r"\A\d{4}(_\d\d){5}\Z")
        pictures = {f"{name}_{epoch}.png" for name in ("Prior_samples/samples_epoch", "Reconstruction/reconstruction")
                    for epoch in range(6)}
        self.assertEqual({file.relative_to(run / "results").as_posix() for file in run.glob("results/*/*")}, pictures)
        self.assertEqual(len(list(run.rglob("events.out.tfevents.*"))), 1)
        events = read_events(run)
        tags, losses = events.Tags(), [f"generator/{name}" for name in ("gen_loss", "recon_loss", "ae_loss")]
        losses += [f"discriminator/{name}" for name in ("disc_loss", "loss_real", "loss_fake", "accuracy")]
        for read, shown, steps in (
                (events.Scalars, losses, [10]),  # fewer steps than a window
                (events.Scalars, ("test/recon_loss", "test/ks_distance"), [0, 1, 5]),
                (events.Scalars, ("final/test_recon_loss", "final/test_ks_distance"), [5]),
                (events.Images, ("samples", "reconstructions"), [*range(6)])):
            for tag in shown:
                self.assertEqual([event.step for event in read(tag)], steps, tag)
        tag, = (tag for tag in tags["histograms"] if tag.endswith("codes/1"))
        histograms = [(event.step, event.histogram_value.num) for event in events.Histograms(tag)]
        self.assertEqual(histograms, [(1, 30), (5, 30)])
        self.assertGreater(min(tags["histograms"]), max(tags["scalars"] + tags["images"]))  # are shown last
        experiment, session = (HParamsPluginData.FromString(events.SummaryMetadata(f"_hparams_/{name}").plugin_data
                                                            .content) for name in ("experiment", "session_start_info"))
        logged = session.session_start_info.hparams
        self.assertEqual((logged["z_dim"].number_value, logged["posterior"].string_value), (2, "deterministic"))
        self.assertEqual([info.name for info in experiment.experiment.hparam_infos if info.differs],
                         ["z_dim", "lambda_", "posterior", "networks", "epochs"])  # the first columns
        first, later = (read_png(run / f"results/Reconstruction/reconstruction_{epoch}.png") for epoch in (0, 5))
        self.assertTrue(np.array_equal(first[:31], later[:31]) and not np.array_equal(first[31:], later[31:]))
        self.assertEqual(first.shape, (62, 302), "the digits of ten labels are not shown")
        images, labels = self.few_tests
        model = self.models.AdversarialAE(z_dim=2).eval()
        model.load_state_dict(weights)
        with torch.no_grad():
            recon_x, codes = model(images)
        [loss], [distance] = events.Scalars("final/test_recon_loss"), events.Scalars("final/test_ks_distance")
        self.check_close(loss.value, (recon_x - images).square().mean(),
                         "the reconstruction loss of the test images is wrong", 1e-4)
        self.check_close(distance.value, self.monitoring.ks_distance(codes), "the KS distance is wrong", 1e-4)
        folder, shown = run / "00005" / "codes", np.pad(codes, ((0, 0), (0, 1)))  # of two, the projector shows nothing
        np.testing.assert_allclose(np.loadtxt(folder / "tensors.tsv"), shown, rtol=1e-3, atol=1e-4)
        self.assertEqual((folder / "metadata.tsv").read_text().split(), [str(label) for label in labels.tolist()])
        sprite = read_png(folder / "sprite.png")
        np.testing.assert_allclose(sprite[:28, 28:56], 127.5 * (images[1, 0] + 1), atol=1.5)

    def test_assignments_flags_alone_without_test_files_and_a_fallback_that_is_recorded(self):
        args = Namespace(z_dim=2, batch_size=64, lambda_=1.0, ae_lr=1e-3, d_lr=5e-3, data_dir=str(self.folder()),
                         epochs=1, seed=42, num_workers=4, log_dir=str(self.folder()), no_cuda=True)
        with self.few_digits, mock.patch("torchvision.datasets.MNIST.mirrors", []), \
                mock.patch.object(self.data, "load_digits", side_effect=self.mnist.DataError("gone")), \
                contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
            run = self.train.main(args)
        fallback = "WARNING: this run trains on the bundled digits instead of MNIST.*put its four files"
        self.assertRegex(err.getvalue(),  # the fallback at start and end
                         f"(?s)\\A{fallback}.*WARNING: nothing is measured on test images: gone.*{fallback}")
        settings = json.loads((run / "hparams.json").read_text())
        self.assertEqual((settings["lambda_"], settings["dataset"], settings["trained_on"]), (1, "auto", "digits"))
        self.assertIn("could not be downloaded", settings["fallback"])
        events = read_events(run)
        self.assertFalse({"test/recon_loss", "final/test_recon_loss"} & set(events.Tags()["scalars"]))
        [final], [last] = events.Scalars("final/recon_loss"), events.Scalars("generator/recon_loss")
        self.check_close(final.value, last.value, "final/recon_loss is not the mean over the epoch")

    def test_a_run_has_torchs_default_state_and_restores_what_was_set(self):  # in a notebook's earlier cell
        def state():
            return torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()

        def in_a_run(*flags):
            with mock.patch.object(self.train, "generate_and_save", lambda *_: seen.append(state())):
                model, *_ = self.parts(*flags)
            return seen.pop(), model.encoder.net[0].weight[0].tolist()

        seen = []
        expected = in_a_run()
        self.assertNotEqual(in_a_run("--seed", "4")[1], expected[1])
        self.addCleanup(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        self.addCleanup(torch.set_default_device, "cpu")  # after None, torch 2.7 knows no default
        torch.set_default_device("meta")
        with torch.no_grad():
            before = state(), torch.get_rng_state().tolist()
            self.assertEqual(in_a_run(), expected)
            self.assertEqual((state(), torch.get_rng_state().tolist()), before)

    def test_training_learns_without_a_network_or_gpu_and_tells_where_the_results_are(self):
        used, log_dir = mock.Mock(side_effect=AssertionError("the network or GPU was used")), self.folder() / "a b"
        with contextlib.ExitStack() as stack:
            for name in ("socket.socket.connect", "socket.getaddrinfo", "torch.cuda.get_device_capability",
                         "torch.cuda.get_device_name", "torch.cuda.init", "torch.cuda._lazy_init", "shutil.which"):
                stack.enter_context(mock.patch(name, used))
            status, out, err = self.run_cli("--dataset", "digits", "--epochs", 2, "--no-cuda", "--log_dir", log_dir)
        self.assertEqual((status, err, used.called), (0, "", False))
        self.assertRegex(out, r"(?s)device: cpu \(.+\).*epoch 1/2: .*epoch 2/2: .*done: .*accuracy [\d.]+%")
        losses = re.findall(r"epoch ./2: recon_loss ([\d.]+)", out)
        self.assertLess(float(losses[-1]), 0.15, f"reconstruction losses of two epochs: {losses}")
        self.assertRegex(out, r"tensorboard --logdir '.*/a b/[\d_]+'")
        self.assertNotEqual(*(files.create_run_folder(log_dir) for _ in range(2)))  # within a second


class Shell(TrainGroup):
    """Signals, streams, terminals, folders and modules as a user's shell may have them."""

    def start(self, flags, environment, **streams):
        process = self.enterContext(subprocess.Popen(
            [sys.executable, HERE / "train.py", *flags], env={**os.environ, **environment}, **streams))
        self.addCleanup(process.kill)
        return process

    @unittest.skipIf(os.name == "nt", "Windows has no SIGINT to send, and another variable for the home folder")
    def test_a_run_in_ascii_whose_output_is_closed_is_resumed_and_interrupted(self):
        home = self.folder()
        (home / "tensorflow").mkdir()  # an empty package, which TensorBoard would take for TensorFlow
        environment = {"HOME": str(home), "PYTHONPATH": str(home), "PYTHONIOENCODING": "ascii"}
        place = ["--no-cuda", "--log_dir", "~/\u00dc", "--data_dir", "~/data"]
        for flags, status, words in (
                (["--dataset", "digits", "--batch_size", "600"], 1, "train.py: error: Broken pipe; free space, .*; "),
                (["--resume", "latest"], 130, "\ninterrupted; ")):
            process = self.start([*place, *flags], environment, text=True, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE)
            lines = [next(process.stdout) for _ in range(3)]
            if status == 1:
                process.stdout.close()  # as by `| head -3`
            else:
                next(process.stdout)  # on an epoch
                process.send_signal(signal.SIGINT)
            process.wait(timeout=180)
            err = process.stderr.read()
            self.assertEqual(process.returncode, status, err)
            run, = (home / "\u00dc").iterdir()
            self.assertEqual(lines[2], f"run:    {home}/\\xdc/{run.name}\n")
            self.assertRegex(err, rf"\A{words}epoch \d+ is saved; resume the run with: python .*train\.py --resume "
                                  rf"'.*/\\xdc/{run.name}' --no-cuda\n\Z")
        self.assertEqual(json.loads((run / "hparams.json").read_text())["data_dir"], str(home / "data"))

    @unittest.skipIf(os.name == "nt", "Windows has no SIGINT to send")
    def test_an_interrupt_while_torch_is_imported(self):
        press = "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(9)\n"
        for then, status in (("finally:\n    pass", -signal.SIGINT), ("except KeyboardInterrupt:\n    import none", 1)):
            path = self.folder({"torch.py": press + then})
            process = self.start([], {"PYTHONPATH": str(path)}, stderr=subprocess.PIPE, text=True)
            self.assertEqual((process.communicate()[1], process.returncode), ("\ninterrupted\n", status))
        with mock.patch.object(self.cli, "presses", [signal.SIGINT]), mock.patch("sys.excepthook"):  # C code dropped it
            self.assertEqual(self.run_cli("--help"), (130, "", "\ninterrupted\n"))
            self.assertIs(sys.excepthook, sys.__excepthook__)  # a later error has its traceback

    def test_missing_streams(self):  # as after 2>&- and >&-
        with mock.patch.multiple(sys, stdout=None, stderr=None), self.few_digits:
            flags = *self.DIGITS, "--no-cuda", "--epochs", "1", "--log_dir", str(self.folder())
            self.assertEqual(self.program(flags), 0)

    @unittest.skipIf(os.name == "nt", "Windows has no pseudo-terminals")
    def test_every_epoch_is_a_line_at_a_terminal_above_the_bar_if_one_fits(self):
        import fcntl  # missing on Windows, as are the others
        import pty
        import termios

        for columns in (0, 80):
            ours, terminal = pty.openpty()
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, np.array([24, columns, 0, 0], np.uint16).tobytes())
            with open(terminal, "w") as stream, mock.patch.multiple(sys, stdout=stream, stderr=stream), self.few_digits:
                flags = *self.DIGITS, "--no-cuda", "--epochs", "2", "--log_dir", str(self.folder())
                self.assertEqual(self.program(flags), 0)
                shown = os.read(ours, 1 << 16).decode()
            os.close(ours)
            self.assertEqual(len(re.findall(r"(?m)[\r\n]epoch \d/2: recon_loss [^\r\n]* s\r$", shown)), 2, shown)
            self.assertEqual("left" in shown, columns > 0, shown)


class Flags(TrainGroup):
    """The command line: defaults, help, --base, and what the user can fix, told in one sentence."""

    def test_defaults_and_help(self):
        expected = {"z_dim": 8, "batch_size": 64, "lambda_": 0.995, "ae_lr": 1e-3, "d_lr": 5e-3, "data_dir": "../data/",
                    "epochs": 100, "seed": 42, "log_dir": "AAE_logs/", "no_cuda": False, "num_workers": 0}
        self.assertLessEqual(expected.items(), self.train.DEFAULTS.items())
        status, out, _ = self.run_cli("--help")
        self.assertEqual(status, 0)
        for action in self.train.make_parser()._actions:
            self.assertRegex(action.help, r"\A[^\n]{10,}\Z", action.option_strings)
        self.assertIn("(default: 0.995)", " ".join(out.split()))
        self.assertNotRegex(out, r"default:\s+(None|False)")

    def test_invalid_flags_are_rejected_in_one_sentence(self):
        for flags in ("--lambda_ 1.01", "--lambda_ nan", "--lambda_ half", "--z_dim 0", "--z_dim 2.5", "--z_dim",
                      "--epochs 1" + "0" * 400, "--ae_lr -1e-3", "--ae_lr inf", "--seed 9999999999999999999999",
                      "--dataset cifar", "--epoch 3", "--lamda_ 1", "digits"):
            with self.subTest(flags), mock.patch.object(self.train, "main") as main:
                self.assert_refused(self.run_cli(*flags.split()), 2, "train.py: error: ")
                self.assertFalse(main.called)

    def test_given_flags_come_before_base_before_the_run_before_defaults(self):
        of_run = {"epochs": 4, "lambda_": 1.0, "networks": "residual", "data_dir": "/there", "no_cuda": True}
        self.enterContext(mock.patch.multiple(runs, find_run=mock.DEFAULT, load_state=lambda _: {"settings": of_run}))
        base, default = self.train.BASE, self.train.DEFAULTS
        for given, expected in (
                (["--base", "--d_momentum", "0.9"], {**base, "d_momentum": 0.9}),
                (Namespace(d_momentum=0.9, base=True), {**base, "d_momentum": 0.9}),
                (["--resume", "x"], {"epochs": 4, "lambda_": 1.0}),
                (["--resume", "x", "--epochs", "5", "--lambda_", "1"], {"epochs": 5, "lambda_": 1.0}),
                (["--resume", "x", "--epochs", "3"], "epochs 3 contradicts the run, which has 4"),
                (["--resume", "x", "--base"], "networks base contradicts the run, which has residual"),
                (["--resume", "x", "--lambda_", "0.995"], "lambda_ 0.995 contradicts the run"),  # given, if a default
                (Namespace(resume="x", lambda_=0.5), "lambda_ 0.5 contradicts the run")):
            args = given if isinstance(given, Namespace) else self.train.parse_args(given)
            try:
                flags = vars(runs.resolve(args, default, base)[0])
            except self.cli.FlagError as error:
                self.assertIn(expected, str(error))
            else:
                expected = {**default, **vars(args), **expected, "data_dir": os.path.abspath("../data/")}
                self.assertEqual(flags, {name: expected[name] for name in default.keys() - {"base", "resume"}})

    def test_data_that_cannot_be_used(self):
        folder = self.folder({"MNIST/raw/train-images-idx3-ubyte": b"half"})
        for dataset, data_dir, words in (("auto", folder, "is damaged"), ("auto", __file__, f"{__file__} is a file"),
                                         ("mnist", folder / "none", "could not be downloaded")):
            flags = "--dataset", dataset, "--data_dir", data_dir, "--log_dir", folder / "logs", "--no-cuda"
            with self.subTest(words), mock.patch("torchvision.datasets.MNIST.mirrors", []):
                self.assert_refused(self.run_cli(*flags), 1, words)
        self.assertFalse((folder / "logs").exists())

    def test_disk_and_memory(self):
        def remove_run(epoch, model, batches, *_):
            shutil.rmtree(next(log_dir.iterdir()))

        def full(*_):  # from the first file on; TensorBoard's writer meets it when it closes, too
            if any(log_dir.rglob("hparams.json*")):
                raise OSError(28, "No space left on device")

        link, writer = self.folder() / "link", "tensorboard.summary.writer.record_writer.RecordWriter.flush"
        with contextlib.suppress(OSError):  # Windows may not allow links
            link.symlink_to(link.parent / "nowhere" / "below")
        for place, effect, flags, words in (
                ("os.fsync", full, (), "hparams.json: No space left"),
                (writer, full, (), "device; free space, check permissions, or choose another folder; nothing is saved"),
                ("train.generate_and_save", full, (), "nothing is saved yet, so start a new run"),
                ("train.train_aae", remove_run, (), "No such file"),
                ("os.abort", None, ("--log_dir", __file__), f"{__file__}: File exists; free space, check permissions"),
                ("os.abort", None, ("--log_dir", f"{__file__}/below"), "Not a directory"),
                ("os.abort", None, ("--log_dir", link), "File exists"),
                ("os.abort", None, ("--z_dim", 2**31 - 1), "lacks memory")):
            log_dir = self.folder()
            with self.subTest(words), mock.patch(place, side_effect=effect):
                self.assert_refused(self.run_digits("--log_dir", log_dir, "--epochs", 1, *flags), 1, words)
            self.assertEqual(any(log_dir.iterdir()), effect is full, "a run that never trained is there")

    def test_writing_is_all_or_nothing(self):
        path, refusal = self.folder() / "new" / "file", PermissionError(13, "Access is denied")
        with mock.patch("os.fsync", side_effect=OSError(22, "Invalid argument")):  # as on FUSE and CIFS
            files.write_atomically(path, b"first")
        with mock.patch("os.replace", side_effect=[refusal, mock.DEFAULT], wraps=os.replace):  # Windows: it is read
            files.write_atomically(path, b"second")
        for place, error in (("os.fsync", OSError(5, "Input/output error")), ("os.replace", refusal)):
            with mock.patch(place, side_effect=error), mock.patch("time.sleep"), \
                    self.assertRaises(OSError) as caught:
                files.write_atomically(path, b"third")
            self.assertEqual(caught.exception.filename, str(path))
        self.assertEqual({file.name: file.read_bytes() for file in path.parent.iterdir()}, {"file": b"second"})

    def test_errors_that_name_memory_and_those_of_a_students_code(self):
        for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), MemoryError("x"),
                      RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel"),
                      RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")):
            first, _, _ = str(error).partition("\n")
            self.assertIn(f"lacks memory: {first}; end other", self.cli.explain(error))
        with mock.patch("train.train_aae", side_effect=RuntimeError("a bug")), \
                self.assertRaisesRegex(RuntimeError, "a bug") as caught:  # with its traceback
            self.run_digits("--log_dir", self.folder())
        self.assertRegex(caught.exception.__notes__[0], r"^epoch 0 is saved; resume the run with: python .*\.py --")

    def test_divergence(self):
        for window, most in ((50, 4), (3, 3)):  # at the end of an epoch, and of a window
            with mock.patch.object(self.train.TensorBoardLogger.__init__, "__defaults__", (window, None)), \
                    mock.patch.object(self.train, "train_step", wraps=self.train.train_step) as train_step:
                result = self.run_digits("--log_dir", self.folder(), "--ae_lr", "1e9", "--batch_size", 10)
            self.assert_refused(result, 1, "became nan", "training has diverged")
            self.assertEqual(train_step.call_count, most)
