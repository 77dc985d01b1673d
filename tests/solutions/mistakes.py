"""The sixteen mistakes, planted in styles of the solution: (number, style, text that occurs once, new text)."""

N = "\n        "  # a new line in a loop or method
AE_LOSS = "ae_loss, ae_dict = model.get_loss_autoencoder(x, recon_x, z, lambda_)"

MISTAKES = (
    (1, "plain", "cross_entropy(self.discriminator(z_fake), 1)", "cross_entropy(self.discriminator(z_fake), 0)"),
    (1, "joint_backward", "F.softplus(-logits)", "F.softplus(logits)"),
    (2, "plain", "Adam([*model.encoder.parameters(), *model.decoder.parameters()]", "Adam(model.parameters()"),
    (2, "batchnorm", " if 'disc' not in name]", "]"),
    (2, "zero_after", "SGD(model.discriminator.parameters()", "SGD(model.parameters()"),
    (3, "plain", f"{N}optimizer_disc.zero_grad()", ""),
    (3, "batchnorm", f"optimizer_ae.step(){N}model.zero_grad()", "optimizer_ae.step()"),
    (4, "plain", "get_loss_discriminator(z.detach())", "get_loss_discriminator(z)"),
    (4, "batchnorm", "z_fake = z_fake.detach()", ""),
    (4, "both_backward_first", "z_fake = z_fake.detach()", ""),
    (4, "joint_backward", "[z_real, z_fake.detach()]", "[z_real, z_fake]"),
    (4, "cleared_not_detached", f"{N}optimizer_ae.zero_grad()", ""),
    (5, "batchnorm", "torch.randn_like(z_fake)", "torch.rand_like(z_fake) * 2 - 1"),
    (5, "discriminator_first", "self.prior.sample((batch_size, self.z_dim))", "torch.rand(batch_size, self.z_dim)"),
    (6, "cleared_not_detached", "cross_entropy(fake, 0)", "cross_entropy(fake, -1)"),
    (6, "main_evaluates", "cross_entropy(fake, 0)", "cross_entropy(fake, -1)"),
    (7, "main_evaluates", "self.discriminator(z_fake), 1", "recon_x.flatten(1).mean(1, keepdim=True), 1"),
    (7, "zero_after", "self.discriminator(z_fake), 1", "recon_x.flatten(1).mean(1), 1"),
    (8, "plain", "nn.Linear(64, 1))", "nn.Linear(64, 1), nn.Sigmoid())"),
    (8, "zero_after", "nn.Linear(128, 1))", "nn.Linear(128, 1), nn.LeakyReLU(0.2))"),
    (8, "discriminator_first", "-F.logsigmoid(logits if label else -logits).mean()",
     "-torch.log(torch.sigmoid(logits if label else -logits) + 1e-15).mean()"),
    (8, "main_evaluates", "nn.BCEWithLogitsLoss()", "nn.BCELoss()"),
    (8, "module_device", "= Discriminator(z_dim)", "= nn.Sequential(Discriminator(z_dim), nn.ELU())"),
    (9, "slow_import", "lambda_ * recon_loss + (1 - lambda_) * gen", "(1 - lambda_) * recon_loss + lambda_ * gen"),
    (9, "both_backward_first", "torch.lerp(gen_loss, recon_loss,", "torch.lerp(recon_loss, gen_loss,"),
    (10, "both_backward_first", "return self.l3(F.silu(self.l2(h)))", "return self.l3(self.l2(h))"),
    (10, "lazy", "nn.LazyLinear(z_dim)", "nn.LazyLinear(9), nn.LazyLinear(z_dim)"),
    (11, "batchnorm", "model.eval()\n    images = model.sample", "images = model.sample"),
    (11, "main_evaluates", f"model.eval(){N}generate_and_save", "generate_and_save"),
    (12, "joint_backward", "(margin > 0).float()", "(margin[:len(z_fake)] > 0).float()"),
    (12, "zero_after", "[real >= 0, fake < 0]", "[real >= 0.5, fake < 0.5]"),
    (13, "cleared_not_detached", "nrow=8, normalize=True, value_range=(-1, 1)", "nrow=8"),
    (13, "batchnorm", "make_grid((images + 1) / 2, nrow=8)", "make_grid(images, nrow=8)"),
    (14, "plain", "logger_ae.add_values(ae_dict)", f"logger_ae.global_step = epoch{N}logger_ae.add_values(ae_dict)"),
    (14, "batchnorm", "logger_ae.add_values(ae_dict)", f"for name, value in ae_dict.items():{N}    "
     'logger_ae.summary_writer.add_scalar(f"generator/{name}", value, epoch)'),
    (15, "module_device", "torch.randn(z_fake.shape, device", "torch.randn(64, self.z_dim, device"),
    (15, "joint_backward", "batch[0].to(model.device)", "batch[0].to(model.device).view(64, 1, 28, 28)"),
    (16, "plain", f"optimizer_ae.zero_grad(){N}ae_loss.backward(){N}optimizer_ae.step(){N}optimizer_disc.zero_grad(){N}"
     "disc_loss.backward()", f"optimizer_ae.zero_grad(){N}optimizer_disc.zero_grad(){N}disc_loss.backward(){N}"
     f"optimizer_disc.step(){N}ae_loss.backward(){N}optimizer_ae.step()"),
    (16, "both_backward_first", "ae_loss.backward(retain_graph=True)",
     f"disc_loss.backward(retain_graph=True){N}optimizer_disc.step(){N}ae_loss.backward(retain_graph=True)"),
    (16, "cleared_not_detached", f"optimizer_disc.step(){N}{AE_LOSS}", f"{AE_LOSS}{N}optimizer_disc.step()"),
)
