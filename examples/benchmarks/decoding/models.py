"""Which decoders of Transformers `attach` and `factor_keys` take, with a reason for each refused.

    python examples/benchmarks/decoding/models.py --out docs/benchmarks/decoding-models.jsonl

Every class of AutoModelForCausalLM is built tiny with random weights. Where `attach` takes it, 12
tokens are generated with a cache that chooses but has room for everything, and the tokens must be
the model's own; likewise with keys factored at full rank, whose logits must be the model's own.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    # Run by its path; see the docstring of examples/benchmarks.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import transformers as hf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from examples.benchmarks import cli, machine
from pamm_compile import decoding
from pamm_compile.errors import UnsupportedModelError

LARGEST = 20_000_000
# Whatever of these a configuration has is set; the rest stays as the class has it.
TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "ffn_hidden_size": 96,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "sliding_window": 16,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--only", nargs="+", help="types of models, as configurations name them")
    parser.add_argument("--out", type=Path, help="JSON lines, a record each")
    return parser.parse_args(arguments)


def build(kind: str) -> Any:
    """A model of that type with random weights, as small as its configuration lets it be."""
    default: Any = hf.AutoConfig.for_model(kind)
    text = default.get_text_config(decoder=True)
    tiny = {name: value for name, value in TINY.items() if getattr(text, name, None) is not None}
    if "qk_rope_head_dim" in tiny:
        # Multi-head latent attention has its own widths.
        tiny.pop("head_dim", None)
        tiny["num_key_value_heads"] = 4
    settable = not isinstance(getattr(type(text), "layer_types", None), property)
    if settable and getattr(text, "layer_types", None) is not None:
        # Both kinds, where there are two.
        kinds = list(dict.fromkeys(text.layer_types))
        tiny["layer_types"] = (kinds * 4)[:4]
    config = type(text)(**tiny)
    with torch.device("meta"):
        size = sum(p.numel() for p in hf.AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters even so")
    torch.manual_seed(0)
    model: Any = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.eval()


@torch.no_grad()
def plain(kind: str) -> None:
    """Run a model as Transformers has it: what fails here says nothing of us."""
    build(kind).generate(torch.randint(3, 100, (1, 20)), max_new_tokens=2, pad_token_id=0)


def same(model: Any, cache: Any) -> bool:
    """Whether 12 greedy tokens are those of Transformers' own cache."""
    ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    own = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    chosen = model.generate(ids, attention_mask=torch.ones_like(ids), cache=cache, **settings)
    return torch.equal(own, chosen)


def caches(kind: str) -> str:
    model = decoding.attach(build(kind))
    for cache in (decoding.KeyDiffCache(100), decoding.ClusterCache(100, whole_layers=0)):
        if not same(model, cache):
            return f"WRONG with {type(cache).__name__}"
    same(model, decoding.KeyDiffCache(20))
    return "yes"


@torch.no_grad()
def factored(kind: str) -> str:
    ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(1))
    own = build(kind)(ids, use_cache=False).logits
    for rotary in ("before", "pairs"):
        thin = build(kind)
        width = next((m.head_dim for m in thin.modules() if hasattr(m, "head_dim")), 1)
        thin = decoding.factor_keys(thin, width, rotary=rotary)  # type: ignore[arg-type]
        error = float((thin(ids).logits - own).norm() / own.norm())
        if not error < 1e-3:
            return f"WRONG with {rotary!r}: {error:.1e}"
    return "yes"


def answer(ask: Callable[[str], str], kind: str) -> str:
    try:
        return ask(kind)
    except UnsupportedModelError as refusal:
        return str(refusal)
    except Exception as error:  # noqa: BLE001  a defect of ours, which the table shows
        return f"ERROR {type(error).__name__}: {error}"[:200]


def main() -> None:
    args = parse()
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    facts = machine.facts(threads=1)
    torch.set_num_threads(1)
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if args.only and kind not in args.only:
            continue
        record = {"kind": kind, "class": name}
        try:
            plain(kind)
        except Exception as error:  # noqa: BLE001  what a class needs beyond TINY is its own
            record["unbuilt"] = f"{type(error).__name__}: {error}"[:200]
        else:
            record["caches"] = answer(caches, kind)
            record["factor_keys"] = answer(factored, kind)
        print(json.dumps(record), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps({**record, "facts": facts}) + "\n")


if __name__ == "__main__":
    cli.run(main)
