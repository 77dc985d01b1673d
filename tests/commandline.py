"""Flags and user errors."""

import os
import shutil
from argparse import Namespace
from unittest import mock

import torch

from tests.common import TrainGroup
from training import files
from training.run import resumed_args

__unittest = True


class Flags(TrainGroup):
    """The command line: defaults, help, --base, and flags that are rejected before a run is created."""

    def test_defaults_and_help(self):
        expected = {"z_dim": 8, "batch_size": 64, "lambda_": 0.995, "ae_lr": 1e-3, "d_lr": 5e-3, "data_dir": "../data/",
                    "epochs": 100, "seed": 42, "log_dir": "AAE_logs/", "no_cuda": False, "num_workers": 0}
        self.assertLessEqual(expected.items(), vars(self.train.parse_args([])).items())
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

    def test_base_is_short_for_its_four_flags(self):
        parse, names = self.train.parse_args, ("networks", "drop_after", "d_momentum", "averaging")
        base, default = vars(parse(["--base"])), vars(parse([]))
        self.assertEqual(base, vars(parse(self.train.BASE)))
        self.assertEqual(default.keys() - {"defaulted"} - base["defaulted"].keys(), set(names))
        for args in (parse(["--base", "--d_momentum", "0.9"]), parse(["--d_momentum", "0.9", "--base"]),
                     self.train.with_defaults(Namespace(base=True, d_momentum=0.9))):
            self.assertEqual([getattr(args, name) for name in names], ["base", 0, 0.9, 0])
            self.assertNotIn("base", args)

    def test_what_differs_from_what_was_parsed_was_given(self):
        parse, settings = self.train.parse_args, {"epochs": 4, "lambda_": 1.0, "networks": "residual"}
        parsed = parse(["--lambda_", "1"])
        parsed.epochs = 6
        for args, expected in ((parsed, 6), (Namespace(epochs=100), 100), (parse([]), 4), (parse(["--epochs", "3"]),
                               "epochs 3 is less than the run's 4"), (parse(["--base"]), "networks base contradicts"),
                               (Namespace(lambda_=0.995), "lambda_ 0.995 contradicts the run")):  # a default, but given
            try:
                epochs = resumed_args(self.train.with_defaults(args), settings).epochs
            except self.cli.FlagError as error:
                self.assertIn(expected, str(error))
            else:
                self.assertEqual(epochs, expected)


class BadInput(TrainGroup):
    """Errors that the user can fix end a run with status 1 and one sentence."""

    def test_data_that_cannot_be_used(self):
        folder = self.folder()
        (folder / "MNIST" / "raw").mkdir(parents=True)
        (folder / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"half")
        for dataset, data_dir, words in (("auto", folder, "is damaged"), ("auto", __file__, f"{__file__} is a file"),
                                         ("mnist", folder / "none", "could not be downloaded")):
            flags = "--dataset", dataset, "--data_dir", data_dir, "--log_dir", folder / "logs", "--no-cuda"
            with self.subTest(words), mock.patch("torchvision.datasets.MNIST.mirrors", []):
                self.assert_refused(self.run_cli(*flags), 1, words)
        self.assertFalse((folder / "logs").exists())

    def test_log_dir_that_cannot_be_used(self):
        for log_dir, words in ((__file__, "it is a file"), (f"{__file__}/below", "Not a directory"),
                               (f"{__file__}\udcff", "not UTF-8")):
            self.assert_refused(self.run_digits("--log_dir", log_dir), 1, log_dir, words, "--log_dir")

    def test_full_disk_or_removed_folder(self):
        def remove_run(epoch, model, batches, *_):
            shutil.rmtree(next(log_dir.iterdir()))

        full, writer = OSError(28, "No space left on device"), "tensorboard.summary.writer.record_writer.RecordWriter"
        for place, effect, words in (("os.fsync", full, "hparams.json"), (f"{writer}.write", full, "No space left"),
                                     ("train.generate_and_save", full, "No space left"),
                                     ("train.train_aae", remove_run, "No such file")):
            log_dir = self.folder()
            with self.subTest(place), mock.patch(place, side_effect=effect):
                self.assert_refused(self.run_digits("--log_dir", log_dir, "--epochs", 1), 1, log_dir, words)
        self.assertEqual(list(log_dir.iterdir()), [], "the removed folder comes back")

    def test_writing_is_all_or_nothing(self):
        path, full = self.folder() / "new" / "file", OSError(28, "No space left on device")
        with mock.patch("os.fsync", side_effect=[None, OSError(22, "Invalid argument")]) as fsync:
            files.write_atomically(path, b"first")
        self.assertEqual(fsync.call_count, 1 if os.name == "nt" else 2)  # some shared folders cannot be synced
        refusal = PermissionError(13, "Access is denied")  # on Windows, while another program reads the file
        with mock.patch("os.replace", side_effect=[refusal, mock.DEFAULT], wraps=os.replace):
            files.write_atomically(path, b"second")
        for place, error in (("os.fsync", full), ("os.replace", refusal)):
            with mock.patch(place, side_effect=error), mock.patch("time.monotonic", side_effect=range(100)), \
                    self.assertRaisesRegex(self.cli.UserError, f"file cannot be written: {error.strerror}; free disk"):
                files.write_atomically(path, b"third")
        self.assertEqual({file.name: file.read_bytes() for file in path.parent.iterdir()}, {"file": b"second"})

    def test_not_enough_memory_or_a_busy_gpu(self):
        log_dir = self.folder()
        self.assert_refused(self.run_digits("--log_dir", log_dir, "--z_dim", 2**31 - 1), 1, "not enough memory")
        self.assertEqual(list(log_dir.iterdir()), [], "a run that never trained leaves files behind")
        full = ("the GPU does not have enough free memory, or another program has exclusive use of it; end other "
                "programs, try a smaller --batch_size or --z_dim, or use --no-cuda")
        for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total ..."),
                      RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
                      RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
                      RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
                      RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED")):
            with mock.patch.object(self.train, "main", side_effect=error):
                self.assertEqual(self.run_cli(), (1, "", f"train.py: error: {full}\n"))

    def test_errors_of_a_students_code_keep_their_traceback(self):
        for error in (RuntimeError("a bug"), FileNotFoundError(2, "No such file or directory", "weights.txt")):
            with mock.patch("train.train_aae", side_effect=error), self.assertRaises(type(error)):
                self.run_digits("--log_dir", self.folder())

    def test_interrupt_before_training(self):
        with mock.patch.object(self.data, "digits", side_effect=KeyboardInterrupt):
            self.assertEqual(self.run_cli("--dataset", "digits", "--no-cuda"), (130, "", "\ninterrupted\n"))

    def test_divergence(self):
        for window, most in ((50, 10), (3, 3)):  # at the end of an epoch, and of a window
            with mock.patch.object(self.train.TensorBoardLogger.__init__, "__defaults__", (window, None)), \
                    mock.patch.object(self.train, "train_step", wraps=self.train.train_step) as train_step:
                result = self.run_digits("--log_dir", self.folder(), "--ae_lr", "1e9", "--batch_size", 10)
            self.assert_refused(result, 1, "became nan", "training has diverged")
            self.assertEqual(train_step.call_count, most)
