# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A look at a trained score
#
# A score-based model learns $s(x, t) \approx \nabla_x \log p_t(x)$, the gradient of the log-density of data that have
# been noised until time $t$. Whatever one does with such a model (drawing samples, computing likelihoods, filling in
# what is missing) asks nothing but this one function. This notebook asks it directly, of two small models of 8×8
# digits that are in the folder `pretrained/`:
#
# * **U**, an unconstrained network. Nothing makes its field a gradient.
# * **QC**, the same network, whose last 700 steps of training also penalised the antisymmetric part of the Jacobian
#   $J = \partial s / \partial x$. A field on a convex set is a gradient if and only if $J = J^\top$ there.
#
# Everything below takes about a minute on one core of a laptop. To run it yourself, in the folder of the project:
#
# ```
# .venv/bin/python -m pip install jupyterlab jupytext
# .venv/bin/jupyter lab docs/notebook.ipynb
# ```
#
# It is written as the text file `notebook.py`, of which `.venv/bin/jupytext --to ipynb --execute docs/notebook.py`
# makes this notebook.

# %%
import sys
import time
from pathlib import Path

root = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "run_lib.py").exists())
sys.path.insert(0, str(root))  # the project is run from its folder, not installed

import matplotlib.pyplot as plt
import numpy as np
import torch

from conservativeness import jacobian
from data import load_dataset
from experiment.figures import curve_style
from guidance.conditions import MeasurementProjection
from guidance.measurements import Mask, known_pixels
from run_lib import load
from sampling import FewStepSampler, ODESampler, PCSampler, denoise

models = {name: load(root / "pretrained" / folder) for name, folder in (("U", "digits_u"), ("QC", "digits_qc"))}
for name, score in models.items():
    print(f"{name}: {score.description}, items of shape {score.shape}, {score.images.num_levels} grey levels")

sde, images = models["U"].sde, models["U"].images
levels, labels = load_dataset("digits", image_size=8, num_channels=1)[1].batch(range(60))  # test images
x0 = images.to_model(levels)  # grey levels 0 to 16 become numbers between 0, black, and 1, white


def show(axes, image):
    axes.imshow(np.asarray(image).reshape(8, 8), cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])


# %% [markdown]
# ## Noise
#
# The forward process is the *variance-exploding* one: $x_t = x_0 + \sigma(t)\,\varepsilon$ with $\varepsilon \sim
# N(0, I)$ and $\sigma(t) = \sigma_{\min} (\sigma_{\max}/\sigma_{\min})^t$, from 0.01 to 10. The mean of all images
# that may be behind a noised one is Tweedie's formula, $E[x_0 \mid x_t] = x_t + \sigma^2 s(x_t, t)$: a score is a
# denoiser.

# %%
sigmas = torch.tensor([0.05, 0.2, 0.5, 1.0, 3.0])
noise_times = sde.time_at_noise_ratio(sigmas)
noised = x0[:1] + sigmas[:, None, None, None] * torch.randn(5, *images.shape, generator=torch.manual_seed(0))
mean = denoise(sde, models["U"], noised, noise_times)

figure, axes = plt.subplots(2, 5, figsize=(6, 2.7), layout="constrained")
for column, sigma in enumerate(sigmas.tolist()):
    show(axes[0, column], noised[column])
    show(axes[1, column], mean[column])
    axes[0, column].set_title(f"σ = {sigma:g}", fontsize=9)
axes[0, 0].set_ylabel("$x_t$")
axes[1, 0].set_ylabel("$E[x_0 | x_t]$")
plt.show()

# %% [markdown]
# *A test image under five noise levels (top, cut to the range from black to white), and the mean of the images that
# it may have been, by U (bottom). The more noise, the more digits are possible, until the mean is that of the whole
# data set.*
#
# ## Along a line between two digits
#
# On the line $x(\tau) = (1 - \tau)\,a + \tau\,b$ from a three $a$ to an eight $b$ the chain rule gives
#
# $$\frac{d}{d\tau} \log p_t(x(\tau)) = (b - a) \cdot s(x(\tau), t),$$
#
# so that the integral of this over $\tau$ is $\log p_t(x(\tau)) - \log p_t(a)$: how much more or less likely the
# model holds what is between.

# %%
a, b = x0[8], x0[2]
tau = torch.linspace(0, 1, 81)


@torch.no_grad()
def along(score, start, end, sigma):
    """(end − start)·s at the points of a line, and its integral up to each of them."""
    points = start + tau[:, None, None, None] * (end - start)
    slope = (score(points, sde.time_at_noise_ratio(torch.full_like(tau, sigma))) * (end - start)).flatten(1).sum(1)
    return slope.numpy(), np.append(0, torch.cumulative_trapezoid(slope, tau).numpy())


figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for k, sigma in enumerate((0.05, 0.1, 0.2, 0.5)):
    for ax, values in zip(axes, along(models["QC"], a, b, sigma), strict=True):
        ax.plot(tau.numpy(), values, label=f"σ = {sigma:g}", **curve_style(k, len(tau)))
axes[0].set(xlabel="τ", ylabel="(b − a) · s(x(τ), t)  [nats]")
axes[1].set(xlabel="τ", ylabel="log p(x(τ)) − log p(a)  [nats]")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
plt.show()

figure, axes = plt.subplots(3, 9, figsize=(8, 2.8), layout="constrained")
between = a + torch.linspace(0, 1, 9)[:, None, None, None] * (b - a)
for row, sigma in enumerate((0, 0.2, 0.5)):
    t = sde.time_at_noise_ratio(torch.full((9,), max(sigma, 0.01)))
    for ax, image in zip(axes[row], denoise(sde, models["QC"], between, t) if sigma else between, strict=True):
        show(ax, image)
    axes[row, 0].set_ylabel(f"denoised,\nσ = {sigma:g}" if sigma else "x(τ)", fontsize=8)
for ax, value in zip(axes[0], np.linspace(0, 1, 9), strict=True):
    ax.set_title(f"τ = {value:.3g}", fontsize=8)
plt.show()

# %% [markdown]
# *Above: slope (left) and log-density (right) along the line, by QC. With little noise both ends are likely, and a
# valley separates them, where the picture is two digits at once; as the noise grows the valley fills up. Below:
# points of the line, and the mean image that each may be a noised version of, by QC. The more noise is assumed, the
# nearer each comes to a digit that is likely.*
#
# ## Is it a log-density at all?
#
# The integral above is a difference of log-densities only if it does not depend on the path. Around a closed path,
# here a triangle of three digits, the integral of a gradient is zero:
#
# $$\oint s(x, t) \cdot dx = 0 .$$
#
# By Stokes' theorem what is left over is the antisymmetric part of $J$, integrated over the triangle. The root mean
# square of this integral around ten triangles of test images:


# %%
def around(score, corners, sigma):
    """The integral of s·dx around a triangle."""
    return sum(along(score, corners[i - 1], corners[i], sigma)[1][-1] for i in range(3))


for sigma in (0.05, 0.1, 0.2, 0.5):
    for name, score in models.items():
        integrals = [around(score, corners, sigma) for corners in x0[:30].split(3)]
        print(f"σ = {sigma:<4} {name:>3}: {np.sqrt(np.mean(np.square(integrals))):5.2f} nats")

# %% [markdown]
# That is not small next to the valley above: how much likelier the model holds one digit than another depends on the
# way between them, by some nats. The penalty makes it smaller.
#
# ## Samples by three samplers
#
# The same score drives them all. **Predictor and corrector** walks back along the reverse SDE, with a step of
# Langevin dynamics at every time. The **probability flow** is an ODE with the same marginals: no noise, and it can be
# reversed. **Few steps** is a second-order solver of the SDE on a grid that is finer where there is little noise.

# %%
like = torch.zeros(16, *images.shape)
figure, axes = plt.subplots(3, 16, figsize=(8, 1.9), layout="constrained")
for row, (name, sampler) in enumerate(
    {
        "PC": PCSampler(sde, num_steps=100),
        "ODE": ODESampler(sde, rtol=1e-4, atol=1e-4, noise_removal=True),
        "few": FewStepSampler(sde, num_steps=19),
    }.items()
):
    started = time.perf_counter()
    samples = sampler(models["U"], like, torch.Generator().manual_seed(1))
    print(f"{sampler}: {samples.nfe:.0f} evaluations of the network, {time.perf_counter() - started:.1f} s")
    for ax, sample in zip(axes[row], samples.x, strict=True):
        show(ax, sample)
    axes[row, 0].set_ylabel(name, fontsize=8)
plt.show()

# %% [markdown]
# *Sixteen samples of U by each sampler. How many evaluations of the network they take differs by more than a factor
# of ten, how much they look like digits hardly does.*
#
# ## Likelihood
#
# Along the probability flow $dx/dt = v(x, t)$ the log-density changes by $-\nabla \cdot v$, so that $\log p_0(x(0)) =
# \log p_1(x(1)) + \int_0^1 \nabla \cdot v \, dt$, where $p_1$ is a Gaussian. In bits per pixel of 17 grey levels, a
# code that knows nothing needs $\log_2 17 = 4.09$.

# %%
test = levels[:12]
pixels = torch.stack([image.flatten()[torch.randperm(64)].view(1, 8, 8) for image in test])
groups = {
    "test images": test,
    "upside down": test.flip(2),
    "black ↔ white": 16 - test,
    "pixels shuffled": pixels,
    "uniform noise": torch.randint(0, 17, test.shape, dtype=torch.uint8),
}
figure, ax = plt.subplots(figsize=(6.5, 2.6), layout="constrained")
for row, (name, group) in enumerate(groups.items()):
    bits = models["U"].bits_per_dim(group).numpy()
    style = curve_style(row)
    ax.plot(bits, row + np.linspace(-0.25, 0.25, len(bits)), style["marker"], color=style["color"], markersize=3)
    print(f"{name}: {bits.mean():.2f} ± {bits.std() / len(bits) ** 0.5:.2f} bits/dim")
ax.axvline(np.log2(17), color="black", linestyle=":", linewidth=1)
ax.set(xlabel="bits/dim, by U (dotted: log₂ 17)", yticks=range(5), yticklabels=groups, ylim=(4.6, -0.6))
plt.show()

# %% [markdown]
# *Bits per pixel of twelve images of five kinds, a point each, spread vertically to be seen. Test images cost half of
# what ignorance would. Upside down they cost a little more, since 0, 1 and 8 stay digits and the strokes stay
# strokes. What has no strokes, or has them in black, costs more than ignorance; a density that is high somewhere is
# low elsewhere.*
#
# ## The Jacobian of one image
#
# $J_{ij} = \partial s_i / \partial x_j$ has 64 × 64 entries here: exact, by 64 backward passes. Its antisymmetric
# part $(J - J^\top)/2$ is what no gradient has.

# %%
sigma = 0.2
t = sde.time_at_noise_ratio(torch.tensor([sigma]))
x = x0[8:9] + sigma * torch.randn(1, *images.shape, generator=torch.manual_seed(3))
matrices = {name: jacobian(score, x, t)[1][0].detach() * sigma**2 for name, score in models.items()}
scale = max(float((j - j.T).abs().max()) / 2 for j in matrices.values())

figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
panels = [("σ²J of U", matrices["U"], float(matrices["U"].abs().max()))]
panels += [(f"σ²(J − Jᵀ)/2 of {name}", (j - j.T) / 2, scale) for name, j in matrices.items()]
for ax, (title, values, largest) in zip(axes, panels, strict=True):
    drawn = ax.imshow(values.numpy(), cmap="PuOr", vmin=-largest, vmax=largest, interpolation="nearest")
    ax.set(title=title, xlabel="pixel j", ylabel="pixel i", xticks=range(0, 64, 16), yticks=range(0, 64, 16))
    figure.colorbar(drawn, ax=ax, shrink=0.8, label="no unit")
plt.show()
for name, j in matrices.items():
    print(f"{name}: ‖J − Jᵀ‖ / ‖J + Jᵀ‖ = {float((j - j.T).norm() / (j + j.T).norm()):.3f}")

# %% [markdown]
# *Left: the Jacobian at one noised three, times σ² so that it has no unit; pixels are numbered row by row, hence the
# bands at a distance of 8 from the diagonal. Middle and right: the antisymmetric part, of U and of QC, on one scale,
# which is another than on the left. It is some percent of the whole, and fainter for QC.*
#
# ## NAsym against time
#
# One number for it, between 0 (a gradient) and 1 (purely antisymmetric):
#
# $$\mathrm{NAsym} = E\left[\frac{\|J - J^\top\|_F^2}{4\,\|J\|_F^2}\right] .$$
#
# Where nothing is known of the data the score is $-x/\sigma^2$, which is a gradient; so the asymmetry is in the times
# where the network has something to tell.

# %%
times = torch.linspace(0.1, 1, 10)
figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
for k, (name, score) in enumerate(models.items()):
    values = []
    for t in times.tolist():
        t = torch.full((5,), t)
        mean, std = sde.marginal(x0[:5], t)
        noised = mean + std[:, None, None, None] * torch.randn(mean.shape, generator=torch.manual_seed(4))
        values.append(score.asymmetry(noised, t).nasym.numpy())
    values = np.stack(values)
    error = values.std(1, ddof=1) / 5**0.5
    ax.errorbar(times.numpy(), values.mean(1), error, label=name, capsize=2, **curve_style(k))
ax.set(xlabel="time t", ylabel="NAsym, mean of 5 images ± s.e.", yscale="log")
ax.secondary_xaxis("top", functions=(lambda t: t, lambda t: t)).set(
    xticks=[float(sde.time_at_noise_ratio(torch.tensor([s]))) for s in (0.03, 0.1, 0.3, 1, 3)],
    xticklabels=("0.03", "0.1", "0.3", "1", "3"),
    xlabel="noise σ(t)",
)
figure.legend(loc="outside right upper")
plt.show()

# %% [markdown]
# *NAsym of U and QC against time (below) and noise level (above), at the same five noised test images. It is largest
# where the digit is being decided, σ of about a half; the penalty lowers it most where there is less noise.*
#
# ## Filling in what is missing
#
# Given the upper half $y$ of an image, samples of $p(x_0 \mid y)$ need no further training: after every step of a
# sampler, the known pixels are replaced by those of $y$, noised to the time of the step.

# %%
mask = Mask(known_pixels("bottom", images.shape))  # the bottom is unknown
figure, axes = plt.subplots(4, 8, figsize=(5.4, 2.9), layout="constrained")
for row, truth in enumerate(x0[[0, 2, 8, 13]]):
    y = mask(truth.expand(6, -1, -1, -1))
    projection = MeasurementProjection(sde, mask, y, 0.0)
    filled = PCSampler(sde, num_steps=100)(
        models["U"], like[:6], torch.Generator().manual_seed(row), projection=projection
    )
    for ax, image in zip(axes[row], (mask.adjoint(y)[0], *filled.x, truth), strict=True):
        show(ax, image)
for ax, title in zip(axes[0], ("given", *["sample"] * 6, "truth"), strict=True):
    ax.set_title(title, fontsize=8)
plt.show()

# %% [markdown]
# *From left to right: what is given, six samples of the rest by U, the truth. Where the upper half leaves it open the
# samples are of several digits.*
#
# ## Where to go on
#
# `score = load("runs/…")` gives the same for every run of yours, and for [models of others](published_models.md).
# [Training](training.md) makes one, [evaluation](evaluation.md) measures it as above with errors and FID,
# [sampling](sampling.md) has all samplers, and [extending](extending.md) says how to bring a network, a schedule or a
# sampler of your own.
