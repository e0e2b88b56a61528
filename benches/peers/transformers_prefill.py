"""Times the prefill of SmolLM2-135M in Hugging Face transformers on the CPU.

The peer of `prism compare`: f32, the same GGUF file (transformers dequantises it), the same 8192
tokens, two threads, logits of the last position only.

    pip install torch transformers gguf accelerate
    python transformers_prefill.py MODEL.gguf TEXT.txt [TOKENS] [THREADS]

Prints one JSON object; `seconds` is the fastest of three runs.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    model_path, text_path = Path(sys.argv[1]), Path(sys.argv[2])
    tokens = int(sys.argv[3]) if len(sys.argv) > 3 else 8192
    threads = int(sys.argv[4]) if len(sys.argv) > 4 else 2
    torch.set_num_threads(threads)

    folder, name = str(model_path.parent), model_path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    text = text_path.read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :tokens]

    times = []
    with torch.inference_mode():
        model(ids[:, :256], logits_to_keep=1)
        for _ in range(3):
            start = time.perf_counter()
            logits = model(ids, logits_to_keep=1).logits
            times.append(time.perf_counter() - start)
    top = torch.topk(logits[0, -1], 3).indices.tolist()
    print(json.dumps({
        "tokens": ids.shape[1],
        "threads": threads,
        "seconds": min(times),
        "all_seconds": times,
        "top3": top,
        "torch": torch.__version__,
    }))


if __name__ == "__main__":
    main()
