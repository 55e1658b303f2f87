"""The feature-matching losses in plain torch: the definition that every kernel must equal, and the path of a CPU.

Each function takes one entry per pyramid level and returns one float32 scalar (float64 for float64 maps), the sum over
levels. Student and teacher maps are (N, C, H, W) of any float dtype; all arithmetic but an adapter's is float32 or
wider. Each value is a mean that neither batch nor image size changes, and is exactly 0 where student equals teacher. So
is its gradient, but for CWD's, which plain torch rounds to about 1e-9; the kernels give 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PKD_EPS = 1e-6
"""Added to each channel's variance, so that a constant channel has a finite gradient."""
WEIGHT_EPS = 1e-9
"""Added to the sum of a level's weights, so that all-zero weights give 0."""


def weighted_mse(students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Sequence[Tensor] = ()) -> Tensor:
    """Mean squared difference; with `weights` (N, H, W) float32 a level is

    sum w (s - t)^2 / (C * sum w + 1e-9).
    """
    if not weights:
        return _total(F.mse_loss(_wide(s), _wide(t)) for s, t in zip(students, teachers, strict=True))
    levels = zip(students, teachers, weights, strict=True)
    return _total(_weighted_mean((_wide(s) - _wide(t)).square().sum(1), w, s.shape[1]) for s, t, w in levels)


def adapter_mse(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    matrices: Sequence[Tensor],
    biases: Sequence[Tensor],
    weights: Sequence[Tensor] = (),
) -> Tensor:
    """`weighted_mse` of `W s + b` against the teacher: W (C_teacher, C_student) is a 1x1 convolution, b its bias.

    W and b are used in the dtype of the maps, as under autocast; what they give is compared unrounded where a kernel
    computes it, and rounded to that dtype here.
    """
    pairs = zip(students, matrices, biases, strict=True)
    adapted = [F.conv2d(s, w.to(s.dtype)[:, :, None, None], b.to(s.dtype)) for s, w, b in pairs]
    return weighted_mse(adapted, teachers, weights)


def cwd(students: Sequence[Tensor], teachers: Sequence[Tensor], tau: float = 1.0) -> Tensor:
    """Channel-wise distillation: tau^2 / (N C) * sum over rows KL(softmax(t / tau) || softmax(s / tau)).

    A row is the H*W values of one image's channel. Source: Shu et al., ICCV 2021.
    """
    return _total(_cwd_level(_wide(s), _wide(t), tau) for s, t in zip(students, teachers, strict=True))


def pkd(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """1 - Pearson's r of each channel over (N, H, W), averaged over channels.

    Computed as half the mean squared difference of the standardised channels, (x - mean) / sqrt(var + 1e-6) with the
    biased variance: equal to 1 - r but for that epsilon, and exactly 0 for equal maps, constant channels included.
    Source: Cao et al., NeurIPS 2022.
    """
    pairs = zip(students, teachers, strict=True)
    return _total(0.5 * F.mse_loss(_standardised(_wide(s)), _standardised(_wide(t))) for s, t in pairs)


def fgd(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    masks: Sequence[Tensor],
    gamma: float = 1.0,
    temperature: float = 0.5,
) -> Tensor:
    """Focal distillation without the global term. With u = mean_c |x|, v = mean_hw |x| of one image,

        S = HW softmax_hw(u / T),  Q = C softmax_c(v / T)
        level = 1/N sum_n ( sum mask S_t mean_c Q_t (s - t)^2 + gamma (mean_hw |S_s - S_t| + mean_c |Q_s - Q_t|) )

    `masks` (N, H, W) float32 weigh the pixels, as `compress.losses.distill.FGD` says; they get no gradient, nor does
    the teacher's attention. The authors sum where this takes means over channels and, in the last two terms, pixels: so
    that no weight depends on the width or the image size. Source: Yang et al., CVPR 2022.
    """
    levels = zip(students, teachers, masks, strict=True)
    return _total(_fgd_level(_wide(s), _wide(t), mask, gamma, temperature) for s, t, mask in levels)


def _total(levels: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(levels)).sum()


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _weighted_mean(squared: Tensor, weights: Tensor, channels: int) -> Tensor:
    """Of (N, H, W) sums over channels."""
    return (weights * squared).sum() / (channels * weights.sum() + WEIGHT_EPS)


def _cwd_level(s: Tensor, t: Tensor, tau: float) -> Tensor:
    log_p, log_q = (F.log_softmax(x.flatten(2) / tau, dim=2) for x in (t, s))
    return tau**2 * (log_p.exp() * (log_p - log_q)).sum(2).mean()


def _standardised(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
    return (x - mean) * (variance + PKD_EPS).rsqrt()


def _attention(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Of (N, C, H, W): spatial attention (N, 1, H, W) of mean 1, channel attention (N, C, 1, 1) of mean 1."""
    n, c, h, w = x.shape
    spatial, channel = x.abs().mean(1).flatten(1), x.abs().mean((2, 3))
    return (
        (h * w * F.softmax(spatial / temperature, 1)).view(n, 1, h, w),
        (c * F.softmax(channel / temperature, 1)).view(n, c, 1, 1),
    )


def _fgd_level(s: Tensor, t: Tensor, mask: Tensor, gamma: float, temperature: float) -> Tensor:
    (spatial_s, channel_s), (spatial_t, channel_t) = (_attention(x, temperature) for x in (s, t))
    difference = (mask * (spatial_t * channel_t * (s - t).square()).mean(1)).sum() / len(s)
    attention = (spatial_s - spatial_t).abs().mean() + (channel_s - channel_t).abs().mean()
    return difference + gamma * attention
