"""Benchmarks: what a user runs to measure memory, time and kernels on a machine.

    python examples/benchmarks/steps.py            from anywhere, also from a checkout not installed
    python -m examples.benchmarks.steps            the same, from the checkout

A script that is run by its path finds its own folder at the head of sys.path, where names such as
`kernels` would hide installed packages. Each therefore begins by putting the checkout there, which
is where `python -m` looks: then `examples.benchmarks` and `pamm_compile` are found, and nothing
else is. Processes that a script starts are given the same path.

| asked | script |
|---|---|
| memory, time and loss of whole training steps | steps.py |
| saved bytes of models of full size, without running them | partitions.py |
| the time of compiling | compile_time.py |
| kernels on a GPU, on a CPU | kernels.py, cpu_kernels.py |
| a model of the times on GPUs that are not at hand | device_model.py |
| all that is worth measuring in half an hour on a GPU | gpu_session.py |

| a training from random weights, exact and compressed in turn | pretrain.py |

What they share is each in one module: models (and their sizes), corpus, machine, timing, tables,
training, processes, cli. Studies that led to a decision are in `examples/studies/`.
"""
