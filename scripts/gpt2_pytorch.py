#!/usr/bin/env python3
"""GPT-2 124M in PyTorch, the peer of docs/performance.md: full training steps on made-up tokens.

gpt2_pytorch.py fp32|bf16 [STEPS]   prints the seconds of each step (forward, backward, clipping, fused AdamW).
bf16 keeps weights and activations in bf16, as `mixed_precision: bf16` does, with fp32 master weights left out
(that flatters PyTorch). torch.compile is on.
"""
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

B, T, C, H, L, V, P = 2, 1024, 768, 12, 12, 50304, 1024


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc1, self.fc2 = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        q, k, v = (y.view(B, T, H, C // H).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class GPT2(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, C), nn.Embedding(P, C)
        self.blocks = nn.ModuleList(Block() for _ in range(L))
        self.norm = nn.LayerNorm(C)

    def forward(self, ids, targets):
        x = self.tokens(ids) + self.positions(torch.arange(T))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.view(-1, V), targets.view(-1))


def main():
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    torch.manual_seed(0)
    model = GPT2()
    if sys.argv[1] == "bf16":
        model = model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1, fused=True)
    step = torch.compile(model)
    ids = torch.randint(0, 50257, (B, T + 1))
    for i in range(steps + 1):  # the first one compiles
        begin = time.perf_counter()
        loss = step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if i:
            print("%.3f" % (time.perf_counter() - begin), flush=True)


main()
