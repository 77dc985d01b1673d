"""The moving average of the weights, which is what a run shows, measures and saves."""

import copy

import torch


class EMA:
    """A copy of a model, `model`, whose weights are an exponential moving average of the original's over the steps.

    A step's weights count `decay` times as much after each later step: 0.999 averages over about 1,000 steps. The n-th
    step's decay is (1 + n) / (10 + n) as long as that is less, for 0.999 in the first 9,000 steps, so that the average
    is over the last tenth of them and the initial weights are soon forgotten.
    Statistics, as of batch normalisation, are averaged too (Polyak and Juditsky 1992; Karras et al., arXiv:1710.10196,
    appendix A.1: samples of a model so averaged are better).
    """

    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.updates = 0
        averaged, current = ([tensor.detach() for tensor in (*network.parameters(), *network.buffers())]
                             for network in (self.model, model))
        pairs = list(zip(averaged, current, strict=True))  # each once, even if two layers share it
        self._averaged, self._current = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._counters, self._current_counters = zip(*counters, strict=True) if counters else ((), ())

    def update(self):
        """Take in the weights as they are now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._averaged, self._current, 1 - decay)  # one call for all, as in torch.optim.swa_utils
        if self._counters:  # the base networks have none, and the call takes no empty list
            torch._foreach_copy_(self._counters, self._current_counters)

    def state_dict(self):
        return {"updates": self.updates, "weights": weights_on_cpu(self.model)}

    def load_state_dict(self, state):
        self.updates = state["updates"]
        self.model.load_state_dict(state["weights"])


def weights_on_cpu(model):
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}
