"""Train a small byte-level LLaMA with Lightning's Trainer and PAMM.

    python examples/lightning_trainer.py
    python examples/lightning_trainer.py --ratio 64 --accumulate 4

Lightning compiles first: the model inside the LightningModule is compiled in `configure_model`,
before any strategy wraps it. Compiling the LightningModule as a whole fails on `self.log` in
torch 2.13, with every backend. The text is the Python standard library's own sources, and nothing
is downloaded.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import pamm_compile


class LanguageModel(lightning.LightningModule):
    """One of Transformers' classes, compiled in place: checkpoints keep their names."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.args = args
        self.backend = pamm_compile.backend(ratio=args.ratio)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=args.hidden,
            intermediate_size=3 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            use_cache=False,
        )
        self.model = LlamaForCausalLM(config)

    def configure_model(self) -> None:
        self.model.compile(backend=self.backend)

    def training_step(self, windows: Tensor, number: int) -> Tensor:
        loss = self.model(input_ids=windows, labels=windows).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, windows: Tensor, number: int) -> None:
        self.log("validation_loss", self.model(input_ids=windows, labels=windows).loss)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.args.lr, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.args.steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


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
    parser.add_argument("--out", default="runs/lightning", help="folder of the checkpoints")
    return parser.parse_args()


def main() -> None:
    args = parse()
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)
    windows = text[: len(text) // args.sequence * args.sequence].view(-1, args.sequence).long()
    train, validation = windows[: -len(windows) // 20], windows[-8 * args.batch :]
    model = LanguageModel(args)
    trainer = lightning.Trainer(
        default_root_dir=args.out,
        devices=1,
        precision="bf16-mixed" if args.bf16 else "32-true",
        max_steps=args.steps,
        limit_train_batches=args.steps * args.accumulate,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        logger=False,
    )
    trainer.fit(
        model,
        DataLoader(train, batch_size=args.batch, shuffle=True),
        DataLoader(validation, batch_size=args.batch),
    )
    loss = trainer.callback_metrics["validation_loss"].item()
    print(f"\n{model.backend.report}\n\nvalidation loss {loss:.4f} nats a byte")


if __name__ == "__main__":
    main()
