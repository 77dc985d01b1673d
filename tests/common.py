"""Shared by several groups of tests: readers of a run's files, and runs on a few digits."""

import contextlib
import copy
import io
import tempfile
from pathlib import Path
from unittest import mock

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import tree_map
from torch.utils.tensorboard import SummaryWriter

from training.device import RandomState
from training.run import load_state
from unittests import Group

__unittest = True


def snapshot(model):
    """Return copies of a model's weights, statistics and modes, and all random states, for `same`."""
    modes = torch.tensor([module.training for module in model.modules()])
    return {**copy.deepcopy(model.state_dict()), **RandomState(model.device).state_dict(), "modes": modes}


def same(state, other):
    """Whether two dicts of tensors are equal to the last bit."""
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def read_events(folder):
    """Return TensorBoard's reader of the event files in a folder, with everything loaded."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0}).Reload()


def run_contents(run):
    """Return all that a finished run has written, except its settings and times, by name; == compares it to the bit."""
    parts = {name: part for name, part in load_state(run).items() if name not in ("settings", "events")}
    del parts["run"]["seconds"]
    parts["weights"] = dict(torch.load(run / "checkpoints" / "model_checkpoint.pt", weights_only=True))
    contents = tree_map(lambda part: part.numpy().tobytes() if torch.is_tensor(part) else part, parts)
    events = read_events(run)
    for kind, value in (("Scalars", lambda event: event.value), ("Images", lambda event: event.encoded_image_string),
                        ("Histograms", lambda event: tuple(event.histogram_value.bucket))):
        for tag in events.Tags()[kind.lower()]:  # sorted, as event files of the same second may be read in any order
            contents[tag] = sorted((event.step, value(event)) for event in getattr(events, kind)(tag))
    codes = max(run.glob("[0-9]*/codes"))  # an extended run keeps those of the shorter one
    for file in (*codes.iterdir(), *run.glob("*.pbtxt"), *(run / "results").rglob("*.png")):
        contents[str(file.relative_to(run))] = file.read_bytes()
    return contents


class FolderGroup(Group):
    """Tests that write files."""

    def folder(self, files=()):
        """Return a new folder with files, {name: bytes or text}, removed when the test ends."""
        folder = Path(self.enterContext(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        for name, content in dict(files).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    def program(self, flags):
        """Run train.py with flags; return its exit status."""
        return self.cli.run_program("train.py", self.train.main, self.train.parse_args, flags)

    def run_cli(self, *flags, cli=None):
        """Run a command line, by default of train.py; return its exit status, standard output and error."""
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                status = (cli or self.program)([str(flag) for flag in flags])
            except SystemExit as stop:
                status = stop.code
        return status, out.getvalue(), err.getvalue()

    def assert_refused(self, result, status, *fragments):
        """Check that a command line has ended with this status and one sentence, which contains the fragments."""
        self.assertEqual(result[0], status, result[2])
        self.assertRegex(result[2], r"\A[\w. -]+: error: [^\n]+\n\Z")
        for fragment in fragments:
            self.assertIn(str(fragment), result[2])


class TrainGroup(FolderGroup):
    needs = ("train", "training.data", "training.cli", "mnist", "models")
    no_cuda = ("--no-cuda",)
    DIGITS = "--dataset", "digits", "--batch_size", "32"

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.few, cls.few_tests = ([tensor[:count] for tensor in cls.mnist.load_digits(train)]
                                  for train, count in ((True, 40), (False, 30)))

    def setUp(self):
        super().setUp()
        self.few_digits = mock.patch.multiple(
            self.data, load_digits=lambda train: self.few_tests,
            digits=lambda batch_size, device: self.mnist.BatchLoader(*self.few, batch_size, device=device))

    def run_digits(self, *flags):
        """Run the command line on a few of the bundled digits, in two steps an epoch."""
        with self.few_digits:
            return self.run_cli(*self.DIGITS, *self.no_cuda, *flags)

    def train_quietly(self, *flags):
        """Run `main` on a few of the bundled digits; return the run's folder and saved weights."""
        args = self.train.parse_args([*self.DIGITS, *self.no_cuda, "--log_dir", str(self.folder()), *flags])
        with self.few_digits, contextlib.redirect_stdout(io.StringIO()):
            run = self.train.main(args)
        return run, torch.load(run / "checkpoints" / "model_checkpoint.pt", weights_only=True)

    def parts(self, *flags):
        """Return model and optimizers as `main` passes them to train_aae for these flags."""
        train_aae = mock.Mock(side_effect=SystemExit)
        with mock.patch.object(self.train, "train_aae", train_aae), self.assertRaises(SystemExit):
            self.train_quietly(*flags)
        _, model, _, _, _, optimizer_ae, optimizer_disc, _ = train_aae.call_args.args
        return model, optimizer_ae, optimizer_disc

    def writer(self):
        return self.enterContext(SummaryWriter(self.folder()))
