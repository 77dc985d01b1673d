"""Runs in processes of their own: shells and systems in which messages, paths or imports could fail."""

import json
import os
import signal
import subprocess
import sys
import time
import unittest
from unittest import mock

import torch

from tests.common import TrainGroup, read_events, read_png
from unittests import HERE

__unittest = True

CLOSE_STREAMS = "import os, sys; os.close(1); os.close(2); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
COMMAND = str(HERE / "train.py"), "--dataset", "digits", "--no-cuda", "--log_dir"


class Shell(TrainGroup):
    """Signals, streams, folders and modules as a user's shell may have them."""

    def run_in(self, log_dir):
        """Return the only run in a folder, after a look at its weights."""
        run, = log_dir.iterdir()
        weights = torch.load(run / "checkpoints" / "model_checkpoint.pt", weights_only=True)
        self.models.AdversarialAE().load_state_dict(weights)
        return run

    @unittest.skipIf(os.name == "nt", "Windows has no SIGINT to send, and another variable for the home folder")
    def test_a_run_in_ascii_whose_output_is_closed_and_that_is_interrupted_leaves_everything_readable(self):
        home = self.folder()
        (home / "tensorflow").mkdir()  # an empty package, which TensorBoard would take for TensorFlow
        environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(home), "PYTHONIOENCODING": "ascii"}
        command = [sys.executable, *COMMAND, "~/\u00dc", "--data_dir", "~/data"]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True) as process:
            try:
                lines = [next(process.stdout) for _ in range(4)]  # the last one on epoch 1
                process.stdout.close()  # as by `| head -4`
                while process.poll() is None and not list(home.rglob("samples_epoch_3.png")):
                    time.sleep(0.1)
                process.send_signal(signal.SIGINT)
                process.wait(timeout=60)
            finally:
                process.kill()
            err = process.stderr.read()
        self.assertEqual(process.returncode, 130, err)
        run = self.run_in(home / "\u00dc")
        self.assertEqual(lines[2], f"run:    {home}/\\xdc/{run.name}\n")
        self.assertRegex(err, r"\A\nstopped by SIGINT after \d+ epochs and \d+ steps; resume it with: python train\.py "
                              rf"--resume '.*/\\xdc/{run.name}'\n\Z")
        self.assertEqual(json.loads((run / "hparams.json").read_text())["data_dir"], str(home / "data"))
        events = read_events(run)
        self.assertGreaterEqual(len(events.Images("samples")), 4)
        self.assertGreaterEqual(events.Scalars("generator/recon_loss")[-1].step, 3 * 24)
        self.assertGreaterEqual(len([read_png(file) for file in run.rglob("*.png")]), 6)

    @unittest.skipIf(os.name == "nt", "Windows has no exec")
    def test_missing_streams(self):  # as after 2>&- and >&-
        log_dir = self.folder()
        closed = [sys.executable, "-c", CLOSE_STREAMS, *COMMAND, log_dir, "--epochs", "1"]
        self.assertEqual(subprocess.run(closed, capture_output=True).returncode, 0)
        self.run_in(log_dir)

    def test_messages_to_a_closed_pipe_are_discarded(self):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as stream:
            for _ in range(2):
                self.cli.print_line("text", stream)

    def test_commands_are_quoted_for_the_systems_shell(self):
        for system, command in (("posix", "tensorboard 'a b'"), ("nt", 'tensorboard "a b"')):
            with mock.patch("os.name", system):
                self.assertEqual(self.cli.shell_command("tensorboard", "a b"), command)
