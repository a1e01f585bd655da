"""Train a small byte-level LLaMA with Transformers' own Trainer and PAMM.

    python examples/hf_trainer.py
    python examples/hf_trainer.py --ratio 64 --accumulate 4
    python examples/hf_trainer.py --steps 200 --resume

accelerate takes no backend that it does not list, so that `torch_compile_backend="pamm"` is an
error; the callback compiles in its place. Everything else is as without PAMM. The text is the
Python standard library's own sources, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from pamm_compile.integrations.transformers import PammCallback


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows of a text at random places, each drawn by its number."""

    def __init__(self, text: Tensor, count: int, length: int) -> None:
        self.text, self.count, self.length = text, count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        places = torch.Generator().manual_seed(number)
        start = int(torch.randint(len(self.text) - self.length, (), generator=places))
        window = self.text[start : start + self.length].long()
        return {"input_ids": window, "labels": window}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratio", type=float, help="of PAMM; default: backend()")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="windows")
    parser.add_argument("--sequence", type=int, default=256, help="bytes a window")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--accumulate", type=int, default=1, help="batches a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--save-every", type=int, default=50, help="steps")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--out", default="runs/hf_trainer", help="folder of the checkpoints")
    return parser.parse_args()


def main() -> None:
    args = parse()
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)
    train, validation = text[: -len(text) // 20], text[-len(text) // 20 :]
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        use_cache=False,
    )
    callback = PammCallback(args.ratio)
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=TrainingArguments(
            output_dir=args.out,
            bf16=args.bf16,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            per_device_eval_batch_size=args.batch,
            gradient_accumulation_steps=args.accumulate,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 10,
            save_steps=args.save_every,
            logging_steps=max(1, args.steps // 10),
            report_to=[],
        ),
        train_dataset=Windows(train, args.steps * args.accumulate * args.batch, args.sequence),
        eval_dataset=Windows(validation, 8 * args.batch, args.sequence),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=args.resume)
    loss = trainer.evaluate()["eval_loss"]
    print(f"\n{callback.backend.report}\n\nvalidation loss {loss:.4f} nats a byte")


if __name__ == "__main__":
    main()
