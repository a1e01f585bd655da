"""Train a small byte-level language model with Transformers' own Trainer and PAMM.

    python examples/hf_trainer.py
    python examples/hf_trainer.py --model gpt2 --ratio 64 --accumulate 4
    python examples/hf_trainer.py --steps 200 --resume

accelerate takes no backend that it does not list, so that `torch_compile_backend="pamm"` is an
error; the callback compiles in its place. Everything else is as without PAMM. The text is the
Python standard library's own sources, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import common
import corpus
from transformers import Trainer, TrainingArguments

from pamm_compile.integrations.transformers import PammCallback


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratio", type=float, default=256.0, help="default: 256")
    parser.add_argument("--min-generators", type=common.positive, default=1, help="default: 1")
    parser.add_argument("--steps", type=common.positive, default=100, help="default: 100")
    parser.add_argument("--accumulate", type=common.positive, default=1, help="batches a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="default: 2e-3")
    parser.add_argument("--save-every", type=common.positive, default=50, help="default: 50 steps")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/hf_trainer"), help="checkpoints")
    common.add_model_options(parser)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    device = common.prepare(args)
    common.announce(args)
    text = corpus.Text()
    windows = args.steps * args.accumulate * args.batch
    callback = PammCallback(args.ratio, min_generators=args.min_generators)
    arguments = TrainingArguments(
        output_dir=str(args.out),
        use_cpu=device.type == "cpu",
        bf16=args.dtype == "bfloat16",
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 10,
        max_grad_norm=1.0,
        save_steps=args.save_every,
        logging_steps=max(1, args.steps // 10),
        seed=args.seed,
        report_to=[],
    )
    trainer = Trainer(
        model=common.build(args),
        args=arguments,
        train_dataset=corpus.Windows(text.train, args.model, windows, args.sequence),
        eval_dataset=corpus.Windows(text.validation, args.model, 8 * args.batch, args.sequence),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=args.resume)
    loss = trainer.evaluate()["eval_loss"]
    print(f"\n{callback.backend.report}\n\nvalidation loss {loss:.4f} nats a byte")


if __name__ == "__main__":
    common.run(main)
