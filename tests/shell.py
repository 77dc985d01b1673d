"""Runs in processes of their own: shells and systems in which messages, paths or imports could fail."""

import json
import os
import signal
import subprocess
import sys
import unittest
from pathlib import Path
from unittest import mock

import torch

from tests.common import TrainGroup, read_events, read_png
from unittests import HERE

__unittest = True

CLOSE_STREAMS = "import os, sys; os.close(1); os.close(2); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


class Shell(TrainGroup):
    """Signals, streams, folders and modules as a user's shell may have them."""

    def command(self, log_dir, epochs=1):
        return [str(HERE / "train.py"), "--dataset", "digits", "--epochs", str(epochs), "--no-cuda", "--log_dir",
                str(log_dir)]

    def run_of(self, log_dir):
        """Return the only run in a folder, after a look at its weights."""
        run, = Path(log_dir).iterdir()
        weights = torch.load(run / "checkpoints/model_checkpoint.pt", weights_only=True)
        self.models.AdversarialAE().load_state_dict(weights)
        return run

    @unittest.skipIf(os.name == "nt", "on Windows, another variable names the home folder")
    def test_home_folder_ascii_and_a_folder_named_tensorflow(self):
        home = self.folder()
        (home / "tensorflow").mkdir()  # an empty package, which TensorBoard would take for TensorFlow
        environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(home), "PYTHONIOENCODING": "ascii"}
        result = subprocess.run([sys.executable, *self.command("~/\u00dc"), "--data_dir", "~/data"], env=environment,
                                capture_output=True, text=True)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertIn(f"run:    {home}/\\xdc/", result.stdout)
        settings = json.loads((self.run_of(home / "\u00dc") / "hparams.json").read_text(encoding="utf-8"))
        self.assertEqual(settings["data_dir"], str(home / "data"))

    @unittest.skipIf(os.name == "nt", "Windows has no exec")
    def test_missing_streams(self):  # as after 2>&- and >&-
        log_dir = self.folder()
        closed = [sys.executable, "-c", CLOSE_STREAMS, *self.command(log_dir)]
        self.assertEqual(subprocess.run(closed, capture_output=True).returncode, 0)
        self.run_of(log_dir)

    def test_closed_standard_output_does_not_end_a_run(self):
        log_dir = self.folder()
        with subprocess.Popen([sys.executable, *self.command(log_dir)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True) as process:
            process.stdout.close()
            err = process.stderr.read()
        self.assertEqual((process.returncode, err), (0, ""))
        self.run_of(log_dir)

    @unittest.skipIf(os.name == "nt", "Windows has no SIGINT to send")
    def test_interrupted_run_leaves_everything_readable(self):
        log_dir = self.folder()
        with subprocess.Popen([sys.executable, *self.command(log_dir, 1000)], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True) as process:
            try:
                any(line.startswith("epoch 2") for line in process.stdout)
                process.send_signal(signal.SIGINT)
                _, err = process.communicate(timeout=60)
            finally:
                process.kill()
        self.assertEqual(process.returncode, 130, err)
        run = self.run_of(log_dir)
        self.assertRegex(err, rf"stopped by SIGINT after \d+ epochs and \d+ steps; resume it with: "
                              rf"python train.py --resume {run}")
        events = read_events(run)
        self.assertGreaterEqual(len(events.Images("samples")), 2)
        self.assertGreaterEqual(events.Scalars("generator/recon_loss")[-1].step, 48)
        pictures = [file for file in (run / "results").rglob("*") if file.is_file()]
        self.assertGreaterEqual(len([read_png(file) for file in pictures]), 4)

    def test_commands_are_quoted_for_the_systems_shell(self):
        self.assertEqual(self.cli.shell_command("tensorboard", "a b"), "tensorboard 'a b'")
        with mock.patch("os.name", "nt"):
            self.assertEqual(self.cli.shell_command("tensorboard", "a b"), 'tensorboard "a b"')

    def test_errors_of_a_students_code_keep_their_traceback(self):
        missing = FileNotFoundError(2, "No such file or directory", "weights.txt")
        for place in ("AdversarialAE", "train_aae"):
            with mock.patch.object(self.train, place, side_effect=missing), self.assertRaises(FileNotFoundError), \
                    self.few_digits:
                self.run_cli("--dataset", "digits", "--no-cuda", "--log_dir", self.folder())
