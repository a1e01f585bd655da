"""Train a small byte-level language model with Lightning's Trainer and PAMM.

    python examples/lightning_trainer.py
    python examples/lightning_trainer.py --model gpt2 --ratio 64 --accumulate 4

Lightning compiles first: the model inside the LightningModule is compiled in `configure_model`,
before any strategy wraps it. Compiling the LightningModule as a whole fails on `self.log` in
torch 2.13, with every backend. The text is the Python standard library's own sources, and nothing
is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import common
import corpus
import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import pamm_compile


class LanguageModel(lightning.LightningModule):
    """One of Transformers' classes, compiled in place: checkpoints keep their names."""

    def __init__(self, args: argparse.Namespace, backend: pamm_compile.Backend) -> None:
        super().__init__()
        self.args = args
        self.backend = backend
        self.model = common.build(args)

    def configure_model(self) -> None:
        self.model.compile(backend=self.backend, mode=self.args.mode)

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], number: int) -> None:
        self.log("validation_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.args.lr, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.args.steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratio", type=float, default=256.0, help="default: 256")
    parser.add_argument("--steps", type=common.positive, default=100, help="default: 100")
    parser.add_argument("--accumulate", type=common.positive, default=1, help="batches a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="default: 2e-3")
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"), help="checkpoints")
    common.add_model_options(parser)
    common.add_backend_options(parser)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    device = common.prepare(args)
    common.announce(args)
    text = corpus.Text()
    windows = args.steps * args.accumulate * args.batch
    train = corpus.Windows(text.train, args.model, windows, args.sequence)
    validation = corpus.Windows(text.validation, args.model, 8 * args.batch, args.sequence)
    model = LanguageModel(args, common.make_backend(args, args.ratio))
    trainer = lightning.Trainer(
        default_root_dir=args.out,
        accelerator=device.type,
        devices=1,
        precision="bf16-mixed" if args.dtype == "bfloat16" else "32-true",
        max_steps=args.steps,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        logger=False,
    )
    trainer.fit(
        model,
        DataLoader(train, batch_size=args.batch),
        DataLoader(validation, batch_size=args.batch),
    )
    loss = trainer.callback_metrics["validation_loss"].item()
    print(f"\n{model.backend.report}\n\nvalidation loss {loss:.4f} nats a byte")


if __name__ == "__main__":
    common.run(main)
