"""Measure one training step five ways: eager, torch.compile, with a memory budget, and with PAMM.

    python examples/compare_memory.py
    python examples/compare_memory.py --model gpt2 --hidden 768 --heads 12 --layers 12
    python examples/compare_memory.py --device cuda --dtype bfloat16 --hidden 2048 --heads 16

With an activation memory budget below 1, torch.compile recomputes what is cheap, among it most of
what PAMM would otherwise save: both are shown, alone and together. --model is the name of any
language model of Transformers: llama, qwen3, gpt2, roberta, and so on.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import pamm_compile


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--ratio", type=float, help="of PAMM; default: backend()")
    parser.add_argument("--budget", type=float, default=0.99, help="of activation memory")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each")
    return parser.parse_args()


def build(args: argparse.Namespace) -> nn.Module:
    """Build one of Transformers' models with random weights."""
    sizes = {
        "vocab_size": args.vocabulary,
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "max_position_embeddings": args.sequence + 8,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    config = AutoConfig.for_model(args.model, **sizes)
    if hasattr(config, "intermediate_size"):
        config.intermediate_size = 4 * args.hidden
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = args.heads
    config.use_cache = False
    is_causal = type(config) in AutoModelForCausalLM._model_mapping and args.model != "roberta"
    kind = AutoModelForCausalLM if is_causal else AutoModelForMaskedLM
    return kind.from_config(config).to(args.device).train()


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    model = build(args)
    ids = torch.randint(1, args.vocabulary, (args.batch, args.sequence), device=args.device)
    batch = {"input_ids": ids, "labels": ids}
    is_half = args.dtype == "bfloat16"

    def loss(model: nn.Module) -> Tensor:
        with torch.autocast(args.device, torch.bfloat16, enabled=is_half):
            return model(**batch).loss

    backend = pamm_compile.backend(ratio=args.ratio)
    with torch.autocast(args.device, torch.bfloat16, enabled=is_half):
        print(pamm_compile.explain(model, using=backend, **batch), end="\n\n")
    print(
        pamm_compile.compare_memory(
            model,
            loss,
            backend=backend,
            budget=args.budget,
            steps=args.steps,
            progress=lambda arm: print(f"measuring {arm}", flush=True),
        )
    )


if __name__ == "__main__":
    main()
