"""What TensorBoard gets of a model during training: measurements on test images, and the results of a finished run."""

import contextlib
import io

import torch
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from training.model import evaluation_mode

HYPERPARAMETERS = ("z_dim", "lambda_", "posterior", "networks", "epochs", "seed", "ae_lr", "drop_after", "d_lr",
                   "d_momentum", "averaging", "batch_size", "precision", "trained_on")  # by which runs are compared


def ks_distance(codes, projections=200, seed=0):
    """Return the mean Kolmogorov-Smirnov distance in [0, 1] between projections of codes [N, z_dim] and N(0, 1)."""
    # It is the largest difference of their distribution functions; its mean for N prior samples is 0.869 / sqrt(N), the
    # mean of Kolmogorov's distribution. Directions are uniform on the unit sphere, and equal for equal seeds.
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(codes.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(codes.device)
    normal = torch.special.ndtr((codes.double() @ directions).sort(dim=0).values)
    steps = torch.arange(len(codes) + 1, device=codes.device, dtype=torch.float64)[:, None] / len(codes)
    above, below = (steps[1:] - normal).amax(0), (normal - steps[:-1]).amax(0)  # just after and before each code
    return torch.maximum(above, below).mean().item()


def reconstruct(model, images):
    """Return reconstructions [N, 1, 28, 28] and codes [N, z_dim] of images; call it within `evaluation_mode`."""
    reconstructions, codes = zip(*(model(batch) for batch in images.split(500)), strict=True)
    return torch.cat(reconstructions), torch.cat(codes)


def measurements(model, images):
    """Return the codes [N, z_dim] of images, on the CPU, and a dict of their reconstruction loss and KS distance."""
    with evaluation_mode(model):
        reconstructions, codes = reconstruct(model, images)
        recon_loss = torch.nn.functional.mse_loss(reconstructions, images)
    return codes.cpu(), {"recon_loss": recon_loss.item(), "ks_distance": ks_distance(codes)}


def save_measurements(model, epoch, summary_writer, images):
    """Write measurements on images, if there are any, to TensorBoard: curves (`test/`), a histogram per dimension."""
    if images is None:
        return
    codes, values = measurements(model, images)
    for name, value in values.items():
        summary_writer.add_scalar(f"test/{name}", value, epoch)
    if epoch and codes.abs().max() < 1e20:  # at epoch 0 all are one spike, next to which later histograms look flat
        for dimension, column in enumerate(codes.T):  # a tag that sorts last: TensorBoard's first page sorts by names
            summary_writer.add_histogram(f"test_codes/{dimension}", column, epoch)  # fails for NaN and above 1e20


def save_summary(model, epoch, summary_writer, data, settings, means):
    """Write a finished run to TensorBoard: test codes for the projector, its settings, its results (also as curves)."""
    results = {f"final/{name}": means[name] for name in ("recon_loss", "accuracy") if name in means}
    if data.test_images is not None:
        codes, values = measurements(model, data.test_images)
        shown = torch.nn.functional.pad(codes[:1000], (0, max(0, 3 - codes.shape[1])))  # the projector needs three
        with contextlib.redirect_stdout(io.StringIO()):  # a run that ends a second time is warned of its own folder
            summary_writer.add_embedding(shown, data.test_labels[:1000].tolist(),
                                         (data.test_images[:1000].cpu() + 1) / 2, epoch, "codes")
        results |= {f"final/test_{name}": value for name, value in values.items()}
    experiment, *session = hparams({name: settings[name] for name in HYPERPARAMETERS}, results)
    plugin = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin.content)
    for info in content.experiment.hparam_infos[:5]:  # TensorBoard shows five columns at first, those that differ
        info.differs = True
    plugin.content = content.SerializeToString()
    for summary in (experiment, *session):
        summary_writer.file_writer.add_summary(summary)  # SummaryWriter.add_hparams would create a second run
    for name, value in results.items():
        summary_writer.add_scalar(name, value, epoch)
