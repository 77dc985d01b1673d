"""TensorBoardLogger and atomic files."""

import json
from unittest import mock

import numpy as np
import torch

import training.files as files
from tests.common import read_events
from unittests import Group

__unittest = True


class Logging(Group):
    """TensorBoardLogger, read back with TensorBoard's own reader, and files written atomically."""

    needs = ("utils",)

    def setUp(self):
        super().setUp()
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(self.folder())
        self.addCleanup(self.writer.close)

    def points(self, tag):
        self.writer.flush()
        return [(event.step, event.value) for event in read_events(self.writer.log_dir).Scalars(tag)]

    def assert_points(self, tag, expected):
        points = self.points(tag)
        self.assertEqual([step for step, _ in points], [step for step, _ in expected])
        np.testing.assert_allclose([value for _, value in points], [value for _, value in expected], rtol=1e-6)

    def test_state_carries_the_open_window(self):
        logger, other = (self.utils.TensorBoardLogger(self.writer, avg_window=4, name="part") for _ in range(2))
        for i in range(3):
            logger.add_values({"value": torch.tensor(float(i))})
        other.load_state_dict(json.loads(json.dumps(logger.state_dict())))
        other.add_values({"value": 7})
        self.assertEqual(other.global_step, 4)
        self.assert_points("part/value", [(4, 2.5)])

    def test_means_of_windows(self):
        logger = self.utils.TensorBoardLogger(self.writer, avg_window=4, name="part")
        values = np.random.default_rng(0).normal(size=10)
        for i, value in enumerate(values):
            logger.add_values({"tensor": torch.tensor(value, requires_grad=True), "number": float(value),
                               "count": i if i % 2 else np.int64(i)})
        self.assertEqual(logger.global_step, 10)
        for tag in ("part/tensor", "part/number"):
            self.assert_points(tag, [(4, values[:4].mean()), (8, values[4:8].mean())])
        logger.flush()
        logger.flush()
        self.assert_points("part/tensor", [(4, values[:4].mean()), (8, values[4:8].mean()), (10, values[8:].mean())])
        self.assert_points("part/count", [(4, 1.5), (8, 5.5), (10, 8.5)])

    def test_values_that_are_sometimes_missing(self):
        logger = self.utils.TensorBoardLogger(self.writer, avg_window=4)
        for i in range(4):
            logger.add_values({"always": i} if i % 2 else {"always": i, "seldom": 10 * i})
        self.assert_points("always", [(4, 1.5)])
        self.assert_points("seldom", [(4, 10)])

    def test_default_window_is_50(self):
        logger = self.utils.TensorBoardLogger(self.writer)
        for i in range(120):
            logger.add_values({"i": i})
        self.assert_points("i", [(50, 24.5), (100, 74.5)])

    def test_values_are_read_once_per_window(self):
        logger = self.utils.TensorBoardLogger(self.writer)
        with mock.patch.object(self.utils, "to_numbers", wraps=self.utils.to_numbers) as to_numbers:
            for _ in range(120):
                logger.add_values({"loss": torch.ones((), device="cpu"), "accuracy": torch.ones(())})
        self.assertEqual(to_numbers.call_count, 2)

    def test_any_shape_and_precision_of_a_scalar(self):
        values = {"a": torch.ones(1), "b": torch.ones((), dtype=torch.float64), "c": torch.tensor(1),
                  "d": np.float32(1), "e": True}
        logger = self.utils.TensorBoardLogger(self.writer, avg_window=1)
        logger.add_values(values)
        for name in values:
            self.assert_points(name, [(1, 1.0)])

    def test_values_wait_on_their_device(self):
        logger = self.utils.TensorBoardLogger(self.writer)
        logger.add_values({"loss": torch.ones((), device="meta")})  # a device whose tensors cannot be read

    def test_writing_is_all_or_nothing(self):
        path = self.folder() / "new" / "file"
        files.write_atomically(path, b"zeroth")
        files.write_atomically(path, b"first", keep=path.with_name("old"))
        self.assertEqual(path.with_name("old").read_bytes(), b"zeroth")
        path.with_name("old").unlink()
        with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")), \
                self.assertRaises(OSError) as caught:
            files.write_atomically(path, b"second")
        self.assertEqual(caught.exception.filename, str(path))
        self.assertEqual([(file.name, file.read_bytes()) for file in path.parent.iterdir()], [("file", b"first")])
