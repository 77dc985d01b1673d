"""The exponential moving average (EMA) of the weights, which a run shows, evaluates and saves."""

import copy

import torch


class EMA:
    """A copy of a model, `model`, whose weights are an exponential moving average of the original's over the steps.

    The decay of the n-th step is min(decay, (1 + n) / (10 + n)). A decay of 0.999 averages over about 1,000 steps. In
    the first 9,000 steps the second term is smaller: the average is over about the last tenth of the steps, so the
    initial weights are soon forgotten. The statistics of batch normalisation are averaged too. (Polyak and Juditsky
    1992; Karras et al., arXiv:1710.10196, appendix A.1: averaged weights give better samples.)
    """

    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.updates = 0
        averaged, current = ([tensor.detach() for tensor in (*network.parameters(), *network.buffers())]
                             for network in (self.model, model))
        pairs = list(zip(averaged, current, strict=True))  # shared tensors appear once
        self._averaged, self._current = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._counters, self._current_counters = zip(*counters, strict=True) if counters else ((), ())

    def update(self):
        """Update the average with the current weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._averaged, self._current, 1 - decay)  # one call for all, as in torch.optim.swa_utils
        if self._counters:  # the base networks have none, and the call rejects empty lists
            torch._foreach_copy_(self._counters, self._current_counters)

    def state_dict(self):
        return {"updates": self.updates, "weights": weights_on_cpu(self.model)}

    def load_state_dict(self, state):
        self.updates = state["updates"]
        self.model.load_state_dict(state["weights"])


def weights_on_cpu(model):
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}
