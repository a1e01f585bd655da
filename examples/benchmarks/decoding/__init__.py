"""Benchmarks of `pamm_compile.decoding`: a model that recalls, and what each method makes of it.

| asked | script |
|---|---|
| a model that recalls facts planted in text, for all the others | recall.py |
| accuracy and loss by method and budget, in tokens or bytes, with kvpress beside | budgets.py |
| the picture of that | picture.py |
| which models are taken, with a reason for each that is refused | models.py |
| loss by rank of factored keys, before and after fine-tuning; thin keys from nothing | ranks.py |
| time and bytes a generated token by context length | times.py |
| the evolution of the policy that ships | evolution.py |
"""
