"""Tune a small byte-level LLaMA exactly and with approximate weight gradients, and compare.

    python examples/train.py                               a few minutes on two cores
    python examples/train.py --ratio 64 256 512            several ratios of the paper's PAMM
    python examples/train.py --rules "mlp=pamm:32"         other rules in place of the whole model
    python examples/train.py --pretrain 0 --steps 300      from random weights
    python examples/train.py --lora 8                      adapters of every linear layer, by PEFT
    python examples/train.py --device cuda --dtype bfloat16 --hidden 512 --heads 8

A first phase trains exactly on code (the Python standard library's sources); then every arm goes on
from those weights on prose (Python's reference documentation), on the same batches: that is
`pamm_compile.trial`. Runs that start from trained weights hardly drift apart, so that a gap of
thousandths of a nat can be read; from random weights nothing below a tenth can. The model is
Transformers' own class, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import time
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import pamm_compile

WHOLE_MODEL = "linear=subspace"
Batch = dict[str, Tensor]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratio", type=float, nargs="*", default=[256], help="tokens a generator")
    parser.add_argument("--rules", default=WHOLE_MODEL, help=f"of the last arm: {WHOLE_MODEL}")
    parser.add_argument("--pretrain", type=int, default=200, help="exact steps on code first")
    parser.add_argument("--steps", type=int, default=100, help="steps of every arm")
    parser.add_argument("--lora", type=int, metavar="R", help="tune adapters of this rank alone")
    parser.add_argument("--lr", type=float, help="peak; default: 5e-4, or 2e-3 for new weights")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128, help="features, n")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--sequence", type=int, default=256, help="bytes a window")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of table and plot")
    args = parser.parse_args(arguments)
    args.lr = args.lr or (5e-4 if args.pretrain and not args.lora else 2e-3)
    return args


def arms(args: argparse.Namespace) -> dict[str, pamm_compile.Backend]:
    """Return what is compared with exact training: the paper's, and every linear layer."""
    chosen = {f"PAMM {r:g} on Q, K, V": pamm_compile.backend(ratio=r) for r in args.ratio}
    name = "whole model" if args.rules == WHOLE_MODEL else args.rules
    return chosen | {name: pamm_compile.backend(rules=args.rules)}


def code(*, without: str = "") -> tuple[Tensor, Tensor]:
    """Return the standard library's sources as bytes, every 20th file to validate on."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", without}
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    texts = [(root / p).read_bytes() for p in paths if not left_out & set(Path(p).parts)]
    validation = texts[::20]
    del texts[::20]
    return as_bytes(b"".join(texts)), as_bytes(b"".join(validation))


def prose() -> tuple[Tensor, Tensor]:
    """Return Python's reference documentation as bytes, its last 20th to validate on."""
    text = as_bytes("\n".join(topics.topics.values()).encode())
    return text[: -len(text) // 20], text[-len(text) // 20 :]


def as_bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batches(text: Tensor, count: int, seed: int, args: argparse.Namespace) -> list[Batch]:
    """Return windows of a text, with which a model is called by name."""
    generator = torch.Generator().manual_seed(seed)
    span, found = torch.arange(args.sequence), []
    for _ in range(count):
        starts = torch.randint(len(text) - args.sequence, (args.batch, 1), generator=generator)
        ids = text[starts + span].long().to(args.device)
        found.append({"input_ids": ids, "labels": ids})
    return found


def pretrain(model: nn.Module, text: Tensor, args: argparse.Namespace) -> None:
    """Train exactly, with a warm-up and a cosine down to a tenth."""
    compiled, steps = torch.compile(model), args.pretrain
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        done = max(0.0, (step - warmup) / max(1, steps - warmup))
        return min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * done))

    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    kind = torch.device(args.device).type
    for batch in tqdm(batches(text, steps, args.seed, args), "pretraining", dynamic_ncols=True):
        optimizer.zero_grad()
        with torch.autocast(kind, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = compiled(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()


def main() -> None:
    args = parse()
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        intermediate_size=math.ceil(args.hidden * 8 / 3 / 32) * 32,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(args.device).train()
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count:,} parameters, {args.batch * args.sequence:,} tokens a step, {args.dtype}")
    if args.pretrain:
        # What the model is then tuned on it must not have seen.
        pretrain(model, code(without="pydoc_data")[0], args)
    if args.lora:
        # Adapters alone keep X for their A: the weights beside them are frozen.
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(r=args.lora, lora_alpha=2 * args.lora, target_modules="all-linear")
        model = get_peft_model(model, adapters)
    seen, unseen = prose() if args.pretrain else code()
    trial = pamm_compile.trial(
        model,
        batches(seen, args.steps, args.seed, args),
        backend=arms(args),
        steps=args.steps,
        held_out=batches(unseen, 16, 0, args),
        lr=args.lr,
        dtype=args.dtype,
        seed=args.seed,
    )
    for arm in trial.arms:
        if arm.report:
            print(f"\n{arm.name}\n{arm.report}")
    print(f"\n{trial}\n")

    stem = args.out / f"train-seed{args.seed}"
    print(*trial.save(stem), sep="\n")
    record = trial.to_dict()
    record["options"] |= {**vars(args), "out": str(args.out)}
    record["runs"] = [{"validation_loss": arm["loss"], **arm} for arm in record.pop("arms")]
    record["seconds"] = time.perf_counter() - started
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
