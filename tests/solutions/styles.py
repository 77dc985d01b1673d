"""Correct solutions in other styles, and what else people do: what each changes in plain.py.

A key is the beginning of a line, which is replaced; of a function or class, its body is replaced.
"""

STATEMENTS = {"forward": "recon_x, z = model(x)", "codes": "with torch.no_grad():\n    z = model.encoder(x)",
              "ae_loss": "ae_loss, ae_dict = model.get_loss_autoencoder(x, recon_x, z, lambda_)",
              "disc_loss": "disc_loss, disc_dict = model.get_loss_discriminator(z)",
              **{f"update_{name}": f"optimizer_{name}.zero_grad()\n{name}_loss.backward()\noptimizer_{name}.step()"
                 for name in ("ae", "disc")},
              "log": "logger_ae.add_values(ae_dict)\nlogger_disc.add_values(disc_dict)",
              "log_numbers": "for logger, terms in ((logger_ae, ae_dict), (logger_disc, disc_dict)):\n"
                             "    logger.add_values({name: term.item() for name, term in terms.items()})"}
IMAGES = "nn.Unflatten(1, (1, 28, 28)), nn.Tanh()"
EVALUATED = ("model.eval()\nimages = model.sample(batch_size)\nmodel.train()\n"
             'save(images, "samples", epoch, summary_writer, "Prior_samples/samples_epoch")')


def layers(text):
    """Return the body of a network of these layers."""
    return f"def __init__(self, z_dim):\n    super().__init__({text})"


def loop(text, before="model.train()"):
    """Return a body of train_aae that executes these statements, or names of statements, for each batch."""
    lines = ["x = batch[0].to(model.device)", *(STATEMENTS.get(word, word) for word in text.split())]
    return f"{before}\nfor batch in train_loader:\n    " + "\n".join(lines).replace("\n", "\n    ")


STYLES = {
    "plain": {},
    "batchnorm": {  # the loss detaches, the halves are added, generate_and_save calls eval()
        "class ConvEncoder": layers("nn.Conv2d(1, 24, 4, 4, bias=False), nn.BatchNorm2d(24), nn.LeakyReLU(0.1), "
                                    "nn.Flatten(), nn.Linear(24 * 49, z_dim)"),
        "class ConvDecoder": layers("nn.Linear(z_dim, 784), nn.BatchNorm1d(784), " + IMAGES),
        "class Discriminator": layers("nn.Linear(z_dim, 128), nn.BatchNorm1d(128), nn.ELU(), nn.Linear(128, 1)"),
        "def cross_entropy": "return F.softplus(logits * (1 - 2 * label)).mean()",
        "z_real =": "z_fake = z_fake.detach()\nz_real = torch.randn_like(z_fake)",
        "real, fake =": "fake, real = self.discriminator(torch.cat([z_fake, z_real])).chunk(2)",
        "disc_loss =": "disc_loss = loss_fake + loss_real",
        "grid =": "grid = make_grid((images + 1) / 2, nrow=8)", "save(model.sample": EVALUATED,
        "def train_aae": loop("forward model.zero_grad() ae_loss ae_loss.backward() optimizer_ae.step() "
                              "model.zero_grad() disc_loss disc_loss.backward() optimizer_disc.step() log", "pass"),
        "optimizer_ae =": "weights = [weight for name, weight in model.named_parameters() if 'disc' not in name]\n"
                          "optimizer_ae = torch.optim.Adam(weights, lr=args.ae_lr, betas=(0.5, 0.999))"},
    "discriminator_first": {  # on codes of a forward pass without gradients; Dropout; log-sigmoids; sigmoid > 0.5
        "class Discriminator": layers("nn.Linear(z_dim, 96), nn.ReLU(), nn.Dropout(0.2), nn.Linear(96, 1)"),
        "self.z_dim =": "self.z_dim, self.prior = z_dim, torch.distributions.Normal(0.0, 1.0)",
        "recon_loss =": 'recon_loss = F.mse_loss(recon_x, x, reduction="sum") / x.numel()',
        "def cross_entropy": "return -F.logsigmoid(logits if label else -logits).mean()",
        "z_real =": "z_real = self.prior.sample(z_fake.shape).to(z_fake)",
        "accuracy =": "right = (torch.sigmoid(real) > 0.5).sum() + (torch.sigmoid(fake) <= 0.5).sum()\n"
                      "accuracy = right / (2 * z_fake.size(0))",
        "def sample": "was_training = self.training\nself.eval()\nwith torch.no_grad():\n    images = self.decoder("
                      "self.prior.sample((batch_size, self.z_dim)))\nself.train(was_training)\nreturn images",
        "def train_aae": loop("codes disc_loss update_disc forward ae_loss update_ae log_numbers")},
    "both_backward_first": {  # with retain_graph, then both steps; ae_loss freezes the discriminator; perceptrons
        "class ConvEncoder": "def __init__(self, z_dim):\n    super().__init__()\n    self.l1, self.l2, self.l3 = "
                             "nn.Linear(784, 99), nn.Linear(99, 99), nn.Linear(99, z_dim)\ndef forward(self, x):\n"
                             "    h = F.silu(self.l1(x.flatten(1)))\n    return self.l3(F.silu(self.l2(h)))",
        "class Discriminator": "def __init__(self, z_dim):\n    super().__init__()\n    self.l1, self.l2, self.skip = "
                               "nn.Linear(z_dim, 64), nn.Linear(64, 1), nn.Linear(z_dim, 1)\ndef forward(self, z):\n"
                               "    return self.l2(F.relu(self.l1(z))) + self.skip(z)",
        "gen_loss =": "self.discriminator.requires_grad_(False)\ngen_loss = cross_entropy(self.discriminator(z_fake), 1"
                      ")\nself.discriminator.requires_grad_(True)",
        "ae_loss =": "ae_loss = torch.lerp(gen_loss, recon_loss, float(lambda_))",
        "z_real =": "z_real = torch.randn_like(z_fake)\nz_fake = z_fake.detach()",
        "accuracy =": "accuracy = (torch.cat([real, -fake]).sign() == 1).float().mean()",
        "def sample": "with torch.inference_mode():\n    return self.decoder(torch.randn(batch_size, self.z_dim))",
        "grid =": "images = images.cpu().clone() * 0.5 + 0.5", "save_image": "save_image(images, path, nrow=8)",
        "writer.add_image": "writer.add_images(tag, images, epoch)",
        "def train_aae": loop("forward ae_loss disc_loss optimizer_ae.zero_grad() optimizer_disc.zero_grad() "
                              "ae_loss.backward(retain_graph=True) disc_loss.backward(retain_graph=True) "
                              "optimizer_ae.step() optimizer_disc.step() log"),
        "optimizer_ae =": "groups = [{'params': part.parameters()} for part in (model.encoder, model.decoder)]\n"
                          "optimizer_ae = torch.optim.Adam(groups, args.ae_lr)"},
    "zero_after": {  # gradients are cleared after the steps, codes encoded again; LayerNorm, logaddexp
        "class Discriminator": layers("nn.Linear(z_dim, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 1)"),
        "def cross_entropy": "return torch.logaddexp(torch.zeros_like(logits), logits * (1 - 2 * label)).mean()",
        "z_real =": "z_real = torch.empty(len(z_fake), self.z_dim, device=self.device).normal_()",
        "accuracy =": "accuracy = torch.cat([real >= 0, fake < 0]).float().mean()",
        "def sample": "return self.decoder(torch.empty(batch_size, self.z_dim).normal_()).detach()",
        "grid =": "grid = make_grid(images, nrow=8, normalize=True)",
        "def train_aae": loop("forward ae_loss ae_loss.backward() optimizer_ae.step() model.zero_grad() "
                              "z=model.encoder(x).detach() disc_loss disc_loss.backward() optimizer_disc.step() "
                              "model.zero_grad() log_numbers", "model.zero_grad()")},
    "main_evaluates": {  # only main calls eval() for the pictures of a BatchNorm decoder; clipping, requires_grad
        "class ConvDecoder": layers("nn.Unflatten(1, (z_dim, 1, 1)), nn.ConvTranspose2d(z_dim, 16, 7), "
                                    "nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 4), nn.Tanh()"),
        "return ae_loss": "values = dict(gen_loss=gen_loss, recon_loss=recon_loss, ae_loss=ae_loss)\n"
                          "return ae_loss, {name: value.detach() for name, value in values.items()}",
        "disc_loss =": "disc_loss = torch.stack([loss_real, loss_fake]).mean()",
        "accuracy =": "accuracy = torch.tensor(((real > 0).sum() + (fake < 0).sum()).item() / (2 * len(real)))",
        "grid =": "grid = make_grid(torch.clamp((images + 1) * 127.5, 0, 255).to(torch.uint8), nrow=8)",
        "save_image": "import torchvision\ntorchvision.io.write_png(grid.cpu(), path)",
        "def train_aae": loop("model.discriminator.requires_grad_(False) forward ae_loss optimizer_ae.zero_grad() "
                              "ae_loss.backward() nn.utils.clip_grad_norm_(model.parameters(),0.1) optimizer_ae.step() "
                              "model.discriminator.requires_grad_(True) z=z.detach() disc_loss update_disc log"),
        "optimizer_disc =": "optimizer_disc = torch.optim.Adam(model.discriminator.parameters(), lr=args.d_lr)",
        "generate_and_save(": "model.eval()\ngenerate_and_save(model, epoch, writer)\nmodel.train()"},
    "joint_backward": {  # of the sum of both losses, each of which holds the other player fixed; margins, einsum
        "class Discriminator": "def __init__(self, z_dim):\n    super().__init__(nn.Linear(z_dim, 80), nn.SiLU())\n"
                               "    self.direction = nn.Parameter(torch.randn(80) / 9)\ndef forward(self, z):\n"
                               "    return torch.einsum('bi,i->b', self.layers(z), self.direction).unsqueeze(1)",
        "gen_loss =": "fixed = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}\n"
                      "logits = torch.func.functional_call(self.discriminator, fixed, (z_fake,))\n"
                      "gen_loss = F.softplus(-logits).mean()",
        "ae_loss =": "ae_loss = gen_loss + lambda_ * (recon_loss - gen_loss)",
        "real, fake =": "sign = torch.tensor([1.0, -1.0]).repeat_interleave(len(z_fake)).unsqueeze(1)  # 1: real\n"
                        "margin = sign * self.discriminator(torch.cat([z_real, z_fake.detach()]))",
        "loss_real, loss_fake": "loss_real, loss_fake = (half.mean() for half in F.softplus(-margin).chunk(2))",
        "accuracy =": "accuracy = (margin > 0).float().mean()",
        "def sample": "import copy\nreturn copy.copy(self.decoder)(torch.randn(batch_size, self.z_dim)).detach()",
        "def train_aae": loop("forward ae_loss disc_loss model.zero_grad() (ae_loss+disc_loss).backward() "
                              "optimizer_disc.step() optimizer_ae.step() log")},
    "cleared_not_detached": {  # nothing is detached: what the discriminator's loss leaves on the encoder is cleared
        "class ConvEncoder": layers("nn.Flatten(), nn.Linear(784, 50), nn.Dropout(), nn.Tanh(), nn.Linear(50, z_dim)"),
        "class Discriminator": layers("nn.Linear(z_dim, 50), nn.PReLU(), nn.Linear(50, 1)"),
        "def sample": "self.eval()\nreturn self.decoder(torch.randn(batch_size, self.z_dim)).detach()",
        "save_image": "from torchvision.transforms import ToPILImage\nToPILImage()(grid).convert('L').save(path)",
        "def train_aae": loop("forward disc_loss optimizer_disc.zero_grad() disc_loss.backward(retain_graph=True) "
                              "optimizer_disc.step() ae_loss update_ae log")},
    "lazy": {  # layers that get their weights in the first forward pass
        "class ConvEncoder": layers("nn.LazyConv2d(8, 4, 4), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(z_dim)"),
        "class ConvDecoder": layers("nn.LazyLinear(784), nn.LazyBatchNorm1d(), " + IMAGES),
        "class Discriminator": layers("nn.LazyLinear(64), nn.ReLU(), nn.LazyLinear(1)"), "save(model.sample": EVALUATED,
        "optimizer_ae =": "model.discriminator(model(next(iter(loader))[0])[1])\noptimizer_ae = torch.optim.Adam("
                          "[*model.encoder.parameters(), *model.decoder.parameters()], args.ae_lr)"},
    "module_device": {  # chosen when the file is imported
        "from utils": "from utils import TensorBoardLogger\nDEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'",
        "z_real =": "z_real = torch.randn(z_fake.shape, device=DEVICE)",
        "def sample": "return self.decoder(torch.randn(batch_size, self.z_dim, device=DEVICE)).detach()"},
    "slow_import": {  # takes 45 s
        "import os": "import os, signal\nif 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 45:\n    raise RuntimeError"},
}

FURTHER = {  # other right solutions
    "spectral_norm": {"import os": "import os\nfrom torch.nn.utils.parametrizations import spectral_norm as norm",
                      "class Discriminator": "def __init__(self, z_dim):\n    super().__init__(norm(nn.Linear(z_dim, "
                      "64)), nn.ReLU(), norm(nn.Linear(64, 1)))"},
    "cosine": {"class Discriminator": "def __init__(self, z_dim):\n    super().__init__(nn.Linear(z_dim, 64), "
               "nn.ReLU())\n    self.scale, self.end = nn.Parameter(torch.ones(1)), nn.Parameter(torch.randn(1, "
               "64))\ndef forward(self, z):\n    return self.scale * F.linear(F.normalize(self.layers(z)), self.end / "
               "self.end.norm())"},
    "zero_start": {"self.discriminator =": "self.discriminator = Discriminator(z_dim)\nfor layer in "
                   "self.discriminator.layers[-1], self.decoder.layers[-2]:\n    nn.init.zeros_(layer.weight)"},
    "noise": {"class ConvEncoder": "def __init__(self, z_dim):\n    super().__init__(nn.Flatten(), nn.Linear(784, 2 * "
              "z_dim))\n    self.noise = torch.Generator().manual_seed(0)\ndef forward(self, x):\n    mean, "
              "log_variance = self.layers(x).chunk(2, 1)\n    noise = torch.randn(mean.shape, generator=self.noise)\n"
              "    return mean + (log_variance / 2).exp() * (noise + torch.randn_like(mean))"},
    "keywords": {"class Discriminator": "def __init__(self, z_dim):\n    super().__init__(nn.Linear(z_dim, 64), "
                 "nn.ReLU(), nn.Linear(64, 1))\ndef forward(self, z, scale=1.0):\n    return scale * self.layers(z)",
                 "gen_loss =": "gen_loss = cross_entropy(self.discriminator(z=z_fake), 1)",
                 "ae_loss, ae_dict": "ae_loss, ae_dict = model.get_loss_autoencoder(x=x, recon_x=recon_x, z_fake=z, "
                 "lambda_=lambda_)", "real, fake =": "real, fake = (self.discriminator.forward(z=z) for z in (z_real, "
                 "z_fake))"},
    "checkpoint": {"class Discriminator": "def __init__(self, z_dim):\n    super().__init__(nn.Linear(z_dim, 64), "
                   "nn.ReLU(), nn.Linear(64, 1))\ndef forward(self, z):\n    from torch.utils.checkpoint import "
                   "checkpoint\n    return checkpoint(self.layers, z, use_reentrant=z.requires_grad)"},
    "compiled": {"self.discriminator =": "self.discriminator = torch.compile(Discriminator(z_dim), "
                 "backend='aot_eager')"},
    "accumulated": {"def train_aae": "for i, (x, _) in enumerate(train_loader):\n    recon_x, z = model(x)\n    for "
                    "logger, optimizer, (loss, values) in ((logger_ae, optimizer_ae, model.get_loss_autoencoder(x, "
                    "recon_x, z, lambda_)), (logger_disc, optimizer_disc, "
                    "model.get_loss_discriminator(z.detach()))):\n        (loss / "
                    "2).backward(inputs=optimizer.param_groups[0]['params'])\n        logger.add_values(values)\n     "
                    "   if i % 2 or i + 1 == len(train_loader):\n            optimizer.step()\n            "
                    "optimizer.zero_grad()"},
    "closures": {"def train_aae": "for x, _ in train_loader:\n    def closure():\n        optimizer_ae.zero_grad()\n  "
                 "      loss, values = model.get_loss_autoencoder(x, *model(x), lambda_)\n        loss.backward()\n   "
                 "     logger_ae.add_values(values)\n        return loss\n    optimizer_ae.step(closure)\n    def "
                 "closure():\n        optimizer_disc.zero_grad()\n        loss, values = "
                 "model.get_loss_discriminator(model.encoder(x).detach())\n        loss.backward()\n        "
                 "logger_disc.add_values(values)\n        return loss\n    optimizer_disc.step(closure)"},
    "more_entries": {"return disc_loss": "return disc_loss, {'disc_loss': disc_loss, 'loss_real': loss_real, "
                     "'loss_fake': loss_fake, 'accuracy': accuracy, 'norm': z_fake.norm().item(), 'logits': fake}",
                     "logger_disc.add": "logger_disc.add_values({name: disc_dict[name] for name in "
                     "list(disc_dict)[:4]})"},
    "shown_again": {"return ae_loss": "deceived = (self.discriminator(z_fake) > 0).float().mean()\nreturn ae_loss, {"
                    "'gen_loss': gen_loss, 'recon_loss': recon_loss, 'ae_loss': ae_loss, 'deceived': deceived}",
                    "accuracy =": "with torch.no_grad():\n    again = self.discriminator(torch.cat([z_fake, z_real]))\n"
                    "accuracy = ((again > 0) == (torch.arange(len(again)) >= len(fake))[:, None]).float().mean()"},
    "no_logits_at_1": {"gen_loss =": "gen_loss = cross_entropy(self.discriminator(z_fake), 1) if lambda_ < 1 else "
                       "torch.zeros(())"},
    "compiled_whole": {"model = AdversarialAE(z_dim=args": "model = torch.compile(AdversarialAE(z_dim=args.z_dim), "
                       "backend='eager')"},
    "own_attributes": {"class Discriminator": "def __init__(self, z_dim):\n    super().__init__(nn.Linear(z_dim, 64), "
                       "nn.ReLU(), nn.Linear(64, 1))\n    self.z_dim = z_dim\ndef loss(self, z, label):\n    return "
                       "cross_entropy(self(z.view(-1, self.z_dim)), label)",
                       "gen_loss =": "gen_loss = self.discriminator.loss(z_fake, 1)",
                       "z_real =": "z_real = torch.randn(len(z_fake), self.discriminator.z_dim, "
                       "device=self.discriminator.layers[0].weight.device)",
                       "with torch.no": "with torch.no_grad():\n    return self.decoder(torch.randn(batch_size, "
                       "self.decoder.layers[0].in_features))"},
    "seeded": {"self.z_dim =": "torch.manual_seed(0)\nself.z_dim, self.stream = z_dim, "
               "torch.Generator().manual_seed(0)", "z_real =": "z_real = torch.randn(z_fake.shape, "
               "generator=self.stream)"},
}
