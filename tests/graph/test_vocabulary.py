"""Anchors: which operators count as attention."""

from __future__ import annotations

import torch

from pamm_compile.graph.vocabulary import attention_operators, is_attention_operator


def test_every_fused_attention_of_this_torch_is_an_anchor() -> None:
    names = {
        schema.name
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("aten::") and "attention" in schema.name
    }
    # Composites of the others, and inference-only.
    others = {
        "aten::scaled_dot_product_attention",
        "aten::_scaled_dot_product_attention_math",
        "aten::_scaled_dot_product_attention_math_for_mps",
        "aten::_native_multi_head_attention",
        "aten::_triton_scaled_dot_attention",
        "aten::_triton_multi_head_attention",
        "aten::_transform_bias_rescale_qkv",
    }
    others |= {name for name in names if "backward" in name or name.endswith("_inplace")}
    fused = names - others
    assert "aten::_scaled_dot_product_flash_attention" in fused
    assert "aten::_scaled_dot_product_cudnn_attention" in fused
    assert {name for name in fused if not is_attention_operator(name)} <= {
        "aten::_scaled_dot_product_attention_math"
    }


def test_backward_attention_is_no_anchor() -> None:
    assert not is_attention_operator("aten::_scaled_dot_product_flash_attention_backward")
    assert not is_attention_operator("aten::_flash_attention_backward")
    assert not is_attention_operator("aten::native_layer_norm")


def test_library_operators() -> None:
    assert "flash_attn::_flash_attn_forward" in attention_operators()
    assert "higher_order::flex_attention" in attention_operators()
