"""TensorBoardLogger and the files of a run."""

import os
from unittest import mock

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from tests.common import read_events
from training import cli, files
from unittests import Group

__unittest = True


class Logging(Group):
    """TensorBoardLogger, read back with TensorBoard's own reader, and files written atomically."""

    needs = ("utils",)

    def setUp(self):
        super().setUp()
        self.writer = SummaryWriter(self.folder())
        self.addCleanup(self.writer.close)

    def assert_points(self, tag, expected):
        self.writer.flush()
        points = [(event.step, event.value) for event in read_events(self.writer.log_dir).Scalars(tag)]
        np.testing.assert_allclose(points, expected, rtol=1e-6)

    def test_means_of_epochs_whatever_the_window(self):
        logger = self.utils.TensorBoardLogger(self.writer, avg_window=4)
        for epoch in (0, 1):
            for i in range(7):
                logger.add_values({"always": epoch + i} if i % 2 else {"always": epoch + i, "seldom": 2.0})
            self.assertEqual(logger.end_epoch(), {"always": epoch + 3.0, "seldom": 2.0})
        self.assertEqual(logger.latest, {"always": 3.5, "seldom": 2.0})  # of steps 9 to 12

    def test_means_of_windows(self):
        logger = self.utils.TensorBoardLogger(self.writer, avg_window=4, name="part")
        values, same = np.random.default_rng(0).normal(size=10), torch.zeros(())
        for i, value in enumerate(values):
            logger.add_values({"tensor": torch.tensor(value, requires_grad=True), "number": float(value),
                               "count": i if i % 2 else np.int64(i), "vector": torch.tensor([value]),
                               "overwritten": same.fill_(value),  # by the next step, as a replayed CUDA graph does
                               "integer": torch.tensor(i), "truth": True})
        self.assertEqual(logger.global_step, 10)
        for tag in ("part/tensor", "part/number", "part/vector", "part/overwritten"):
            self.assert_points(tag, [(4, values[:4].mean()), (8, values[4:8].mean())])
        logger.flush()
        logger.flush()
        self.assert_points("part/tensor", [(4, values[:4].mean()), (8, values[4:8].mean()), (10, values[8:].mean())])
        self.assert_points("part/truth", [(4, 1), (8, 1), (10, 1)])
        for tag in ("part/count", "part/integer"):
            self.assert_points(tag, [(4, 1.5), (8, 5.5), (10, 8.5)])

    def test_writing_is_all_or_nothing(self):
        path = self.folder() / "new" / "file"
        files.write_atomically(path, b"zeroth")
        files.write_atomically(path, b"first", keep=path.with_name("old"))
        self.assertEqual(path.with_name("old").read_bytes(), b"zeroth")
        path.with_name("old").unlink()
        with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")), \
                self.assertRaisesRegex(cli.UserError, f"{path} cannot be written: No space left on device; free disk"):
            files.write_atomically(path, b"second")
        self.assertEqual([(file.name, file.read_bytes()) for file in path.parent.iterdir()], [("file", b"first")])

    def test_a_folder_that_cannot_be_synced(self):  # shared folders of virtual machines, CIFS
        path = self.folder() / "file"
        with mock.patch("os.fsync", side_effect=[None, OSError(22, "Invalid argument")]) as fsync:
            files.write_atomically(path, b"content")
        self.assertEqual((path.read_bytes(), fsync.call_count), (b"content", 2 if os.name != "nt" else 1))

    def test_a_rename_that_is_refused_once_is_tried_again(self):  # on Windows, while another program reads the file
        path, refusal = self.folder() / "file", PermissionError(13, "Access is denied")
        with mock.patch("os.replace", side_effect=[refusal, mock.DEFAULT], wraps=os.replace):
            files.write_atomically(path, b"content")
        self.assertEqual(path.read_bytes(), b"content")
        with mock.patch("os.replace", side_effect=refusal), mock.patch("time.monotonic", side_effect=range(100)), \
                self.assertRaisesRegex(cli.UserError, "Access is denied"):
            files.write_atomically(path, b"other")

    def test_errors_of_other_files_pass_through(self):
        run = self.folder() / "run"
        for error, caught in ((OSError(28, "No space left on device"), True),
                              (FileNotFoundError(2, "No such file", str(run / "x")), True),
                              (FileNotFoundError(2, "No such file", str(run.with_name("run2"))), False),
                              (FileNotFoundError(2, "No such file", "students.txt"), False)):
            with self.subTest(str(error)), self.assertRaises(cli.UserError if caught else FileNotFoundError), \
                    files.writing(run):
                raise error
