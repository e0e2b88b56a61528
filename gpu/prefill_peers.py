"""Times the first token of Hugging Face transformers on this machine's GPU: what `prism bench prefill`
compares with.

    python3 prefill_peers.py --out peers.json [--shape llama-3.1-8b] [--lengths 4096,32768] [--seconds 120]

One prompt of random tokens through a model of random bf16 weights, its cache filled and the logits of its
last token on the host; with FlashAttention-3 (package fa3-fwd) as the model's attention, and with torch's
scaled_dot_product_attention. The median of at most five runs after a first, none begun later than two seconds
after it. Peak memory is what torch's allocator had reserved.

Writes the schema of prism-bench's report, after every record.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, Qwen3Config

ROPE_LLAMA = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
COMMON = {"max_position_embeddings": 131072, "tie_word_embeddings": False, "use_cache": True}
# The sizes that the models' own config.json files state.
SHAPES = {
    "llama-3.1-8b": (
        LlamaConfig,
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_parameters": ROPE_LLAMA | {"factor": 8.0},
        },
    ),
    "llama-3.2-1b": (
        LlamaConfig,
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "tie_word_embeddings": True,
            "rope_parameters": ROPE_LLAMA | {"factor": 32.0},
        },
    ),
    "qwen3-8b": (
        Qwen3Config,
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
}
RUNS, SECONDS = 5, 2.0


def flash_attention_3(module, query, key, value, attention_mask, scaling=None, **_):
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError:
        from flash_attn_interface import flash_attn_func
    # Its layout is [batch, length, heads, head_dim], which is what the model wants back.
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    output = flash_attn_func(query, key, value, softmax_scale=scaling, causal=True)
    return (output[0] if isinstance(output, tuple) else output), None


# What transformers calls them: names that begin with "flash" it would look for on its hub.
ATTENTIONS = {"flash-attention-3": "registered_here", "sdpa": "sdpa"}
AttentionInterface.register("registered_here", flash_attention_3)


def model(shape: str, attention: str):
    kind, sizes = SHAPES[shape]
    config = kind(**(COMMON | sizes), attn_implementation=ATTENTIONS[attention])
    with torch.device("cuda"):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return made.eval().requires_grad_(False)


def first_token(made, ids) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    logits = made(input_ids=ids, use_cache=True, logits_to_keep=1).logits
    logits[0, -1].float().cpu()
    return time.perf_counter() - start


def measure(made, shape: str, attention: str, length: int) -> dict:
    config = made.config
    generator = torch.Generator("cuda").manual_seed(length)
    ids = torch.randint(0, config.vocab_size, (1, length), device="cuda", generator=generator)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    first_token(made, ids)
    start, times = time.perf_counter(), []
    while len(times) < RUNS and (not times or time.perf_counter() - start < SECONDS):
        times.append(first_token(made, ids))
    peak = torch.cuda.max_memory_reserved() / 2**30
    return {
        "what": f"prefill {shape}",
        "rung": f"transformers, {attention}",
        "dtype": "bf16",
        "batch": 1,
        "q_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "q_len": length,
        "kv_len": length,
        "head_dim": getattr(config, "head_dim", None) or 128,
        "density": 1.0,
        "ms": statistics.median(times) * 1e3,
        "peer": True,
        "note": f"peak {peak:.1f} GiB",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = lambda text: [int(number) for number in text.split(",")]
    names = lambda text: text.split(",")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--lengths", type=numbers, default=[4096, 8192, 32768, 65536, 131072])
    parser.add_argument("--attentions", type=names, default=list(ATTENTIONS))
    parser.add_argument("--seconds", type=float, default=120.0, help="start no timing after this")
    args = parser.parse_args()
    if unknown := set(args.attentions) - set(ATTENTIONS):
        parser.error(f"there are {', '.join(ATTENTIONS)}, and no {', '.join(unknown)}")
    start = time.monotonic()
    run = {
        "gpu": os.environ.get("PRISM_GPU") or torch.cuda.get_device_name(),
        "date": date.today().isoformat(),
        "command": f"prefill_peers.py (torch {torch.__version__}, transformers {transformers.__version__})",
        "records": [],
        "checks": [],
        "notes": [],
    }

    def skip(what: str, why: str) -> None:
        print(f"skipped: {what}: {why}", file=sys.stderr)
        run["notes"].append(f"skipped: {what}: {why}")

    for attention in args.attentions:
        try:
            made = model(args.shape, attention)
        except Exception as error:
            skip(attention, repr(error)[:300])
            continue
        for length in args.lengths:
            what = f"{args.shape}, transformers, {attention}, {length} tokens"
            if time.monotonic() - start > args.seconds:
                skip(what, f"the {args.seconds:.0f} s are over")
                continue
            try:
                with torch.inference_mode():
                    record = measure(made, args.shape, attention, length)
            except Exception as error:
                skip(what, repr(error)[:300])
                continue
            run["records"].append(record)
            args.out.write_text(json.dumps(run, indent=1, allow_nan=False))
            print(f"{what}: {record['ms']:.1f} ms, {record['note']}", flush=True)
        del made
    args.out.write_text(json.dumps(run, indent=1, allow_nan=False))


if __name__ == "__main__":
    main()
