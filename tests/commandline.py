"""Flags and user errors."""

import json
import os
import unittest
from argparse import Namespace
from unittest import mock

import torch

from tests.common import TrainGroup
from training.run import resumed_args

__unittest = True


class Flags(TrainGroup):
    """The command line: defaults, help, --base, and flags that are rejected before a run is created."""

    def test_defaults(self):
        expected = {"z_dim": 8, "batch_size": 64, "lambda_": 0.995, "ae_lr": 1e-3, "d_lr": 5e-3, "data_dir": "../data/",
                    "epochs": 100, "seed": 42, "log_dir": "AAE_logs/", "no_cuda": False}
        args = vars(self.train.parse_args([]))
        self.assertEqual({name: args[name] for name in expected}, expected)
        self.assertIn(args["num_workers"], (0, 4))

    def test_help_explains_every_flag(self):
        status, out, _ = self.run_cli("--help")
        self.assertEqual(status, 0)
        actions = self.train.make_parser()._actions
        self.assertGreaterEqual(len(actions), 14)
        for action in actions:
            self.assertRegex(action.help, r"\A[^\n]{10,}\Z", action.option_strings)
            self.assertIn(action.option_strings[-1], out)
        self.assertIn("(default: 0.995)", out)
        self.assertNotRegex(out, r"default:\s+(None|False)")

    def test_invalid_flags_are_rejected_in_one_sentence(self):
        log_dir = self.folder() / "none"
        for flags in ("--lambda_ 1.01", "--lambda_ -0.1", "--lambda_ nan", "--lambda_ half", "--z_dim 0", "--z_dim 2.5",
                      "--batch_size 0", "--batch_size -64", "--epochs 0", "--ae_lr -1e-3", "--ae_lr nan", "--ae_lr inf",
                      "--d_lr -1", "--num_workers -1", "--seed -1", "--seed 9999999999999999999999", "--seed x",
                      "--dataset cifar", "--epoch 3", "--lamda_ 1", "--z_dim", "digits", "--nonsense",
                      "--epochs 1" + "0" * 400, "--batch_size 99999999999999999999", "--lambda_ -inf",
                      "--checkpoint_every 0"):
            with mock.patch.object(self.train, "main", side_effect=AssertionError("the run was started")):
                status, out, err = self.run_cli(*flags.split(), *([] if flags == "--z_dim" else ["--log_dir", log_dir]))
            self.assertEqual((status, out), (2, ""), flags)
            self.assertRegex(err, r"\Atrain\.py: error: .+\n\Z|\A\S+: error: [^\n]+\n\Z", flags)

    def test_base_is_short_for_its_four_flags(self):
        short, spelled_out = (vars(self.train.parse_args(argv)) for argv in (["--base"], self.train.BASE))
        self.assertEqual(short, spelled_out)
        self.assertEqual(set(short["explicit_flags"]), {"networks", "drop_after", "d_momentum", "averaging"})
        for argv in (["--base", "--d_momentum", "0.9"], ["--d_momentum", "0.9", "--base"]):
            args = self.train.parse_args(argv)
            self.assertEqual((args.networks, args.drop_after, args.d_momentum, args.averaging), ("base", 0, 0.9, 0))

    def test_resume_with_base_is_checked_like_its_four_flags(self):
        base, default = (vars(self.train.parse_args(argv)) for argv in (["--base"], []))
        self.assertEqual(resumed_args(self.train.parse_args(["--base"]), base).networks, "base")
        for argv, settings in ((["--base"], default), (["--base", "--d_momentum", "0.9"], base)):
            with self.assertRaisesRegex(self.cli.FlagError, "contradicts the run"):
                resumed_args(self.train.parse_args(argv), settings)

    def test_base_in_a_namespace_is_short_for_its_four_flags(self):
        args = self.train.with_defaults(Namespace(base=True, d_momentum=0.9))
        self.assertEqual((args.networks, args.drop_after, args.d_momentum, args.averaging), ("base", 0, 0.9, 0))
        self.assertNotIn("base", args)

    def test_a_run_with_base_records_the_four_settings_alone(self):
        run, _ = self.train_quietly("--epochs", "1", "--base")
        settings = json.loads((run / "hparams.json").read_text())
        self.assertNotIn("base", settings)
        self.assertEqual([settings[name] for name in ("networks", "drop_after", "d_momentum", "averaging")],
                         ["base", 0, 0, 0])


class BadInput(TrainGroup):
    """Errors that the user can fix end a run with status 1 and one sentence."""

    def assert_refused(self, result, *fragments):
        status, _, err = result
        self.assertEqual(status, 1, err)
        self.assertEqual(len(err.strip().splitlines()), 1, err)
        self.assertNotIn("Traceback", err)
        for fragment in fragments:
            self.assertIn(str(fragment), err)

    def run_digits(self, *flags):
        with self.few_digits:
            return self.run_cli("--dataset", "digits", "--no-cuda", "--epochs", 1, *flags)

    def test_log_dir_that_is_a_file(self):
        file = self.folder() / "file"
        file.write_text("")
        self.assert_refused(self.run_digits("--log_dir", file), file, "--log_dir")
        self.assert_refused(self.run_digits("--log_dir", file / "below"), file, "--log_dir")

    def test_data_dir_that_is_a_file(self):
        folder = self.folder()
        (folder / "file").write_text("")
        for dataset in ("auto", "mnist"):
            self.assert_refused(self.run_cli("--dataset", dataset, "--data_dir", folder / "file", "--log_dir",
                                             folder / "logs"), folder / "file", "--data_dir")
        self.assertFalse((folder / "logs").exists())

    @unittest.skipIf(not hasattr(os, "geteuid") or os.geteuid() == 0, "root can write to every folder")
    def test_log_dir_that_cannot_be_written(self):
        folder = self.folder()
        folder.chmod(0o500)
        self.addCleanup(folder.chmod, 0o700)
        self.assert_refused(self.run_digits("--log_dir", folder), folder, "--log_dir")

    def test_damaged_data(self):
        folder = self.folder()
        raw = folder / "MNIST" / "raw"
        raw.mkdir(parents=True)
        (raw / "train-images-idx3-ubyte").write_bytes(b"half")
        with mock.patch("torchvision.datasets.MNIST.mirrors", []):
            for dataset in ("auto", "mnist"):
                result = self.run_cli("--dataset", dataset, "--data_dir", folder, "--log_dir", folder / "logs")
                self.assert_refused(result, "is damaged")
        self.assertFalse((folder / "logs").exists())

    def test_mnist_never_falls_back(self):
        with mock.patch("torchvision.datasets.MNIST.mirrors", []):
            result = self.run_cli("--dataset", "mnist", "--data_dir", self.folder(), "--log_dir", self.folder())
        self.assert_refused(result, "could not be downloaded")

    def test_not_enough_memory(self):
        log_dir = self.folder()
        self.assert_refused(self.run_digits("--log_dir", log_dir, "--z_dim", 2**31 - 1), "not enough memory")
        self.assertEqual(list(log_dir.iterdir()), [], "a run that never trained leaves files behind")

    def test_gpu_that_is_full_or_busy(self):
        full = ("the GPU does not have enough free memory, or another program has exclusive use of it; end other "
                "programs, try a smaller --batch_size or --z_dim, or use --no-cuda")
        for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total ..."),
                      RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
                      RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
                      RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"),
                      RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
                      RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
                      RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
                      RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")):
            with mock.patch.object(self.train, "main", side_effect=error):
                self.assertEqual(self.run_cli(), (1, "", f"train.py: error: {full}\n"))

    def test_programming_errors_keep_their_traceback(self):
        with mock.patch.object(self.train, "main", side_effect=RuntimeError("a bug")), self.assertRaises(RuntimeError):
            self.run_cli()

    def test_interrupt_before_training(self):
        with mock.patch.object(self.data, "digits", side_effect=KeyboardInterrupt):
            status, _, err = self.run_cli("--dataset", "digits")
        self.assertEqual((status, err.strip()), (130, "interrupted"))

    def test_full_disk(self):
        folder, full = self.folder(), OSError(28, "No space left on device")
        writer = "tensorboard.summary.writer.record_writer.RecordWriter.write"
        for place, named in (("os.fsync", "hparams.json"), (writer, folder), ("train.generate_and_save", folder),
                             ("train.save_measurements", folder)):
            with mock.patch(place, side_effect=full):
                self.assert_refused(self.run_digits("--log_dir", folder), named, "No space left")

    def test_divergence(self):
        flags = ("--log_dir", self.folder(), "--ae_lr", "1e9")
        self.assert_refused(self.run_digits(*flags), "before step 3 of epoch 1", "diverged")
        with mock.patch.object(self.train.TensorBoardLogger.__init__, "__defaults__", (1, None)):  # read at each step
            self.assert_refused(self.run_digits(*flags, "--batch_size", 10), "of epoch 1", "diverged")
