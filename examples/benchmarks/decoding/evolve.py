"""Evolution of eviction policies: keep or forget has no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pamm_compile.decoding.attention import check_count
from pamm_compile.decoding.policy import EvictionPolicy
from pamm_compile.errors import InvalidOptionError, MissingPackageError


class Generation(NamedTuple):
    """Calls of `evaluate` so far, and what one generation reached; larger is better.

    `centre` is the fitness of the distribution's mean, where it was evaluated.
    """

    evaluations: int
    best: float
    mean: float
    centre: float | None


class Evolution(NamedTuple):
    """The mean of the last distribution, as the paper's code takes it, and how it came about."""

    policy: EvictionPolicy
    generations: list[Generation]


def evolve(
    evaluate: Callable[[EvictionPolicy], float],
    policy: EvictionPolicy | None = None,
    *,
    generations: int = 50,
    population: int = 16,
    sigma: float = 0.065,
    seed: int = 0,
    centre_every: int = 10,
) -> Evolution:
    """Search for a policy by CMA-ES.

    Equivalent to `cma.CMAEvolutionStrategy(policy.flat(), sigma)` on `-evaluate`.

    Args:
        evaluate: the fitness of a policy, larger is better; called once for every candidate.
        policy: where the search begins; None: all zeros.
        generations: how many, of `population` candidates each, at least 2.
        sigma: standard deviation to begin with.
        seed: of the search; 0 or larger.
        centre_every: evaluate the distribution's mean at every such generation, and at the last.

    Raises:
        MissingPackageError: the package cma is not installed.

    Source: arXiv 2410.13166 §3.3; sigma is that of its published code.
    """
    check_count(1, generations=generations, centre_every=centre_every)
    check_count(2, population=population)
    if not sigma > 0:
        raise InvalidOptionError(f"sigma must be positive, got {sigma!r}")
    try:
        import cma
        import numpy
    except ImportError as error:
        raise MissingPackageError(
            "evolve needs the package cma: pip install pamm-compile[decoding]"
        ) from error
    start = EvictionPolicy() if policy is None else policy
    # cma seeds the global generator of numpy, and takes a seed of 0 for "draw one".
    state = numpy.random.get_state()
    options = {"popsize": population, "seed": seed + 1, "verbose": -9}
    search: Any = cma.CMAEvolutionStrategy(start.flat().double().numpy(), sigma, options)
    candidate = EvictionPolicy()

    def fitness(parameters: Any) -> float:
        candidate.set_flat(torch.as_tensor(parameters, dtype=torch.float32))
        return float(evaluate(candidate))

    reached: list[Generation] = []
    evaluations = 0
    for number in range(1, generations + 1):
        asked = search.ask()
        found = [fitness(parameters) for parameters in asked]
        search.tell(asked, [-f for f in found])
        evaluations += len(found)
        centre = None
        if number % centre_every == 0 or number == generations:
            centre = fitness(search.mean)
            evaluations += 1
        reached.append(Generation(evaluations, max(found), sum(found) / len(found), centre))
    numpy.random.set_state(state)
    final = EvictionPolicy(torch.as_tensor(search.mean, dtype=torch.float32))
    return Evolution(final, reached)
