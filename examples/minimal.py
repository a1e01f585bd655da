"""The whole of it: a model, torch.compile with our backend, training steps.

python examples/minimal.py        (not installed: python -m examples.minimal, in the checkout)
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pamm_compile

sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes))
backend = pamm_compile.backend(ratio=64)
compiled = torch.compile(model, backend=backend)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
ids = torch.randint(256, (8, 128))
for step in range(5):
    loss = compiled(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
print(backend.report)
