"""The model and the two optimizers that the flags specify, and the learning rate of each epoch."""

import torch

from models import AdversarialAE


def build_model(z_dim, posterior="deterministic", networks="residual"):
    """Return a new model. Default options are not passed: a student's model may accept z_dim only."""
    options = {"posterior": posterior} if posterior != "deterministic" else {}
    if networks != "residual":
        options["networks"] = networks
    return AdversarialAE(z_dim=z_dim, **options)


def to_device(model, device, precision):
    """Return the model on the device, in the fastest memory layout: channels last on the CPU and in bf16."""
    channels_last = device.type == "cpu" or precision == "bf16"
    return model.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)


def build_optimizers(model, args):
    """Return Adam for encoder and decoder, and SGD for the discriminator, each over its own parameters only."""
    fused = model.device.type in ("cpu", "cuda")  # one call for all weights; untested on other devices
    cuda = model.device.type == "cuda"
    rate = torch.tensor(args.ae_lr, device=model.device) if cuda else args.ae_lr  # a CUDA graph reads it at each replay
    optimizer_ae = torch.optim.Adam([*model.encoder.parameters(), *model.decoder.parameters()], lr=rate,
                                    betas=(0.5, 0.999), fused=fused, capturable=cuda)
    optimizer_disc = torch.optim.SGD(model.discriminator.parameters(), lr=args.d_lr, momentum=args.d_momentum,
                                     fused=fused)
    return optimizer_ae, optimizer_disc


def set_learning_rate(optimizer_ae, epoch, args):
    """Set the autoencoder's learning rate for an epoch, counted from 1: args.ae_lr, a tenth after args.drop_after.

    With the lower rate, the codes move less from step to step, so the discriminator learns finer differences between
    them and the prior. The rate does not depend on the number of epochs, so a run can be extended.
    """
    rate = args.ae_lr / 10 if 0 < args.drop_after < epoch else args.ae_lr
    for group in optimizer_ae.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def load_optimizer(optimizer, state):
    """Load a state_dict, saved on any device, into an optimizer, but keep the flags of this device."""
    for group, current in zip(state["param_groups"], optimizer.param_groups, strict=False):
        group.update({flag: current[flag] for flag in ("fused", "capturable") if flag in current})
        rate = float(group["lr"])
        group["lr"] = torch.full_like(current["lr"], rate) if torch.is_tensor(current["lr"]) else rate
    optimizer.load_state_dict(state)
    match_memory_format(optimizer)


def match_memory_format(optimizer):
    """Give an optimizer's moments the memory layout of the weights: fused steps read both in memory order.

    A state that was saved on another device may have another layout.
    """
    for weight, moments in optimizer.state.items():
        for name, moment in moments.items():
            if torch.is_tensor(moment) and moment.shape == weight.shape:
                moments[name] = torch.empty_like(weight).copy_(moment)
