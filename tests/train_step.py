"""Tests of train_aae. Its optimizers move nothing, so its steps can be compared with the gradients of the objective."""

import torch

from tests.model_layers import Layers
from tests.train_epoch import NOT_DETACHED, PARTIAL, PARTS, PLAYERS, TrainGroup, close
from tests.train_gradients import observe

__unittest = True

UNCLEARED = ("Mistake 3: the {name}'s step includes gradients of other losses or steps: call optimizer_{player}."
             "zero_grad() before {player}_loss.backward()")
UPWARDS = "Mistake 30: the {} is trained to raise its loss: call {}_loss.backward(), with no minus before it"
CUT = ("Mistake 19: train_aae gives get_loss_autoencoder a {} through which no gradient reaches the encoder: use no "
       "detach() or torch.no_grad() before it")
LOST = ("Mistake 18: lambda_ does not weigh the losses that train_aae steps on as it should (at 0 only the adversarial "
        "loss, at 1 only the reconstruction): call get_loss_autoencoder(x, recon_x, z, lambda_) and ae_loss.backward()")


# What is found -------------------------------------------------------------------------------------------------------

def faults_of_batches(seen):
    """Yield what is wrong with the images and codes that the losses get, in an epoch of three batches and a rest."""
    epoch, calls = seen.mixed, seen.mixed.losses["ae"]
    origins = [epoch.origin_of_images(call.given["x"]) for call in calls if len(call.given["x"]) == 64]
    if len(calls) == 1:
        yield "Mistake 22: train_aae stops after one batch: is a break or a return left in the loop?"
    if len(origins) > 2 and len({*origins}) == 1 and isinstance(origins[0], int):
        yield ("Mistake 23: train_aae trains the same batch again and again: loop over train_loader itself, with no "
               "next(iter(train_loader)) in the loop, and copy what you collect")
    if len(epoch.batches[-1]) not in [len(call.given["x"]) for call in calls] and calls and calls[-1].turn != 3:
        yield f"{PARTIAL} it is skipped"
    for name, images in (("the encoder", [call.given for call in epoch.encoded]),
                         ("get_loss_autoencoder", [call.given["x"] for call in calls])):
        for given in images:
            origin = epoch.origin_of_images(given)
            if isinstance(origin, int):
                mean, slope, noise = line(given, epoch.batches[origin])
                right = float(epoch.batches[origin].mean())
                denoising = name == "the encoder" and noise > 0.05  # which is no mistake
                if not denoising and (abs(mean - right) > 0.1 or not 0.85 < slope < 1.15 or noise > 0.05):
                    yield (f"Mistake 23: {name} gets changed images (their mean is {mean:.2f} in place of {right:.2f}, "
                           f"their contrast {slope:.2f} times the loader's): leave them in [-1, 1]")
    yield from faults_of_codes(epoch)


def faults_of_codes(epoch):
    """Yield if the codes of the discriminator's loss, or those decoded for recon_x, are not those of the batch."""
    trained = {turn: [] for turn in range(-1, len(epoch.batches))}  # batches, by the one that was drawn last
    for loss in epoch.losses["ae"]:
        trained[loss.turn].append(epoch.origin_of_images(loss.given["x"]))
    given = [[call.given for call in epoch.decoded if close(call.output, loss.given["recon_x"])]
             for loss in epoch.losses["ae"] if "recon_x" in loss.given]
    for name, losses, codes in (
            ("get_loss_discriminator", epoch.losses["disc"], [[loss.given["z_fake"]] for loss in epoch.losses["disc"]]),
            ("recon_x", epoch.losses["ae"], given)):
        origins = [(loss.turn, set().union(*map(epoch.origins_of_codes, candidates)))
                   for loss, candidates in zip(losses, codes, strict=False)
                   if candidates and len(candidates[0]) == len(epoch.batches[0])]
        wrong = [found for turn, found in origins if not found & {turn, "other images", *trained[turn]}]
        if epoch.encoded and len(wrong) > len(origins) / 2:
            what = "another batch" if isinstance(min(wrong[-1], key=str), int) else min(wrong[-1], key=str)
            yield (f"Mistake 31: {name} is made from codes of {what}: use those that the encoder makes of this batch, "
                   "recon_x, z = model(x)")


def faults_of_steps(seen):
    """Yield what is wrong with the steps: none, uncleared, upwards, or other weights of the terms than lambda's."""
    for part in PARTS:
        player = "disc" if part == "discriminator" else "ae"
        moved = [step for step in seen.steps(part, seen.same[seen.lambda_]) if step.any()]
        if not moved and not any(step.any() for step in seen.steps(part, seen.long)):
            cut = player == "ae" and (seen.lost("recon_x") or seen.lost("z_fake"))
            yield (cut and CUT.format("recon_x") or f"Mistake 17: train_aae does not train the {part}: for each batch, "
                   f"call {player}_loss.backward() and then optimizer_{player}.step(), the optimizer that train_aae is "
                   "given; clear nothing between, freeze nothing")
        steps = seen.steps(part, seen.mixed)
        if any(torch.equal(one, other) and one.any() for one, other in zip(steps, steps[1:], strict=False)):
            yield (f"Mistake 22: optimizer_{player}.step() is called twice on the same gradient: call zero_grad(), "
                   f"{player}_loss.backward() and step() once a batch")
        if len(steps) == 1 and len(seen.steps(part, seen.long)) == 1:
            yield f"Mistake 22: optimizer_{player}.step() is called once an epoch: call it for each batch"
        if grows([seen.reference.part_of(part, seen.lambda_, step) for step in moved]):
            yield UNCLEARED.format(name=part, player=player)
    yield from faults_of_discriminator(seen)
    yield from faults_of_autoencoder(seen)


def faults_of_discriminator(seen):
    """Yield a discriminator that is trained upwards, or also by the autoencoder's loss, most of which is there at 0.

    Prior samples make coefficients uncertain; what is told is at least 6.5 standard deviations from what is right.
    """
    own, adversarial = seen.coefficients("discriminator", 0.0)
    steps = max(1, len(seen.steps("discriminator", seen.same[0.0])))
    errors = [noise * (1 / steps + 1 / (2 * seen.reference.DRAWS)) ** 0.5 for noise in seen.reference.noise]
    if own < 0 and 6.5 * errors[0] < 1:
        yield UPWARDS.format("discriminator", "disc")
    elif own > 0 and seen.reference.sure["discriminator"] and abs(adversarial) > max(0.5, 6.5 * errors[1]) * own:
        yield UNCLEARED.format(name="discriminator", player="disc")


def faults_of_autoencoder(seen):
    """Yield what the steps of encoder and decoder say of lambda and of the terms of the loss, in words."""
    decoder, encoder = ({lambda_: seen.coefficients(part, lambda_) for lambda_ in seen.same}
                        for part in ("decoder", "encoder"))
    low, middle, high = sorted(seen.same)
    if seen.reference.sure["decoder"] and decoder[middle][0] < 0:
        yield UPWARDS.format("decoder", "ae")
    if seen.reference.sure["encoder"]:
        share = {lambda_: relative(*encoder[lambda_], lambda_ if lambda_ == middle else 0.5) for lambda_ in encoder}
        yield from faults_of_encoder(seen, share[low], share[middle], share[high])
    if seen.reference.sure["decoder"] and abs(decoder[low][0]) > 0.5 * abs(decoder[middle][0]):
        yield LOST


def faults_of_encoder(seen, low, middle, high):
    """Yield by what an encoder's steps differ from (0, 1) at lambda 0, (1, 1) between, and (1, 0) at 1.

    Each is a pair: the shares of the reconstruction and of the adversarial loss, the larger of which is 1.
    """
    steps = seen.steps("encoder", seen.same[1.0])
    if middle[0] < -0.5 or high[0] < -0.5:
        yield UPWARDS.format("encoder", "ae")
    elif low[1] < -0.5:
        yield "Mistake 1: train_aae trains the encoder to be recognized: gen_loss must fall, not rise"
    elif middle[1] < -0.5 or steps and high[1] < -0.03 and seen.reference.leaked(sum(steps)) > 0.5:
        yield NOT_DETACHED
    elif low[0] > 0.5 and low[1] < 0.5 and high[1] > 0.5 and high[0] < 0.5:
        yield "Mistake 9: train_aae exchanges lambda_ and 1 - lambda_: pass lambda_ itself to get_loss_autoencoder"
    elif max(low[1], middle[1], high[1]) < 0.5:
        yield CUT.format("z_fake") if seen.lost("z_fake") else LOST
    elif max(low[0], middle[0], high[0]) < 0.5:
        decoder_learns = any(step.any() for step in seen.steps("decoder", seen.same[1.0]))
        yield CUT.format("recon_x") if seen.lost("recon_x") or decoder_learns else LOST
    elif any(abs(share - right) > 0.5 for share, right in zip(low + middle + high, (0, 1, 1, 1, 1, 0), strict=True)):
        yield LOST


def faults_of_curves(seen):
    """Yield what is wrong with what is logged; the losses are known, as the weights are frozen."""
    epoch = seen.mixed
    for tag in {tag for tag, _ in epoch.points}:
        steps = [step for other, step in epoch.points if other == tag]
        if len({*steps}) < len(steps):
            yield (f"Mistake 14: four batches are logged at steps {steps} of {tag}: log each batch at its own step, "
                   "counted across epochs")
    for player, other in zip(PLAYERS, PLAYERS[::-1], strict=True):
        name, advice = f"{player}_loss", f"call logger_{player}.add_values({player}_dict) once for each batch"
        logged = [values[name] for values in epoch.logged[player] if name in values]
        calls = [(call.turn, call.values[name]) for call in epoch.losses[player] if name in call.values]
        right = [value for _, value in calls]
        turns = [[value for other, value in calls if other == turn] for turn in sorted({turn for turn, _ in calls})]
        known = [[(value, value) for value in right],  # and whoever calls a loss several times a batch may log means
                 [(min(values), max(values)) for values in turns], [(sum(right) / len(right),) * 2] if right else []]
        if any(name in values for values in epoch.logged[other]):
            yield f"Mistake 29: {name} is logged by logger_{other}: {advice}"
        elif epoch.logged[other] and not epoch.logged[player] and right:
            yield f"Mistake 29: {name} is not logged, unlike {other}_loss: {advice}"
        elif right and not any(in_order(logged, ranges) for ranges in known):
            yield (f"Mistake 29: {name} is logged as {rounded(logged)}, but in the four batches it is "
                   f"{rounded(right)}: {advice}")


def line(given, images):
    """Return the mean of changed images, the slope by which they depend on the original, and what is left of them."""
    given, images = given.double().flatten(), images.double().flatten()
    covariance = torch.stack([images, given]).cov()
    slope = covariance[0, 1] / covariance[0, 0]
    left = 1 - slope * covariance[0, 1] / covariance[1, 1]  # share of their variance
    return float(given.mean()), float(slope), float(left)


def grows(parts):
    """Whether steps on the same batch grow as 1, 2, 3 ..., as gradients do that are never cleared."""
    return len(parts) > 3 and parts[0] > 0 and all(0.7 < part / parts[0] / i < 1.4 for i, part in enumerate(parts, 1))


def relative(first, adversarial, lambda_):
    """Return coefficients divided by the weights that lambda gives them and by the larger of the two; 0 if both are."""
    pair = first / lambda_, adversarial / (1 - lambda_)
    largest = max(map(abs, pair))
    return tuple(value / largest for value in pair) if largest > 1e-6 else (0.0, 0.0)


def in_order(values, ranges):
    """Whether values lie in ranges (low, high), each in one of its own, and in their order."""
    rest = iter(ranges)
    return all(any(low - 1e-4 * max(1, abs(low)) <= value <= high + 1e-4 * max(1, abs(high)) for low, high in rest)
               for value in values)


def rounded(values):
    return [float(f"{value:.4g}") for value in values]


class TrainStep(TrainGroup):
    """train_aae: its batches, its steps, and what it logs. Of several faults, the most basic one is told."""

    def tell(self, *searches):
        """Fail with the first fault that the searches find."""
        self.working_model()  # or skip
        fault = self.attempt("train_aae", lambda train: next((fault for search in searches for fault in search(
            observe(train.train_aae, self.models.AdversarialAE, self.seed))), None))
        if fault and "Mistake 17" in fault and Layers in self.faulty:  # a network that cannot learn
            self.skipTest(self.TOLD)
        self.check(fault is None, fault)

    def test_batches(self):
        self.tell(faults_of_batches)

    def test_steps(self):
        self.tell(faults_of_batches, faults_of_steps)

    def test_curves(self):
        self.tell(faults_of_curves)

    def test_39_graphs_are_freed(self):
        self.tell(lambda seen: ["Mistake 39: the graphs of all batches are kept in memory: add up numbers, "
                                "ae_loss.item(), not tensors"] * seen.same[1.0].kept)
