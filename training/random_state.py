"""The random states of a run, and the use of a model that restores them and the model's modes."""

import contextlib

import torch


@contextlib.contextmanager
def evaluation_mode(model):
    """Use a model in evaluation mode and without gradients; then restore its modes and all random states."""
    modes, states = [(module, module.training) for module in model.modules()], random_states(model)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        set_random_states(model, states)
        for module, mode in modes:
            module.training = mode


def random_states(model):
    """Return the states of the random generators that training and sampling use, as tensors on the CPU."""
    states = {"torch": torch.get_rng_state()}
    if model.device.type in ("cuda", "mps"):
        states["device"] = getattr(torch, model.device.type).get_rng_state()
    if hasattr(model, "sample_stream"):  # a student's model has none
        states["samples"] = model.sample_stream.get_state()
    return states


def set_random_states(model, states):
    """Restore the random states that `random_states` returned."""
    torch.set_rng_state(states["torch"])
    if "device" in states:
        getattr(torch, model.device.type).set_rng_state(states["device"])
    if "samples" in states and hasattr(model, "sample_stream"):
        model.sample_stream.set_state(states["samples"])
