"""What an operator or a kernel does, told by its name: one classification, from which every lab makes its rows.

Names are PyTorch's (``aten::mm``), its compiler's (``triton_poi_fused_add_0``), or those of libraries: cuBLAS, cuDNN,
CUTLASS, NCCL, FlashAttention, FlashInfer, vLLM, SGLang, DeepEP, and ROCm's Tensile, Composable Kernel and AITER.
"""

from __future__ import annotations

import re

PRODUCTS, BATCHED, CONVOLUTION, RECURRENT = "matrix products", "batched products", "convolution", "recurrent"
ATTENTION, NORMS, SOFTMAX, EMBEDDING = "attention", "norms", "softmax and losses", "embedding"
SEARCHING, REDUCTION, ELEMENTWISE, COPIES = "searching and sorting", "reduction", "elementwise", "copies and casts"
OPTIMIZER, COMMUNICATION, ASKING = "optimizer", "communication", "asking for numbers"
AUTOGRAD, OTHER = "autograd", "other"
MULTIPLIES = (PRODUCTS, BATCHED, CONVOLUTION, RECURRENT)  # beside attention: nearly all FLOPs of a model
UNTOLD = (AUTOGRAD, OTHER)  # by their names nobody can tell what such operators compute

# Operators, annotations and kernels that move data between ranks
COMMUNICATES = re.compile(
    r"\bnccl|\brccl|\bgloo:|\bucc:|\bmpi:|\bc10d::|record_param_comms|nvshmem|multimem"
    r"|(?:::ep|\bdeep_ep|\buccl)::(?!layout|(?:\w+::)*get_dispatch_layout)"  # a layout is computed, nothing travels
    r"|moeA2A(?:Dispatch|Combine)"
    r"|cross_device_reduce|(?:one|two)_shot_all_reduce",
    re.IGNORECASE,
)
# Libraries say in a kernel's name that it uses matrix units: NVIDIA's instruction shapes and families, AMD's MFMA and
# WMMA; or that it does not; and products of numbers of 8 or 4 bits are computed by nothing else
_TENSOR_CORES = re.compile(
    r"[hs](?:884|1688|16816)|i8816|16816|hmma|wgmma|gmma|xmma|_tensorop|nvjet|flash::?.*(?:fwd|bwd)|flash_(?:fwd|bwd)"
    r"|cudnn_generated_fort_native_sdpa|mfma|_MI\d+x\d+|wmma|xdl|igemm_\w*gtc|fmha(?!_cutlass)"
    r"|fmha_cutlass[fb]_b?f16\w*_sm(?!5)|_matmul_ogs\w*f16",
    re.IGNORECASE,
)
_NO_TENSOR_CORES = re.compile(r"(?<![a-z\d])[sc]gemm|gemv|simt|scudnn|splitkreduce", re.IGNORECASE)
_FEW_BITS = re.compile(r"(?<![a-z])(?:fp8|b?f8(?![a-z\d])|mxfp\d|nvfp4)|e4m3|e5m2|e2m1", re.IGNORECASE)


# The first pattern that a name shows decides, in both tables. "fbgemm" is a library of embeddings, "normal" is no norm.
_NORM = r"norm(?!al(?!i))"
# A kernel of torch's compiler, as its device runs it and its host calls it, bears the names of all that it fuses; of
# those that Triton compiles only templates ("tem") compute products and attention, of those in C++ no name tells
_FUSED = r"(^|_)(triton_[a-z]+|cpp)_fused_.*"
_OF_BOTH = (
    (COMMUNICATION, COMMUNICATES.pattern),
    (ATTENTION, r"(^|_)triton_tem_.*attention"),
    (PRODUCTS, r"(^|_)triton_tem_"),
    (SOFTMAX, rf"{_FUSED}(softmax|nll_loss|cross_entropy)"),
    (NORMS, rf"{_FUSED}{_NORM}|(^|_)triton_(red|per|mix)_.*(var_mean|rsqrt)"),
    (OTHER, r"(^|_)triton_unk_|(^|_)cpp_fused_.*(mm|linear|attention|conv(?!ert|ex))"),
    (REDUCTION, r"(^|_)triton_(red|per|spl)_"),
    (ELEMENTWISE, r"(^|_)(triton_(poi|mix|for)|cpp_fused)_"),
)
_OPERATORS = (
    (AUTOGRAD, r"^autograd::|(?-i:Backward\d*$)|^torch::autograd"),
    *_OF_BOTH,
    (ASKING, r"^aten::(item|_local_scalar_dense|is_nonzero)$"),
    (ATTENTION, r"scaled_dot_product|::\w*attention|flash_?(attn|mla)|::f?mha|_mha_|batch_prefill"),
    (OPTIMIZER, r"::_fused_(adam|sgd|adagrad)|multi_tensor_(adam|sgd|lamb)"),
    (CONVOLUTION, r"conv(?!ert|ex)"),
    (RECURRENT, r"lstm|gru|rnn"),
    (BATCHED, r"(^|::|_)(bmm|baddbmm|addbmm)(_|$)"),
    (PRODUCTS, r"(^|::|_)(mm|addmm|matmul|linear|bilinear|dot|mv|addmv|tensordot)(_|$)|einsum"
               r"|(?<!fb)gemm|gemv|moe_forward|fused_(experts|moe)"),
    (NORMS, _NORM),
    (SOFTMAX, r"softmax|logsumexp|nll_loss|cross_entropy"),
    (EMBEDDING, r"(?<!rotary_)embedding"),
    (SEARCHING, r"arg(max|min|sort)|topk|multinomial|::sort|isin|cumsum|searchsorted|::eq|::(max|min)\b"),
    (COPIES, r"::_?cat\b|copy|index_select|index_put|clone|contiguous|repeat|::(to|stack|_pin_memory)$|quantize"),
    (REDUCTION, r"::(sum|mean|var|std|prod|amax|amin|all|any|var_mean)$"),
    (ELEMENTWISE, r"::(_foreach_)?(add|sub|rsub|mul|div|pow|sqrt|rsqrt|exp|log|neg|abs|square|reciprocal|addcmul"
                  r"|addcdiv|lerp|clamp|clamp_min|maximum|minimum|where|masked_fill|fill|zero|sin|cos|tanh|sigmoid|relu|gelu"
                  r"|silu|elu|dropout|native_dropout|bernoulli|threshold|ge|gt|le|lt|ne|logical_and|logical_or|logical_not)"
                  r"(_backward)?_?$|(silu|gelu)_and_mul|rotary"),
)  # fmt: skip
_KERNELS = (
    *_OF_BOTH,
    (ATTENTION, r"flash_?(fwd|bwd|attn|mla|::)|fmha|attention|sdpa|batch(prefill|decode)with"
                r"|_fwd_grouped_kernel_stage"),
    (OPTIMIZER, r"fused_?(adam|sgd|adagrad)|multi_tensor_(adam|sgd|lamb)|(adam|lamb)functor"),
    (RECURRENT, r"lstm|(?<![a-z])gru_|(gru|rnn)cell|(?<![a-z])rnn_"),
    (CONVOLUTION, r"implicit_gemm|convolve|fprop|dgrad|wgrad|winograd|cudnn_\d|im2col|(?<![a-z])conv(_|\d|olution)"
                  r"|causal_conv"),
    (SEARCHING, r"moe_align|expert_tokens|topk|radix|bitonic|sort|arg_?(max|min)|multinomial"
                r"|scan_?(kernel|config|init|innermost|outer)"),
    (COPIES, r"prepare_grouped|per_token_(group_)?quant|scaled_fp8_quant|^mem(cpy|set)\b"),
    (PRODUCTS, r"(?<!fb)gemm|gemv|cutlass|nvjet|matmul|xmma|cijk_|splitk|fused_moe|marlin|machete|(grouped|scaled)_mm"
               r"|wvsplitk|(?<![a-z])(?:b?mm_kernel|bmm_)|cublas"),
    (NORMS, rf"{_NORM}|(?<![a-z])bn_(fw|bw)|rowwisemoments|gammabeta"),
    (SOFTMAX, r"soft_?max|nll_?loss|nllcriterion|cross_?entropy|logsumexp"),
    (EMBEDDING, r"(?<!rotary_)embedding"),
    (COPIES, r"copy|catarray|transpose|permute|index_put|indexselect|index_(elementwise_)?kernel|gather|scatter"
             r"|nchwtonhwc|nhwctonchw|store_?kv|reshape_and_cache|quant"),
    (REDUCTION, r"reduce|pool"),
    (ELEMENTWISE, r"elementwise|functor|act_and_mul|silu|gelu|dropout|rotary|distribution"),
)  # fmt: skip


def family_of_operator(name: str) -> str:
    """What an operator, or an annotation of the profiler's own, does; ``"other"`` where its name does not tell.

    >>> family_of_operator("aten::_grouped_mm"), family_of_operator("aten::native_layer_norm"), family_of_operator("f")
    ('matrix products', 'norms', 'other')
    """
    return next((family for family, pattern in _OPERATORS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def family_of_kernel(name: str) -> str:
    """What a kernel, or a copy on a device, does; ``"other"`` where its name does not tell.

    >>> family_of_kernel("ampere_sgemm_128x64_tn"), family_of_kernel("void pytorch_flash::flash_fwd_kernel<...>()")
    ('matrix products', 'attention')
    """
    return next((family for family, pattern in _KERNELS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def uses_tensor_cores(name: str) -> bool | None:
    """Whether a kernel uses matrix units; None where its name does not tell.

    >>> [uses_tensor_cores(name) for name in ("sm90_fp8_gemm_1d2d_impl", "ampere_sgemm_128x64_tn", "gemm_kernel")]
    [True, False, None]
    """
    family = family_of_kernel(name)
    if family not in (*MULTIPLIES, ATTENTION, OTHER):
        return False
    if _TENSOR_CORES.search(name):
        return True
    if _NO_TENSOR_CORES.search(name):
        return False
    return True if family in MULTIPLIES and _FEW_BITS.search(name) else None
