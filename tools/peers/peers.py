#!/usr/bin/env python3
"""Times an MoE layer's forward and forward + backward pass in PyTorch, at given shapes.

Each peer is a function `layer(x, gates, expert_ids, params) -> y` in PEERS below, or the function
`layer` of a module given with --peer. Every peer is checked against the loop in float64 before it
is timed; one that is wrong, or that fails, is printed as such and gets no row. Prints JSON: a list
of rows. Timed as `bench` times: several runs, then one wait for the device.
"""

import argparse
import functools
import importlib
import json
import sys
import time

import torch
import torch.nn.functional as F

RUNS = 8


def sort_slots(expert_ids, num_experts):
    """Slots in expert order, and the end of each expert's."""
    flat = expert_ids.flatten()
    order = torch.argsort(flat, stable=True)
    ends = torch.cumsum(torch.bincount(flat, minlength=num_experts), 0).to(torch.int32)
    return order, ends


def combine(y, order, gates, tokens):
    """Gate-weighted sum of rows in expert order."""
    k = gates.shape[1]
    rows = y * gates.flatten()[order].unsqueeze(1)
    return torch.zeros(tokens, y.shape[1], dtype=y.dtype, device=y.device).index_add_(
        0, order // k, rows
    )


def grouped_mm(x, gates, expert_ids, params):
    """torch._grouped_mm over tokens in expert order."""
    w1, b1, w2, b2 = params
    order, ends = sort_slots(expert_ids, w1.shape[0])
    expert = expert_ids.flatten()[order]
    rows = x[order // gates.shape[1]]
    # A product with the choices, as b1[expert] has a slow gradient.
    chosen = F.one_hot(expert, w1.shape[0]).to(x.dtype)
    h = F.gelu(torch.addmm(torch._grouped_mm(rows, w1, offs=ends), chosen, b1))
    y = torch.addmm(torch._grouped_mm(h, w2, offs=ends), chosen, b2)
    return combine(y, order, gates, x.shape[0])


@functools.cache
def compiler():
    return torch.compile(grouped_mm, dynamic=False)


def compiled(x, gates, expert_ids, params):
    """grouped_mm through torch.compile; it needs a C compiler."""
    return compiler()(x, gates, expert_ids, params)


def loop(x, gates, expert_ids, params):
    """One expert after the other; waits for the host at each."""
    w1, b1, w2, b2 = params
    y = torch.zeros_like(x)
    for e in range(w1.shape[0]):
        token, choice = torch.where(expert_ids == e)
        h = F.gelu(x[token] @ w1[e] + b1[e])
        y = y.index_add(0, token, (h @ w2[e] + b2[e]) * gates[token, choice].unsqueeze(1))
    return y


def padded(x, gates, expert_ids, params):
    """All experts padded to the busiest one, as batched products."""
    w1, b1, w2, b2 = params
    experts = w1.shape[0]
    order, ends = sort_slots(expert_ids, experts)
    expert = expert_ids.flatten()[order]
    begin = torch.cat([ends.new_zeros(1), ends[:-1]])
    capacity = int((ends - begin).max())
    place = expert * capacity + torch.arange(order.numel(), device=x.device) - begin[expert]
    rows = x.new_zeros(experts * capacity, x.shape[1]).index_copy(
        0, place, x[order // gates.shape[1]]
    )
    h = F.gelu(torch.baddbmm(b1.unsqueeze(1), rows.view(experts, capacity, -1), w1))
    y = torch.baddbmm(b2.unsqueeze(1), h, w2).view(experts * capacity, -1)[place]
    return combine(y, order, gates, x.shape[0])


def ideal(x, gates, expert_ids, params):
    """One dense FFN over as many rows as there are slots: no routing, another function."""
    w1, b1, w2, b2 = params
    k = gates.shape[1]
    rows = x.repeat(k, 1) if k > 1 else x
    y = F.gelu(torch.addmm(b1[0], rows, w1[0]))
    y = torch.addmm(b2[0], y, w2[0])
    return y if k == 1 else y.view(k, *x.shape).sum(0)


PEERS = {
    "grouped_mm": grouped_mm,
    "compiled": compiled,
    "loop": loop,
    "padded": padded,
    "ideal": ideal,
}


def problem(shape, dtype, device, skew):
    tokens, d_model, d_ff, experts, k = shape
    weights = torch.arange(1, experts + 1, device=device).float().pow(-skew)
    expert_ids = torch.multinomial(weights.expand(tokens, experts), k)

    def leaf(*size, std):
        return (torch.randn(*size, device=device) * std).to(dtype).requires_grad_()

    params = [
        leaf(experts, d_model, d_ff, std=d_model**-0.5),
        leaf(experts, d_ff, std=0.1),
        leaf(experts, d_ff, d_model, std=d_ff**-0.5),
        leaf(experts, d_model, std=0.1),
    ]
    x = leaf(tokens, d_model, std=1.0)
    gates = torch.rand(tokens, k, device=device).to(dtype).requires_grad_()
    return x, gates, expert_ids, params


def check(layer, shape, dtype, device):
    """Relative error of the output against the loop in float64, at few tokens."""
    shape = (min(shape[0], 256), *shape[1:])
    x, gates, ids, params = problem(shape, dtype, device, 0.0)
    with torch.no_grad():
        got = layer(x, gates, ids, params).double()
        want = loop(x.double(), gates.double(), ids, [p.double() for p in params])
    return ((got - want).norm() / want.norm()).item()


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work, repetitions, device):
    for _ in range(3):
        work()
    wait(device)
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        for _ in range(RUNS):
            work()
        wait(device)
        times.append((time.perf_counter() - start) / RUNS)
    return sorted(times)


def measure(name, layer, shape, args, device, dtype):
    if name != "ideal":
        error = check(layer, shape, dtype, device)
        allowed = 1e-4 if dtype == torch.float32 else 2e-2
        if not error <= allowed:
            raise ValueError(f"relative error {error:.1e}, allowed is {allowed:.0e}")
    x, gates, ids, params = problem(shape, dtype, device, args.skew)
    upstream = torch.randn_like(x)
    leaves = [x, gates, *params]

    def forward():
        with torch.no_grad():
            layer(x, gates, ids, params)

    def both():
        y = layer(x, gates, ids, params)
        torch.autograd.grad(y, leaves, upstream, allow_unused=True)

    row = {"peer": name, "shape": list(shape), "dtype": args.dtype, "skew": args.skew}
    row["forward_s"] = seconds(forward, args.repetitions, device)
    row["forward_backward_s"] = seconds(both, args.repetitions, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        torch.cuda.synchronize()
        row["extra_bytes"] = torch.cuda.max_memory_allocated() - before
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", action="append", required=True, help="tokens,d_model,d_ff,E,k")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--skew", type=float, default=0.0, help="exponent of Zipf's distribution")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--only", action="append", choices=sorted(PEERS), help="these peers")
    parser.add_argument("--peer", action="append", default=[], help="module with a `layer`")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(7)
    peers = {name: PEERS[name] for name in args.only or PEERS}
    for module in args.peer:
        peers[module] = importlib.import_module(module).layer
    rows = []
    for text in args.shape:
        shape = tuple(int(part) for part in text.split(","))
        for name, layer in peers.items():
            try:
                rows.append(measure(name, layer, shape, args, device, dtype))
            except Exception as error:  # noqa: BLE001: a peer may fail in any way
                print(f"{name} at {text}: {error}", file=sys.stderr)
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
