"""Attention that needs less memory when a trained model generates: factored keys and caches."""

from pamm_compile.decoding.attach import attach
from pamm_compile.decoding.attention import cache_bytes
from pamm_compile.decoding.clusters import ClusterCache
from pamm_compile.decoding.eviction import (
    HeavyHitterCache,
    KeyDiffCache,
    NormCache,
    WindowCache,
)
from pamm_compile.decoding.factor import (
    factor_keys,
    load_thin,
    thin_keys,
    train_queries_and_keys,
)
from pamm_compile.decoding.pages import PageCache
from pamm_compile.decoding.policy import EvictionCache, EvictionPolicy

__all__ = [
    "ClusterCache",
    "EvictionCache",
    "EvictionPolicy",
    "HeavyHitterCache",
    "KeyDiffCache",
    "NormCache",
    "PageCache",
    "WindowCache",
    "attach",
    "cache_bytes",
    "factor_keys",
    "load_thin",
    "thin_keys",
    "train_queries_and_keys",
]
