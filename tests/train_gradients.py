"""What train_aae should step on: the gradients of the objective, at the weights of a model that stays as it is."""

import functools

import torch
from torch import nn
from torch.nn.functional import softplus

from tests.train_epoch import PARTS, Epoch, block_images, close, gradient


class Reference:
    """The gradients of the objective at the weights of a model, by the model's own losses, and which can be told apart.

    `terms` has two for each network, [number of weights]: of the reconstruction and of the adversarial loss for encoder
    and decoder; of its own and of the adversarial loss for the discriminator. `leak` is the encoder's gradient of the
    discriminator's loss where codes are not detached.
    """

    DRAWS = 12  # of prior samples, and of an encoder's noise if it has any

    def __init__(self, model, x):
        model.train()
        draws = [self.draw(model, x, False) for _ in range(2)]
        same = all(close(draw, other) for draw, other in zip(draws[0].values(), draws[1].values(), strict=True))
        draws += [] if same else [self.draw(model, x, False) for _ in range(self.DRAWS - 2)]
        own = [self.draw(model, x, True) for _ in range(2 * self.DRAWS)]
        mean = {name: sum(draw[name] for draw in part) / len(part) for part in (draws, own) for name in part[0]}
        self.terms = {part: torch.stack([mean[part, "first"], mean[part, "adversarial"]], 1) for part in PARTS}
        self.leak = mean["encoder", "leak"]
        self.weighed = all(  # by lambda, as they should be
            float((2 * mean[part, "both"] - self.terms[part].sum(1)).norm()) < 0.2 * float(self.terms[part].norm())
            for part in PARTS[:2])
        self.sure = {part: self.is_sure(part, draws) for part in PARTS}
        self.noise = self.spread("discriminator", "first", own)  # of the coefficients of one step
        model.zero_grad()

    def draw(self, model, x, own):
        """Return gradients by (network, term), of the discriminator's own loss or of all others."""
        gradients = {}
        for term, parts in [("first", PARTS[2:])] if own else [
                ("first", PARTS[:2]), ("adversarial", PARTS), ("both", PARTS[:2]), ("leak", PARTS[:1])]:
            model.zero_grad()
            recon_x, z = model(x)
            if own or term == "leak":
                loss, _ = model.get_loss_discriminator(z if term == "leak" else z.detach())
            else:
                lambda_ = {"first": 1.0, "adversarial": 0.0, "both": 0.5}[term]
                loss, _ = model.get_loss_autoencoder(x, recon_x, z, lambda_)
            loss.backward()
            gradients.update({(part, term): gradient(getattr(model, part)) for part in parts})
        return gradients

    def is_sure(self, part, draws):
        """Whether a network's terms can be told from each other, and those of the encoder from its noise."""
        first, adversarial = self.terms[part].norm(dim=0).tolist()
        if part != "discriminator" and not self.weighed:  # a mistake of models.py
            return False
        if part == "decoder" or part == "discriminator" and adversarial == 0:  # one term
            return first > 0 and adversarial < 1e-3 * first
        if min(first, adversarial) <= 1e-5 * max(first, adversarial):
            return False
        cosine = self.terms[part][:, 0] @ self.terms[part][:, 1] / first / adversarial
        noise = [max(self.spread(part, term, draws)) for term in ("first", "adversarial") if part == "encoder"]
        return bool(abs(cosine) < 0.95) and max(noise, default=0) < 0.15

    def spread(self, part, term, draws):
        """Return the standard deviations of both coefficients that a term has in single draws."""
        return torch.tensor([self.fit(part, draw[part, term]) for draw in draws]).std(0).tolist()

    def part_of(self, part, lambda_, step):
        """Return how far a step goes in the direction that is right at a lambda, in units of a step for one batch."""
        weights = [1.0, 0.0] if part == "discriminator" else [lambda_, 1 - lambda_]
        right = self.terms[part] @ torch.tensor(weights, dtype=step.dtype)
        return float(step @ right / (right @ right + 1e-300))

    def fit(self, part, vector):
        """Return how much of a network's two terms is in a vector."""
        return least_squares(self.terms[part], vector)

    def leaked(self, vector):
        """Return how much of the discriminator's loss is in an encoder's steps on the reconstruction alone."""
        first, leak = least_squares(torch.stack([self.terms["encoder"][:, 0], self.leak], 1), vector)
        return leak / first if first > 0 else 0.0


def least_squares(terms, vector):
    """Return the coefficients by which terms [weights, 2] make up a vector; 0 for a term that is 0."""
    norms = terms.norm(dim=0)
    solution = torch.zeros(2, dtype=vector.dtype)
    columns = (terms / norms.clamp(min=1e-300))[:, norms > 0]
    solution[norms > 0] = torch.linalg.lstsq(columns, vector[:, None]).solution[:, 0] / norms[norms > 0]
    return solution.tolist()


class Observation:
    """Epochs of train_aae on a model that has been brought to life, and the gradients that they should step on."""

    STARTS, BATCHES = 3, 6

    def __init__(self, train_aae, new_model, seed):
        self.train_aae = train_aae
        for start in range(self.STARTS):
            torch.manual_seed(seed + 1000 * start)
            self.model = living(new_model())
            x = block_images(16)
            self.reference = Reference(self.model, x)
            if all(self.reference.sure.values()) or not self.reference.weighed:
                break
        first, adversarial = self.reference.terms["encoder"].norm(dim=0).tolist()
        self.lambda_ = adversarial / (first + adversarial) if first * adversarial else 0.5  # equal norms of both
        self.mixed = self.epoch(block_images(3 * 64 + 2), self.lambda_, 64)
        self.same = {lambda_: self.epoch(x.repeat(self.BATCHES, 1, 1, 1), lambda_, 16) for lambda_ in (
            0.0, self.lambda_, 1.0)}

    def epoch(self, images, lambda_, batch_size):
        return Epoch(self.train_aae, self.model, images, lambda_, batch_size)

    @functools.cached_property
    def long(self):
        """An epoch long enough for whoever steps once in several batches, or begins late."""
        return self.epoch(block_images(40 * 16), self.lambda_, 16)

    def steps(self, part, epoch):
        """Return the gradients of a network that its optimizer has stepped on in an epoch, [steps, weights]."""
        player, index = ("disc", 0) if part == "discriminator" else ("ae", PARTS.index(part))
        return [step[index] for step in epoch.steps[player]]

    def coefficients(self, part, lambda_):
        """Return how much of the two terms of a network its steps have had in an epoch at one lambda."""
        steps = self.steps(part, self.same[lambda_])
        return self.reference.fit(part, sum(steps)) if steps else [0.0, 0.0]

    def lost(self, name):
        """Whether the autoencoder's loss never got a `recon_x` or `z_fake` through which gradients pass."""
        return all(name in call.cut for epoch in self.same.values() for call in epoch.losses["ae"])


def living(model):
    """Train a model by the objective for 30 steps, so that codes and logits differ, and return it."""
    with torch.no_grad():  # lazy layers get their weights
        model.discriminator(model(block_images(16))[1])
    for module in model.train().modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0  # so that losses are functions of weights and batch
    optimizer_ae = torch.optim.Adam([*model.encoder.parameters(), *model.decoder.parameters()], 1e-3)
    optimizer_disc = torch.optim.SGD(model.discriminator.parameters(), 0.05)
    for _ in range(30):
        x = block_images(16)
        recon_x, z = model(x)
        ae_loss = (x - recon_x).square().mean() + 0.1 * softplus(-model.discriminator(z)).mean()
        disc_loss = (softplus(-model.discriminator(torch.randn_like(z))) + softplus(model.discriminator(z.detach())))
        for optimizer, loss in ((optimizer_ae, ae_loss), (optimizer_disc, disc_loss.mean())):
            model.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@functools.lru_cache(1)
def observe(train_aae, new_model, seed):
    return Observation(train_aae, new_model, seed)
