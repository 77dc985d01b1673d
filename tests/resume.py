"""Interrupted and resumed runs, and their training states."""

import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import torch
from torch.utils._pytree import tree_map

from tests.common import TrainGroup, run_contents, same
from training import files
from training import run as runs

__unittest = True


class Resume(TrainGroup):
    """A resumed run ends with the bits of one that was never interrupted, or says why it cannot be resumed."""

    FLAGS = "--epochs", "3", "--drop_after", "1"  # of two steps each

    trained = {}

    def finished_run(self, *flags):
        """Return a copy of the run with these flags, which is trained once for all tests of this group."""
        if flags not in self.trained:
            folder = Path(self.enterClassContext(tempfile.TemporaryDirectory()))
            self.trained[flags] = shutil.copytree(self.train_quietly(*flags)[0], folder / "run")
        return shutil.copytree(self.trained[flags], self.folder() / "run", copy_function=shutil.copy)

    def assert_resumed(self, run, *flags):
        """Resume a run to its end; return standard error."""
        status, _, err = self.run_digits("--resume", run, *flags)
        self.assertEqual(status, 0, err)
        return err

    def assert_same_contents(self, run, other):
        contents, others = run_contents(run), run_contents(other)
        differing = [name for name in contents | others if contents.get(name) != others.get(name)]
        self.check(not differing, f"the runs differ in {differing[:10]}")

    def setUp(self):  # means of 3 steps are logged, so that windows cross the ends of epochs
        super().setUp()
        self.enterContext(mock.patch.object(self.train.TensorBoardLogger.__init__, "__defaults__", (3, None)))
        self.enterContext(mock.patch("training.device.check_bf16"))  # rejects it on most CPUs

    def test_an_interrupted_and_resumed_run_equals_the_uninterrupted_one(self):
        ours = self.train.train_aae

        def students(epoch, model, train_loader, *others):
            self.assertEqual(len(train_loader), 2)
            for batch in train_loader:
                ours(epoch, model, [batch], *others)

        for steps, saved, train_aae, flags in (
                (5, 2, students, self.FLAGS), (4, 1, ours, ("--epochs", "2", "--posterior", "universal")),
                (1, 0, ours, ("--epochs", "1", "--base", "--posterior", "gaussian", "--precision", "bf16"))):
            log_dir, presses = self.folder(), [*(steps - 1) * [None], KeyboardInterrupt]
            with mock.patch.object(self.train, "train_aae", train_aae):
                with mock.patch.object(runs.Run, "step_done", side_effect=presses):
                    status, _, err = self.run_digits("--log_dir", log_dir, *flags)
                run, = log_dir.iterdir()
                self.assertEqual((status, err), (130, f"\ninterrupted; epoch {saved} is saved; resume the run with: "
                                                      f"python {runs.TRAIN} --resume {run} --no-cuda\n"))
                self.assert_resumed(run)
            self.assert_same_contents(run, self.finished_run(*flags))

    def test_an_interrupt_before_anything_is_saved(self):
        for place, words in (("training.data.one_of_each_label", "\ninterrupted\n"),
                             ("train.generate_and_save", "\ninterrupted; nothing is saved yet, so start a new run\n")):
            with mock.patch(place, side_effect=KeyboardInterrupt):
                status, _, err = self.run_digits("--log_dir", self.folder())
            self.assertEqual((status, err), (130, words))

    def test_the_average_is_shown_measured_and_saved_and_training_uses_the_others(self):
        names = "generate_and_save", "save_reconstruction", "save_measurements", "save_summary"
        _, last = self.train_quietly("--epochs", "1", "--averaging", "0")
        with mock.patch.multiple(self.train, **dict.fromkeys(names, mock.DEFAULT)) as functions:
            run, saved = self.train_quietly("--epochs", "1", "--averaging", "0.9")
        average = [saved[name] for name, _ in self.models.AdversarialAE().named_parameters()]
        for name, function in functions.items():
            given = function.call_args.args[0].parameters()
            self.check(all(map(torch.equal, given, average)), f"{name} does not get the average")
        for name, weight in saved.items():  # is_contiguous() ignores strides of size 1, by which torch picks layouts
            self.assertEqual(weight.stride(), torch.empty(weight.shape).stride(), name)
        weights = runs.load_state(run)["model"]
        self.assertTrue(same(weights, last), "the weights depend on the average, or --averaging 0 averages")
        for name, weight in weights.items():
            self.assertEqual(torch.equal(weight, saved[name]), not weight.is_floating_point(), name)

    def test_a_run_ended_by_a_full_disk_is_resumed_and_extended_and_files_of_the_user_are_kept(self):
        log_dir, fsync = self.folder(), os.fsync

        def full(file):  # while the third state is written, after later events and pictures
            if all(any(log_dir.rglob(name)) for name in ("samples_epoch_2.png", "training_state.pt.tmp")):
                raise OSError(28, "No space left on device")
            fsync(file)

        with mock.patch("os.fsync", full):
            result = self.run_digits("--log_dir", log_dir, "--epochs", 2, "--drop_after", 1)
        self.assert_refused(result, 1, "training_state.pt: No space left", "epoch 1 is saved; resume the run with:")
        run, = log_dir.iterdir()
        (run / "checkpoints" / "training_state.pt.tmp").write_bytes(b"half")  # as if it had been killed
        self.assertEqual(runs.load_state(run)["run"]["epoch"], 1)
        foreign = [run / name for name in (
            "events.out.tfevents.mine", "events.out.tfevents.9999999999.host.1.0", "x.tmp", "checkpoints/best.pt",
            "results/Prior_samples/samples_epoch_99.png", "old/events.out.tfevents.1700000000.host.1.0.aae")]
        for file in foreign:
            file.parent.mkdir(exist_ok=True)
            file.write_text("mine")
        for epochs in (2, 3):
            self.assert_resumed(run, "--epochs", epochs)
        for file in foreign:
            self.assertEqual(file.read_text(), "mine")
            file.unlink()
        self.assert_same_contents(run, self.finished_run(*self.FLAGS))
        self.assertEqual(list(run.rglob("*.tmp")), [])
        self.assertEqual(json.loads((run / "hparams.json").read_text())["epochs"], 3)
        group, = runs.load_state(run)["optimizer_ae"]["param_groups"]
        self.assertEqual(group["lr"], 1e-4, "the learning rate does not drop after the epoch of --drop_after")

    def test_latest_run_is_the_one_saved_last_whatever_its_name(self):
        log_dir = self.folder({f"{name}/checkpoints/training_state.pt": b"" for name in ("z20", "a")})
        (log_dir / "2999_01_01_00_00_00").mkdir()  # has no checkpoint
        for time, name in enumerate(("z20", "a", "z20"), 2**31 - 3):
            os.utime(log_dir / name / "checkpoints" / "training_state.pt", (time, time))
            self.assertEqual(runs.find_run("latest", log_dir), log_dir / name)

    def test_what_cannot_be_resumed(self):
        run, empty = self.finished_run("--epochs", "1"), self.folder({"training_state.pt": b""})
        for wrong, named in ((empty, empty), (empty / "none", "none"), (empty / "training_state.pt", empty),
                             ("latest", empty), (run / "hparams.json", "hparams.json"), ("", "."),
                             ("/training_state.pt", "training_state.pt")):
            self.assert_refused(self.run_cli("--resume", wrong, "--log_dir", empty), 1, named, "resume")
        self.assert_refused(self.run_digits("--resume", run, "--z_dim", 3), 2, "--z_dim 3 contradicts the run")
        saved = runs.load_state(run)
        with mock.patch.object(runs, "load_state", side_effect=[saved, {**saved, "run": {"seconds": 0}}]):
            self.assert_refused(self.run_digits("--resume", run), 1, run, "was trained further by another process")
        base = functools.partial(self.models.AdversarialAE, networks="base")
        denied = PermissionError(13, "Permission denied", str(run / "x"))
        full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        for place, stand_in, words in (
                ("builtins.open", mock.Mock(side_effect=denied), "Permission denied"),  # a run of somebody else
                ("training.model.AdversarialAE", base, "does not fit models.py"),
                ("torch.optim.Adam.load_state_dict", mock.Mock(side_effect=full), "lacks memory: CUDA out of memory.")):
            with mock.patch(place, stand_in):
                self.assert_refused(self.run_digits("--resume", run), 1, words)
        self.assert_same_contents(run, self.finished_run("--epochs", "1"))
        state = run / "checkpoints" / "training_state.pt"
        state.write_bytes(files.serialize({**saved, "format": "adversarial autoencoder, training state 3"}))
        self.assert_refused(self.run_digits("--resume", run), 1, state, "finish the run with the commit that made it")
        content, middle = state.read_bytes(), state.stat().st_size // 3  # among the data of tensors
        one_bit = content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1:]
        for damaged in (content[:-100], b"", one_bit):
            state.write_bytes(damaged)
            self.assert_refused(self.run_digits("--resume", run), 1,
                                f"{state} is damaged, or not a checkpoint; start a new run\n")

    def test_state_of_another_device_and_version(self):
        run = self.finished_run("--epochs", "1")
        state = runs.load_state(run)
        state["optimizer_ae"] = tree_map(lambda part: part.contiguous() if torch.is_tensor(part) else part,
                                         state["optimizer_ae"])  # CUDA's layout
        del state["settings"]["precision"]  # as if the flag were newer than the run
        state["settings"]["device"], state["random"]["cuda"] = "cuda", torch.zeros(16, dtype=torch.uint8)
        (run / "checkpoints" / "training_state.pt").write_bytes(files.serialize(state))
        self.assertIn("began with cuda and continues with cpu", self.assert_resumed(run, "--epochs", 2))
        self.assert_same_contents(run, self.finished_run("--epochs", "2"))

    def test_finished_run_is_resumed_from_any_folder_and_locked(self):
        run = self.finished_run("--epochs", "1")
        (run / "checkpoints" / "model_checkpoint.pt").unlink()  # as if killed before it was written
        self.addCleanup(os.chdir, os.getcwd())
        for folder, name in ((run / "checkpoints", "training_state.pt"), (run, ".")):
            os.chdir(folder)
            self.assert_resumed(name)
        self.assert_same_contents(run, self.finished_run("--epochs", "1"))
        if files.fcntl is None:
            self.skipTest("runs are not locked here")
        with files.locked(run):
            self.assert_refused(self.run_digits("--resume", run), 1, run, "in use")
        with mock.patch.object(files.fcntl, "flock", side_effect=OSError(38, "Function not implemented")):
            self.assertIn("cannot be locked", self.assert_resumed(run))
