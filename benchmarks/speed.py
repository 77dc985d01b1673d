"""Compare the time of train.py's steps with that of a plain training loop:  python -m benchmarks.speed

The ways are timed in turn, in processes of their own: `main` of train.py with the flags in WAYS, and `plain_steps`,
which is what most implementations have: the same networks and optimizers in fp32, torchvision's MNIST decoded image by
image, a DataLoader, and .item() on every loss at every step.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

from benchmarks import tables
from training.cli import OneLineParser, number, run_program
from training.device import device_name
from training.threads import usable_cpus

PROJECT = Path(__file__).resolve().parent.parent
WAYS = ("default", "--precision bf16", "--base")  # train.py with these flags
CUDA_WAYS = ("--precision tf32", "--no-graph", "--deterministic")
UNSUPPORTED = 2  # status of a process where the hardware has no units for the precision


class Finished(Exception):
    """Ends `main`; has what `measure` returned."""


# One way, in this process --------------------------------------------------------------------------------------------

def time_way(args):
    """Return the seconds per step of args.way, the memory above torch's own in MB, and the device, or a profile."""
    memory = peak_memory()
    plain = re.fullmatch(r"plain loop, (\d+) workers", args.way)
    result = plain_steps(args, int(plain[1])) if plain else main_steps(args)
    if args.profile:
        return result
    gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_initialized() else 0
    return {**result, "memory": peak_memory() - memory, "gpu_memory": gpu, "torch": torch.__version__}


def main_steps(args):
    """Return what `measure` returns for the train_aae of train.py's `main`, which then ends."""
    import train

    train_aae = train.train_aae

    def few_steps(epoch, model, train_loader, *others):
        batches = iter(train_loader)

        def steps():
            train_aae(epoch, model, itertools.islice(batches, args.steps), *others)

        raise Finished(measure(steps, args, model.device))

    flags = ["--dataset", "mnist", "--data_dir", args.data_dir, *["--no-cuda"] * args.no_cuda,
             *args.way.removeprefix("default").split()]
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(train, "train_aae", few_steps):
        try:
            train.main(train.parse_args(["--log_dir", folder, *flags]))
        except Finished as finished:
            return finished.args[0]


def plain_steps(args, workers):
    """Return what `measure` returns for the plain loop."""
    from torchvision import datasets, transforms

    from models import AdversarialAE

    device = torch.device("cuda" if torch.cuda.is_available() and not args.no_cuda else "cpu")
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    images = torch.utils.data.Subset(datasets.MNIST(args.data_dir, transform=transform), range(args.steps * 64))
    loader = torch.utils.data.DataLoader(images, 64, shuffle=True, num_workers=workers,
                                         pin_memory=device.type == "cuda", persistent_workers=workers > 0)
    model = AdversarialAE(8).to(device)
    optimizer_ae = torch.optim.Adam([*model.encoder.parameters(), *model.decoder.parameters()], 1e-3, (0.5, 0.999))
    optimizer_disc = torch.optim.SGD(model.discriminator.parameters(), 5e-3, 0.95)

    def steps():
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

    return measure(steps, args, device)


def measure(steps, args, device):
    """Call a function that takes args.steps steps twice, and return the device and the second call's time per step."""
    steps()
    if args.profile:
        side = "device" if device.type == "cuda" else "cpu"
        with torch.profiler.profile() as profile:
            steps()
        return profile.key_averages().table(sort_by=f"self_{side}_time_total", row_limit=12, max_name_column_width=50)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    steps()
    synchronize()
    return {"step": (time.perf_counter() - start) / args.steps, "device": f"{device.type} ({device_name(device)})"}


def peak_memory():
    """Return this process's peak resident memory in MB, 0 on systems other than Linux."""
    status = Path("/proc/self/status")  # ru_maxrss would include the parent's memory
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024 if status.exists() else 0


# All ways ------------------------------------------------------------------------------------------------------------

def in_own_process(args, way):
    """Return what `time_way` returns in a new process; None if the hardware does not support the way."""
    process = subprocess.run([sys.executable, "-m", "benchmarks.speed", f"--way={way}", f"--steps={args.steps}",
                              f"--data_dir={args.data_dir}", *["--no-cuda"] * args.no_cuda,
                              *["--profile"] * args.profile], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    if process.returncode not in (0, UNSUPPORTED):
        sys.exit(process.returncode)
    return None if process.returncode else json.loads(process.stdout.splitlines()[-1])


def compare(args, ways):
    """Print and return the timings of all rounds."""
    rounds = []
    for _ in range(args.rounds):
        timings = {way: in_own_process(args, way) for way in (rounds[0] if rounds else ways)}
        rounds.append({way: timing for way, timing in timings.items() if timing})
        print(*(f"{way}: {1000 * timing['step']:.2f} ms" for way, timing in rounds[-1].items()), sep="; ", flush=True)
    return {"rounds": rounds, "steps_timed": args.steps}


def main(args):
    """Time args.way in this process, or all ways in processes of their own."""
    cuda = torch.cuda.is_available() and not args.no_cuda
    ways = [*WAYS, *(CUDA_WAYS if cuda else ()), *(f"plain loop, {count} workers" for count in (0, usable_cpus()))]
    if args.way:
        print(json.dumps(time_way(args)))
    elif args.profile:
        for way in ways[:-1]:
            print(f"\n{way}, {args.steps} steps:\n{in_own_process(args, way) or ''}", flush=True)
    else:
        figures = compare(args, ways)
        print(f"\n{tables.speed({'speed': figures})}")
        if args.json:
            args.json.write_text(json.dumps(figures, indent=2) + "\n")


def parse_args(argv=None):
    parser = OneLineParser("python -m benchmarks.speed", "Compare train.py's steps with those of a plain loop.")
    parser.add_argument("--rounds", type=number(int, 1), default=3, help="rounds over all ways")
    parser.add_argument("--steps", type=number(int, 1, 468), default=200, help="timed, after as many to warm up")
    parser.add_argument("--data_dir", type=os.path.abspath, default=PROJECT.parent / "data", help="MNIST's folder")
    parser.add_argument("--json", type=Path, help="save the results to this file")
    parser.add_argument("--no-cuda", action="store_true", help="do not use CUDA")
    parser.add_argument("--profile", action="store_true", help="instead, show the slowest operations of each way")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # set by this program for its processes
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_program("python -m benchmarks.speed", main, parse_args, None, "end other programs"))
