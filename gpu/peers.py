"""Times the attention and matrix products of others on this machine's GPU: what our kernels compare with.

    python3 peers.py --out peers.json [--lengths 8192,32768] [--seconds 75]
    python3 peers.py --out peers.json --matmul [--seconds 75]

FlashAttention-3 (package fa3-fwd), and cuDNN's and FlashAttention-2's attention in torch: batch 1, 32
query heads, 8 key and value heads, bf16, random normal inputs, head_dim 128 at every length and 64 at
32768 and 131072. A backend that is missing or refuses a shape is skipped and named on stderr and in the file.
With --matmul, instead: torch.matmul (cuBLAS) of bf16 with the weights [N, K] of a linear layer, in the
shapes of prism-bench's matmul.rs.

Sustained: the median of three windows of back-to-back calls, 0.35 s or longer each, after as long a
warm-up; a long run is slower than a short one, because the card reaches its power limit. Burst: at
most ten calls, about 15 ms, after 0.7 s of idling. Rates count the causal 128 x 128 tiles only.

Writes the schema of prism-bench's report, after every record, so that a run cut short keeps what it has.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

HEADS, KV_HEADS, TILE = 32, 8, 128
# Lengths at which heads of 64 are timed.
NARROW = [32768, 131072]
WINDOW, WINDOWS = 0.35, 3
BURST, BURST_CALLS, IDLE = 0.015, 10, 0.7
# M, N, K, as in prism-bench's matmul.rs.
PRODUCTS = [
    (131072, 6144, 4096),
    (131072, 4096, 4096),
    (131072, 28672, 4096),
    (131072, 4096, 14336),
    (4096, 6144, 4096),
    (4096, 4096, 4096),
    (4096, 28672, 4096),
    (4096, 4096, 14336),
    (8192, 8192, 8192),
]
# Q, K, V as [batch, heads, length, head_dim] to a call without arguments and a note.
Peer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[Callable, str]]


def flash_attention_3() -> Peer:
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError:
        from flash_attn_interface import flash_attn_func

    def prepare(q, k, v):
        # Its layout is [batch, length, heads, head_dim].
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))

        def call():
            output = flash_attn_func(q, k, v, causal=True)
            output = output[0] if isinstance(output, tuple) else output
            return output.transpose(1, 2)

        return call, ""

    return prepare


def torch_backend(backend: SDPBackend) -> Peer:
    def prepare(q, k, v):
        def attend(k, v, grouped):
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

        try:
            attend(k, v, True)
        except RuntimeError:
            # Outside the timing: what is compared is the attention.
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            return lambda: attend(k, v, False), "K and V repeated to every query head beforehand"
        return lambda: attend(k, v, True), ""

    return prepare


PEERS: dict[str, Callable[[], Peer]] = {
    "flash-attention-3": flash_attention_3,
    "cudnn": lambda: torch_backend(SDPBackend.CUDNN_ATTENTION),
    "flash-attention-2": lambda: torch_backend(SDPBackend.FLASH_ATTENTION),
}


def inputs(length: int, head_dim: int) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(length + head_dim)
    shapes = [(1, heads, length, head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    options = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    return [torch.randn(shape, **options) for shape in shapes]


def seconds(call: Callable, times: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def sustained(call: Callable) -> float:
    call()
    estimate = seconds(call, 2)
    times = max(1, round(WINDOW / estimate + 0.5))
    # The clock settles during the first window.
    estimate = seconds(call, times)
    times = max(1, round(1.03 * WINDOW / estimate + 0.5))
    return statistics.median(seconds(call, times) for _ in range(WINDOWS))


def burst(call: Callable, estimate: float) -> float:
    times = min(BURST_CALLS, max(1, round(BURST / estimate)))
    torch.cuda.synchronize()
    time.sleep(IDLE)
    return seconds(call, times)


def check(name: str, peer: Peer) -> dict:
    """Whether a peer computes what it is timed for, against the same in f32."""
    q, k, v = inputs(1024, 128)
    output = peer(q, k, v)[0]().float()
    with sdpa_kernel(SDPBackend.MATH):
        expected = scaled_dot_product_attention(
            q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True
        )
    error = ((output - expected).norm() / expected.norm()).item()
    detail = f"relative error {error:.1e} of at most 1e-2"
    return {"name": f"{name}, dense, 1024 tokens", "passed": error < 1e-2, "detail": detail}


def measure(name: str, peer: Peer, length: int, head_dim: int) -> dict:
    call, note = peer(*inputs(length, head_dim))
    long = sustained(call)
    tiles = -(-length // TILE)
    operations = 4 * head_dim * TILE * TILE * HEADS * tiles * (tiles + 1) // 2
    return {
        "what": "dense",
        "rung": name,
        "dtype": "bf16",
        "batch": 1,
        "q_heads": HEADS,
        "kv_heads": KV_HEADS,
        "q_len": length,
        "kv_len": length,
        "head_dim": head_dim,
        "density": 1.0,
        "ms": long * 1e3,
        "ms_burst": burst(call, long) * 1e3,
        "tflops": operations / long / 1e12,
        "peer": True,
        "note": note,
    }


def product(m: int, n: int, k: int) -> dict:
    """The record of a matrix product, whose M, N and K go by the names of lengths and a head_dim."""
    generator = torch.Generator("cuda").manual_seed(m + n + k)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    x, w = (torch.randn(shape, generator=generator, **options) for shape in ((m, k), (n, k)))
    out = torch.empty((m, n), **options)
    call = lambda: torch.matmul(x, w.t(), out=out)
    long = sustained(call)
    return {
        "what": "matmul",
        "rung": "cublas",
        "dtype": "bf16",
        "batch": 1,
        "q_heads": 1,
        "kv_heads": 1,
        "q_len": m,
        "kv_len": n,
        "head_dim": k,
        "density": 1.0,
        "ms": long * 1e3,
        "ms_burst": burst(call, long) * 1e3,
        "tflops": 2 * m * n * k / long / 1e12,
        "peer": True,
        "note": "",
    }


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = lambda text: [int(number) for number in text.split(",")]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=numbers, default=[8192 << n for n in range(5)])
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS))
    parser.add_argument("--matmul", action="store_true", help="matrix products, no attention")
    parser.add_argument("--seconds", type=float, default=75.0, help="start no timing after this")
    args = parser.parse_args()
    if unknown := set(args.peers) - set(PEERS):
        parser.error(f"there are {', '.join(PEERS)}, and no {', '.join(unknown)}")
    start = time.monotonic()

    run = {
        "gpu": os.environ.get("PRISM_GPU") or torch.cuda.get_device_name(),
        "date": date.today().isoformat(),
        "command": f"peers.py (torch {torch.__version__})",
        "records": [],
        "checks": [],
        "notes": [],
    }

    def skip(what: str, why: str) -> None:
        print(f"skipped: {what}: {why}", file=sys.stderr)
        run["notes"].append(f"skipped: {what}: {why}")

    peers = {}
    for name in [] if args.matmul else args.peers:
        try:
            peer = PEERS[name]()
            run["checks"].append(check(name, peer))
            peers[name] = peer
        except Exception as error:
            skip(name, reason(error))

    shapes = [(length, 128) for length in args.lengths]
    shapes += [(length, 64) for length in NARROW if length in args.lengths]
    timings = [
        (f"{name}, {length} tokens, head_dim {dim}", partial(measure, name, peer, length, dim))
        for length, dim in shapes
        for name, peer in peers.items()
    ]
    if args.matmul:
        timings = [(f"matmul {m}x{n}x{k}", partial(product, m, n, k)) for m, n, k in PRODUCTS]
    for what, timing in timings:
        if time.monotonic() - start > args.seconds:
            skip(what, f"the {args.seconds:.0f} s are over")
            continue
        try:
            record = timing()
        except Exception as error:
            skip(what, reason(error))
            continue
        run["records"].append(record)
        args.out.write_text(json.dumps(run, indent=1, allow_nan=False))
        print(f"{what}: {record['ms']:.3f} ms, {record['tflops']:.0f} TFLOP/s", flush=True)
    args.out.write_text(json.dumps(run, indent=1, allow_nan=False))


if __name__ == "__main__":
    main()
