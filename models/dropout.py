"""Dropout whose random bits cost a fraction of the layer before it.

torch draws one Mersenne Twister number per element on CPU, which took 45 % of a training step of
an MLP with 256-128-64 hidden units; 16 bits of SFC64 per element are enough, and a tenth of it.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 1 << 16  # p is rounded to 1/65536; the scale is that of the rounded p, so the mean is kept


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zeros with probability p, the rest scaled by 1 / (1 - p); x itself in evaluation.

    Its bits are a function of torch's generator, so `torch.manual_seed` repeats them.
    """
    if not training or p == 0:
        return x
    if x.is_cuda:
        return F.dropout(x, p)
    threshold = round(p * LEVELS)
    seed = int(torch.randint(1 << 62, ()))
    bits = np.frombuffer(np.random.Generator(np.random.SFC64(seed)).bytes(2 * x.numel()), np.uint16)
    keep = torch.from_numpy(bits >= threshold).view(x.shape)
    return x * keep.to(x.dtype).mul_(LEVELS / (LEVELS - threshold))
