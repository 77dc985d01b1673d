"""Compare the time of train.py's steps with that of a plain training loop:  python -m benchmarks.speed

All ways live at once, in processes of their own, and take turns of a few seconds (docs/SPEED.md says why). They are
`main` of train.py with the flags in WAYS, and `plain_loop`, which is what most implementations have: the same networks
and optimizers in fp32, MNIST decoded image by image, a DataLoader, and .item() on every loss at every step.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

from benchmarks import tables
from benchmarks.report import PROJECT
from mnist import mnist
from training import usable_cpus
from training.cli import OneLineParser, UserError, number, print_line, run_program
from training.device import device_name

WAYS = ("default", "--precision bf16", "--base")  # train.py with these flags
CUDA_WAYS = ("--no-graph", "--deterministic")


def work(args):
    """Take a turn of args.way for each line of stdin, and answer with a line of JSON; all threads sleep in between."""
    answers, memory = sys.stdout, peak_memory()

    def take_turns(take_steps, device):
        synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        for _ in sys.stdin:
            with torch.profiler.profile() if args.profile else contextlib.nullcontext() as profile:
                synchronize()
                start = time.perf_counter()
                take_steps()
                synchronize()
                step = (time.perf_counter() - start) / args.steps
            table = profile and profile.key_averages().table(f"self_{device.type}_time_total", 12)
            print_line(json.dumps({
                "step": step, "memory": peak_memory() - memory, "gpu_memory": torch.cuda.max_memory_allocated() / 2**20,
                "device": device_name(device).replace(", 1 threads", ", 1 thread"), "profile": table}), answers)

    with contextlib.redirect_stdout(io.StringIO()), mock.patch("training.run.has_width", lambda _: False):  # no bars
        (plain_loop if args.way.startswith("plain loop") else train_py)(args, take_turns)


def train_py(args, take_turns):
    """Run `main` of train.py, and take turns where it calls train_aae for the first time."""
    import train

    train_aae = train.train_aae

    def turns(epoch, model, train_loader, *others, **named):
        batches = itertools.chain.from_iterable(itertools.repeat(train_loader))  # of one epoch after the other
        take_turns(lambda: train_aae(epoch, model, itertools.islice(batches, args.steps), *others, **named),
                   model.device)
        sys.exit()  # ends `main`

    flags = ["--dataset", "mnist", "--data_dir", args.data_dir, *["--no-cuda"] * args.no_cuda,
             *args.way.removeprefix("default").split()]
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(train, "train_aae", turns):
        train.main(train.parse_args(["--log_dir", folder, *flags]))


def plain_loop(args, take_turns):
    """Take turns of the plain loop, each an epoch of args.steps batches, so its workers rest between turns."""
    from torchvision import datasets, transforms

    from models import AdversarialAE

    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    images = torch.utils.data.Subset(datasets.MNIST(args.data_dir, transform=transform), range(args.steps * 64))
    workers = int(re.search(r"\d+", args.way)[0])
    loader = torch.utils.data.DataLoader(images, 64, shuffle=True, num_workers=workers,
                                         pin_memory=device.type == "cuda", persistent_workers=workers > 0)
    model = AdversarialAE(8).to(device)
    optimizer_ae = torch.optim.Adam([*model.encoder.parameters(), *model.decoder.parameters()], 1e-3, (0.5, 0.999))
    optimizer_disc = torch.optim.SGD(model.discriminator.parameters(), 5e-3, 0.95)

    def epoch():
        for x, _ in loader:
            x = x.to(device)
            recon_x, z = model(x)
            ae_loss, ae_values = model.get_loss_autoencoder(x, recon_x, z, 0.995)
            disc_loss, disc_values = model.get_loss_discriminator(z.detach())
            optimizer_ae.zero_grad()
            ae_loss.backward()
            optimizer_ae.step()
            optimizer_disc.zero_grad()
            disc_loss.backward()
            optimizer_disc.step()
            for value in (*ae_values.values(), *disc_values.values()):
                value.item()

    take_turns(epoch, device)


def peak_memory():
    """Return this process's peak resident memory in MB, 0 on systems other than Linux."""
    status = Path("/proc/self/status")  # ru_maxrss would include the parent's memory
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024 if status.exists() else 0


def play(args, ways):
    """Let all ways take turns, each in a process of its own; yield the answers of each round after a warm-up."""
    command = [sys.executable, "-m", "benchmarks.speed", *sys.argv[1:]]
    with contextlib.ExitStack() as stack:  # closes their stdin, which ends them
        workers = {way: stack.enter_context(subprocess.Popen(
            [*command, f"--way={way}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            start_new_session=True)) for way in ways}  # Ctrl-C interrupts this process alone
        for count in range((1 if args.profile else args.rounds) + 1):
            order = random.Random(count).sample(list(workers), len(workers))
            answers = {way: turn(way, workers[way]) for way in order}
            workers = {way: worker for way, worker in workers.items() if answers[way]}
            if count > 0:
                yield {way: answers[way] for way in workers}


def turn(way, worker):
    """Let a process take a turn, and return its answer; None if the hardware does not support the way."""
    with contextlib.suppress(BrokenPipeError):  # it has ended
        worker.stdin.write(b"\n")
    if (answer := worker.stdout.readline()).endswith(b"\n"):
        return json.loads(answer)
    if worker.wait() < 0:
        raise UserError(f"signal {-worker.returncode} ended the process of `{way}`; if memory is short, end programs")
    return None if worker.returncode == 2 else sys.exit(worker.returncode)  # it has said why; 2: no units for bf16


def main(args):
    """Take turns of args.way, or let a process for each way do so and show the figures."""
    if args.way:
        return work(args)
    mnist(args.data_dir)  # downloads the files once, or raises what is wrong with them
    cuda, rounds = torch.cuda.is_available() and not args.no_cuda, []
    plain = [f"plain loop, {workers} workers" for workers in (0, usable_cpus())]
    for answers in play(args, [*WAYS, *(CUDA_WAYS if cuda else ()), *plain]):
        rounds.append({way: answer["step"] for way, answer in answers.items()})
        print_line("; ".join(f"{way}: {1000 * step:.2f} ms" for way, step in rounds[-1].items()))
    if args.profile:
        return print_line("\n".join(f"\n{way}:\n{answer['profile']}" for way, answer in answers.items()))
    figures = {"device": answers["default"]["device"], "torch": torch.__version__, "steps_timed": args.steps,
               **{kind: {way: answers[way][kind] for way in answers} for kind in ("memory", "gpu_memory")},
               "rounds": rounds}
    print_line(f"\n{tables.speed({'speed': figures})}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def parse_args(argv=None):
    parser = OneLineParser("python -m benchmarks.speed", "Compare train.py's steps with those of a plain loop.")
    parser.add_argument("--rounds", **number(int, 2), default=20, help="turns of each way, after one to warm up")
    parser.add_argument("--steps", **number(int, 1, 937), default=40, help="steps of a turn; on a GPU, 400 or more")
    parser.add_argument("--data_dir", type=os.path.abspath, default=str(PROJECT.parent / "data"), help="MNIST's folder")
    parser.add_argument("--json", type=Path, help="save the results to this file")
    parser.add_argument("--no-cuda", action="store_true", help="do not use CUDA")
    parser.add_argument("--profile", action="store_true", help="instead, show the slowest operations of each way")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # set by this program for its processes
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_program("python -m benchmarks.speed", main, parse_args, None))
