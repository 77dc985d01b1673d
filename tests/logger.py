"""TensorBoardLogger and the files of a run."""

import os
from collections import defaultdict
from unittest import mock

import numpy as np
import torch

from training import cli, files
from unittests import Group

__unittest = True


class Logging(Group):
    """The means that TensorBoardLogger writes, and files written atomically."""

    needs = ("utils",)

    def test_means_of_windows_and_of_epochs(self):
        writer, epochs, overwritten = mock.Mock(), [], torch.zeros(())  # as by a replayed CUDA graph
        logger = self.utils.TensorBoardLogger(writer, avg_window=4, name="part")
        values, integers = np.random.default_rng(0).normal(size=10), np.arange(10)
        for i, value in enumerate(values):
            step = {"tensor": torch.tensor(value, requires_grad=True), "vector": torch.tensor([value]),
                    "overwritten": overwritten.fill_(value), "number": float(value), "truth": True,
                    "integer": torch.tensor(i), "count": i if i % 2 else np.int64(i)}
            logger.add_values(step if i % 2 else {**step, "seldom": 2.0})
            if i in (4, 9):
                epochs.append(logger.end_epoch())
        latest = logger.latest
        logger.flush()
        logger.flush()
        self.assertEqual(logger.global_step, 10)
        points = defaultdict(list)
        for tag, value, step in (call.args for call in writer.add_scalar.call_args_list):
            points[tag].append((step, value))
        expected = dict.fromkeys(("tensor", "overwritten", "number", "vector"), values)
        expected |= {"integer": integers, "count": integers, "truth": np.ones(10), "seldom": np.full(10, 2)}
        for tag, series in expected.items():
            means = [(end, series[start:end].mean()) for start, end in ((0, 4), (4, 8), (8, 10))]
            np.testing.assert_allclose(points[f"part/{tag}"], means, rtol=1e-6, err_msg=tag)
            np.testing.assert_allclose(latest[tag], means[1][1], rtol=1e-6, err_msg=tag)
            np.testing.assert_allclose([epoch[tag] for epoch in epochs], [series[:5].mean(), series[5:].mean()], 1e-6)

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
                    self.assertRaisesRegex(cli.UserError, f"file cannot be written: {error.strerror}; free disk"):
                files.write_atomically(path, b"third")
        self.assertEqual({file.name: file.read_bytes() for file in path.parent.iterdir()}, {"file": b"second"})

    def test_errors_of_other_files_pass_through(self):
        run = self.folder() / "run"
        for error, caught in ((OSError(28, "No space left on device"), True),
                              (FileNotFoundError(2, "No such file", str(run / "x")), True),
                              (FileNotFoundError(2, "No such file", str(run.with_name("run2"))), False)):
            with self.subTest(str(error)), self.assertRaises(cli.UserError if caught else FileNotFoundError), \
                    files.writing(run):
                raise error
