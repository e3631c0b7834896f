#!/usr/bin/env python3
"""GPT and Llama shapes in PyTorch, the peers of docs/performance.md and docs/gpu-results.md: full training steps
(forward, backward, clipping, fused AdamW) on made-up tokens.

Everything that makes PyTorch fast is on: torch.compile, scaled_dot_product_attention (on a GPU cuDNN's where it can),
fused AdamW. bf16 keeps weights, gradients and moments in bf16 and has no fp32 master weights, which `mixed_precision:
bf16` has: that flatters PyTorch. Recomputation is by whole layers, as `recompute.granularity: full` is. `peaks` in place
of a model times a large matrix product and a large copy: what the device can do at best.
"""
import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

# The sizes of configs/*.yaml. llama: RMSNorm, rotary embedding, SwiGLU, no biases, an output layer of its own.
MODELS = {
    "gpt2_124m": dict(layers=12, width=768, heads=12, groups=12, ffn=3072, vocab=50304, length=1024, llama=False),
    "gpt_1.3b": dict(layers=24, width=2048, heads=16, groups=16, ffn=8192, vocab=50304, length=2048, llama=False),
    "llama_8b": dict(layers=32, width=4096, heads=32, groups=8, ffn=14336, vocab=128256, length=4096, llama=True),
}


def rotary_tables(length, width, base=500000.0):
    turns = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * turns
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """x [B, H, T, D], halves of D in pairs."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.heads, self.groups, self.size = m.heads, m.groups, m.width // m.heads
        self.qkv = nn.Linear(m.width, (m.heads + 2 * m.groups) * self.size, bias=not m.llama)
        self.out = nn.Linear(m.width, m.width, bias=not m.llama)

    def forward(self, x, tables):
        batch, length, width = x.shape
        y = self.qkv(x).view(batch, length, -1, self.size).transpose(1, 2)
        q, k, v = y.split((self.heads, self.groups, self.groups), dim=1)
        if tables is not None:
            q, k = rotate(q, *tables), rotate(k, *tables)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups < self.heads)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class FeedForward(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.gated = m.llama
        self.fc1 = nn.Linear(m.width, (2 if m.llama else 1) * m.ffn, bias=not m.llama)
        self.fc2 = nn.Linear(m.ffn, m.width, bias=not m.llama)

    def forward(self, x):
        x = self.fc1(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            return self.fc2(F.silu(gate) * up)
        return self.fc2(F.gelu(x, approximate="tanh"))


class Block(nn.Module):
    def __init__(self, m):
        super().__init__()
        norm = nn.RMSNorm if m.llama else nn.LayerNorm
        self.norm1, self.attention = norm(m.width, eps=1e-5), Attention(m)
        self.norm2, self.ffn = norm(m.width, eps=1e-5), FeedForward(m)

    def forward(self, x, tables):
        x = x + self.attention(self.norm1(x), tables)
        return x + self.ffn(self.norm2(x))


class Head(nn.Module):
    """Last norm, logits and loss: together, so that what is compiled never keeps fp32 logits."""

    def __init__(self, m):
        super().__init__()
        self.norm = (nn.RMSNorm if m.llama else nn.LayerNorm)(m.width, eps=1e-5)

    def forward(self, x, weight, targets):
        logits = F.linear(self.norm(x), weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Model(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.recompute = m.recompute
        self.tokens = nn.Embedding(m.vocab, m.width)
        self.positions = None if m.llama else nn.Embedding(m.length, m.width)
        self.blocks = nn.ModuleList(Block(m) for _ in range(m.layers))
        self.head = Head(m)
        self.output = nn.Linear(m.width, m.vocab, bias=False) if m.llama else None
        cos, sin = rotary_tables(m.length, m.width // m.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids, targets):
        x = self.tokens(ids)
        if self.positions is not None:
            x = x + self.positions.weight
        tables = None if self.positions is not None else (self.cos, self.sin)
        for block in self.blocks:
            if self.recompute:
                x = checkpoint(block, x, tables, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, tables)
        return self.head(x, self.tokens.weight if self.output is None else self.output.weight, targets)


def compiled(model, how):
    """model: as one graph, whose compilation takes time with every layer. block: all layers share one."""
    if how == "block":
        for block in model.blocks:
            block.compile()
        model.head.compile()
    return torch.compile(model) if how == "model" else model


def build(m, dtype, device):
    """Weights come into being where and as they stay: fp32 copies of a large model would not fit."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Model(m)
        for p in model.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)
    torch.set_default_dtype(torch.float32)
    return model


class Clock:
    """Seconds between marks: events of the device, which the host need not wait for, or the host's clock."""

    def __init__(self, device):
        self.cuda, self.marks = device == "cuda", []

    def mark(self):
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self):
        pairs = list(zip(self.marks, self.marks[1:]))
        if not self.cuda:
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


def train(m, args, device):
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    model = build(m, dtype, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    step, clock = compiled(model, args.compile), Clock(device)
    ids = torch.randint(0, m.vocab, (args.micro_batch, m.length + 1), device=device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    for i in range(args.warm_up + args.steps):
        if i == args.warm_up:
            clock.mark()
        step(inputs, targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if i >= args.warm_up:
            clock.mark()
    return clock.seconds()


def train_what_fits(m, args, device):
    """Halves the samples of a step until the device holds them; each try begins with an empty device."""
    while True:
        try:
            return train(m, args, device)
        except torch.OutOfMemoryError:
            if args.micro_batch == 1:
                raise
        args.micro_batch //= 2
        torch.cuda.empty_cache()
        torch._dynamo.reset()


def peaks(device, width=8192, gib=4):
    """Random numbers: zeros are multiplied faster."""
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(gib << 30, dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    best = {}
    for name, work, run in (("matmul_tflops", 2e-12 * width**3, lambda: a @ b),
                            ("copy_gb_per_s", 2e-9 * source.numel(), lambda: to.copy_(source))):
        run()
        clock = Clock(device)
        for _ in range(11):
            clock.mark()
            run()
        best[name] = round(work / statistics.median(clock.seconds()), 1)
    return best


def read_arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", choices=(*MODELS, "peaks"))
    p.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    p.add_argument("--micro-batch", type=int, default=1, help="samples of a step")
    p.add_argument("--steps", type=int, default=5, help="steps that are timed")
    p.add_argument("--warm-up", type=int, default=2, help="steps before; the first compiles")
    p.add_argument("--compile", choices=("model", "block", "none"), default="model")
    p.add_argument("--recompute", action="store_true", help="keep only the inputs of layers")
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    p.add_argument("--layers", type=int, help="another number of layers")
    p.add_argument("--length", type=int, help="another number of tokens in a sample")
    p.add_argument("--json", action="store_true", help="one JSON object; else the seconds of each step")
    return p.parse_args()


def main():
    args = read_arguments()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.model == "peaks":
        print(json.dumps(peaks(device)))
        return
    m = argparse.Namespace(**MODELS[args.model], recompute=args.recompute)
    m.layers, m.length = args.layers or m.layers, args.length or m.length
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        seconds = train_what_fits(m, args, device)
    if not args.json:
        print("\n".join("%.4f" % s for s in seconds))
        return
    median = statistics.median(seconds)
    print(json.dumps({
        "micro_batch": args.micro_batch, "step_ms": round(1e3 * median, 3), "tokens_per_s": round(args.micro_batch * m.length / median, 1),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        "reserved_bytes": torch.cuda.max_memory_reserved() if device == "cuda" else 0,
        "torch": torch.__version__, "cuda": torch.version.cuda, "compile": args.compile, "steps": len(seconds)}))


main()
