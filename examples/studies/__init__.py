"""Studies that led to a decision, and the tables of docs/ from their records.

| asked | script |
|---|---|
| the loss after training, by method | quality.py |
| losses from random weights: causes, remedies, time to a loss | scratch.py |
| the gradients themselves, by method | fidelity.py |
| variants of Subspace | study_estimators.py |
| the tables in docs/, from records in docs/benchmarks/ | results.py |

Estimators and controls are methods that are compared only, choices is how they are written, and
subspace_variants is what was tried of Subspace. Models, corpus, machine, timing, tables and
training are those of `examples/benchmarks/`, which imports nothing of this folder. Scripts run like
the ones there.
"""
