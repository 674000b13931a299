r"""
Which weights of a vision transformer are scale-invariant?
==========================================================

Libraries that correct weight decay guess it, from names or shapes. Here it is measured: for a
function of degree 0 in some weights Euler's sum :math:`\langle w, \nabla f\rangle` is zero. A dozen
backward passes give it for all tensors, rows and heads of a small transformer on the digits, whose
queries and keys are normalised head by head (qk-norm).
"""

# %%
# A pre-norm transformer: 16 patches of 2 by 2 pixels, two blocks, three heads.

import matplotlib.pyplot as plt
import torch
from torch import nn

from manifold_sde.networks.data import digits
from manifold_sde.training import scale_invariant_groups


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))

    def forward(self, x):
        q, k, v = (
            z.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for z in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, width=24, heads=3):
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.place = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images):
        patches = nn.functional.unfold(images, 2, stride=2).transpose(1, 2)
        return self.head(self.norm(self.blocks(self.embed(patches) + self.place)).mean(1))


torch.manual_seed(0)
model = Transformer()
groups = scale_invariant_groups(model, digits(64).inputs.float().reshape(-1, 1, 8, 8))
print(groups)

# %%
# In every block the rows of ``qkv`` that make the queries and keys are scale-invariant, a head at a
# time; those of the values are not. Everything that is written into the residual stream scales
# together, because the stream is normalised wherever it is read. Gains, the first layer of an MLP
# and the last layer are in no group.
#
# An optimizer decays tensors, not rows: of these groups it can decay the stream. For decay on
# queries and keys alone, make them layers of their own.

for options in groups.optimizer_groups(lr=1e-3, weight_decay=0.1):
    names = [n for n, p in model.named_parameters() if any(p is q for q in options["params"])]
    print(f"decay {options['weight_decay']}: {', '.join(names[:3])} and {len(names) - 3} more")

# %%
# All tensors from the input to the output, with the share of their weights that is in a group.

names = [name for name, _ in model.named_parameters()]
_, axes = plt.subplots(figsize=(7.2, 6.0), layout="constrained")
axes.barh(names, 1.0, color="0.9", label="not scale-invariant")
for heads, color, label in ((True, "#0072B2", "each head"), (False, "#009E73", "together")):
    found = {n: g for g in groups if bool(g.size) is heads for n in g.parameters}
    shares = [g.weights / model.get_parameter(n).numel() if heads else 1 for n, g in found.items()]
    axes.barh(list(found), shares, color=color, label=label)
axes.set(xlabel="share of the tensor's weights", xlim=(0, 1), ylim=(len(names) - 0.4, -0.6))
axes.tick_params(axis="y", labelsize=7)
axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=8)
plt.show()
