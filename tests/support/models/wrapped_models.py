"""Models with layers that PEFT wraps as wholes: attentions, and modules with parameters."""

import torch
from torch import nn

from support.adapters.cases import Experts


class Block(nn.Module):
    """An attention and layers beside it."""

    def __init__(self, name="attn"):
        super().__init__()
        self.name = name
        self.add_module(name, nn.MultiheadAttention(16, 2, batch_first=True))
        self.fc = nn.Linear(16, 16)

    def forward(self, x):
        return self.fc(getattr(self, self.name)(x, x, x)[0])


class Blocks(nn.Module):
    """Several attentions, one of which has a name that others end with."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.attn = nn.MultiheadAttention(16, 4, kdim=16, vdim=16, batch_first=True)
        self.out_proj = nn.Linear(16, 16)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.out_proj(self.attn(x, x, x)[0])


class Gated(Experts):
    """Parameters of experts, and one that is not."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(14, 12) / 4)

    def forward(self, x):
        return torch.cat([super().forward(x), x @ self.gate.T], dim=-1)


class Several(nn.Module):
    """Several parameters of one module, beside a layer."""

    def __init__(self):
        super().__init__()
        self.experts, self.proj = Gated(), nn.Linear(12, 12)

    def forward(self, x):
        return self.experts(self.proj(x))


class Mixer(nn.Module):
    """Layers of several kinds, and a parameter beside them."""

    def __init__(self):
        super().__init__()
        self.out_proj, self.conv = nn.Linear(12, 12), nn.Conv1d(12, 12, 3, padding=1)
        self.attn = nn.MultiheadAttention(12, 2, batch_first=True)
        self.table = nn.Parameter(torch.randn(12, 12) / 4)

    def forward(self, x):
        x = self.conv((self.out_proj(x) @ self.table).mT).mT
        return self.attn(x, x, x)[0]


class Inside(nn.Module):
    """A module of several layers with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.mixer, self.out_proj = Mixer(), nn.Linear(12, 12)

    def forward(self, x):
        return self.out_proj(self.mixer(x))
