"""The model as a run uses it: built for its device, averaged over the steps, evaluated without side effects."""

import contextlib
import copy

import torch
from torch import nn

from models import AdversarialAE
from training.cli import FlagError
from training.device import RandomState


def build_model(args, device):
    """Return the model of models.py that the flags specify, on a device; a student's model may accept `z_dim` only."""
    options = {"posterior": args.posterior, "networks": args.networks}
    if options == {"posterior": "deterministic", "networks": "residual"}:
        options = {}
    try:
        model = AdversarialAE(z_dim=args.z_dim, **options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise FlagError(f"models.py accepts z_dim only ({error}): omit --base, --networks and --posterior") from None
    if any(isinstance(weight, nn.UninitializedParameter) for weight in model.parameters()):
        with evaluation_mode(model):  # lazy layers get their weights in a first forward pass
            model.discriminator(model(torch.zeros(1, 1, 28, 28))[1])
    channels_last = device.type == "cpu" or args.precision == "bf16"  # the fastest memory layout there
    model.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
    model.capturable = getattr(model, "capturable", False) and not args.no_graph
    return model


class EMA:
    """A copy of a model, `model`, whose weights are an exponential moving average of the original's over the steps.

    The decay of the n-th step is min(decay, (1 + n) / (10 + n)): 0.999 averages over about 1,000 steps, and in the
    first 9,000 over about the last tenth of them (Polyak and Juditsky 1992; Karras et al., arXiv:1710.10196, A.1).
    """

    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay, self.updates, self._original = decay, 0, model
        self._averaged, self._current = (
            [tensor.detach() for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point()]
            for network in (self.model, model))  # a shared tensor appears once

    def update(self):
        """Update the average with the current weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._averaged, self._current, 1 - decay)  # one call for all, as in torch.optim.swa_utils

    def state_dict(self):
        """Return the number of steps and the averaged weights, in the layout that other programs expect."""
        current = self._original.state_dict()  # has the counters of steps, which are no floats
        weights = {name: (tensor if tensor.is_floating_point() else current[name])
                   .to("cpu", copy=True, memory_format=torch.contiguous_format)  # contiguous() keeps some strides
                   for name, tensor in self.model.state_dict().items()}
        return {"updates": self.updates, "weights": weights}

    def load_state_dict(self, state):
        self.updates = state["updates"]
        self.model.load_state_dict(state["weights"])


@contextlib.contextmanager
def evaluation_mode(model):
    """Use a model in evaluation mode and without gradients; then restore its modes and torch's random state."""
    random = RandomState(torch.device(model.device))  # a student's may be a string
    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.callback(random.load_state_dict, random.state_dict())
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        yield
