"""Train a step of every architecture at hand, exactly and with marked gradients, and compare.

    PYTHONPATH=tests python -m pamm_testing.sweep --out docs/benchmarks/architectures.jsonl

A row an architecture, appended as it is done; what the file holds already is not run again. The
summary at the end counts what trained, and everything that is not as promised.

catalogue ── Architecture ── check ── row          each in a process of its own, with a time limit
                               ├─ steps     one step: eager, compiled exactly, compiled by us
                               ├─ reads     which weights products read, without our matching
                               └─ verdict   what the report says against what happened
"""
