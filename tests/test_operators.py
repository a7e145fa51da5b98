"""One classification of operators and kernels: names as traces hold them, and no second list anywhere."""

import ast
from pathlib import Path

from made_traces import capture_of, launched, op
from test_surface import PATHS, ROOT

from effkit import operators
from effkit.operators import (
    ASKING,
    ATTENTION,
    AUTOGRAD,
    BATCHED,
    COMMUNICATION,
    CONVOLUTION,
    COPIES,
    ELEMENTWISE,
    EMBEDDING,
    MULTIPLIES,
    NORMS,
    OPTIMIZER,
    OTHER,
    PRODUCTS,
    RECURRENT,
    REDUCTION,
    SEARCHING,
    SOFTMAX,
    family_of_kernel,
    family_of_operator,
    uses_tensor_cores,
)

OPERATORS = {
    PRODUCTS: """aten::mm aten::addmm aten::matmul aten::linear aten::dot aten::mv aten::addmv_ aten::mkldnn_linear
        mkldnn::_linear_pointwise aten::_grouped_mm aten::einsum aten::_scaled_mm aten::_int_mm aten::_addmm_activation
        aiter::gemm_a16w16 sgl_kernel::fp8_scaled_mm vllm::cutlass_scaled_mm vllm::moe_forward vllm::fused_moe""",
    BATCHED: "aten::bmm aten::baddbmm",
    CONVOLUTION: """aten::convolution aten::conv2d aten::conv1d aten::_convolution aten::mkldnn_convolution
        aten::convolution_backward aten::cudnn_convolution""",
    RECURRENT: "aten::lstm aten::mkldnn_rnn_layer aten::gru aten::rnn_tanh aten::_thnn_fused_lstm_cell",
    ATTENTION: """aten::scaled_dot_product_attention aten::_scaled_dot_product_flash_attention_for_cpu
        aten::_scaled_dot_product_flash_attention_for_cpu_backward aten::_flash_attention_forward
        aten::_efficient_attention_backward aten::_scaled_dot_product_cudnn_attention FlashAttnFunc
        flash_attn::_flash_attn_forward vllm::unified_attention aiter::mha_batch_prefill""",
    NORMS: """aten::layer_norm aten::native_layer_norm aten::native_layer_norm_backward aten::_fused_rms_norm
        aten::native_batch_norm aten::group_norm aten::linalg_vector_norm aten::_foreach_norm aiter::add_rmsnorm""",
    SOFTMAX: """aten::softmax aten::_log_softmax aten::_softmax_backward_data aten::logsumexp aten::nll_loss_nd
        aten::nll_loss_forward aten::nll_loss_backward aten::cross_entropy_loss""",
    EMBEDDING: "aten::embedding aten::embedding_dense_backward fbgemm::dense_embedding_codegen_lookup_function",
    SEARCHING: "aten::topk aten::argmax aten::isin aten::multinomial aten::sort aten::cumsum aten::eq aten::max",
    COPIES: """aten::copy_ aten::_to_copy aten::to aten::cat aten::clone aten::index_select aten::contiguous
        fbgemm::FloatToFP8RowwiseQuantized""",
    REDUCTION: "aten::sum aten::mean",
    ELEMENTWISE: """aten::add aten::mul_ aten::gelu aten::dropout aten::dropout_ aten::_foreach_addcdiv_ aten::addcmul
        aten::silu_backward sgl_kernel::silu_and_mul sgl_kernel::rotary_embedding""",
    OPTIMIZER: "aten::_fused_adamw_",
    COMMUNICATION: """gloo:all_reduce nccl:all_reduce nccl:_all_gather_base c10d::allreduce_ record_param_comms
        symm_mem::one_shot_all_reduce""",
    ASKING: "aten::item aten::_local_scalar_dense aten::is_nonzero",
    AUTOGRAD: """AddmmBackward0 MmBackward0 ConvolutionBackward0 NllLossBackward0 torch::autograd::AccumulateGrad
        ScaledDotProductFlashAttentionForCpuBackward0 MyFunctionBackward""",
    OTHER: """aten::randperm aten::items aten::normal_ aten::log_normal_ aten::_convert_indices_from_coo_to_csr
        aten::upsample_bilinear2d CompiledFunction fb::convex_sum""",
}  # fmt: skip
KERNELS = {
    PRODUCTS: """nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT
        sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel
        ampere_sgemm_128x64_tn
        void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_64x64_64x6_tn_align8>(Params)
        void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape>>(Params)
        void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16, float, true>(cublasSplitKParams<float>)
        void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4, false, false>(Params)
        Cijk_Alik_Bljk_BBS_BH_Bias_HA_S_SAV_UserArgs_MT128x256x32_MI16x16x1_SN
        _matmul_ogs_NNT_bf16xbf16xmxfp4_128x256x128x1_swiglu
        fused_moe_kernel
        triton_tem_fused_addmm_relu_3
        _w8a8_block_fp8_matmul
        bmm_E4m3_E2m1E4m3_Fp32_t128x8x512_et64x8_m128x8x64_cga1x1x1_16dp256b
        void deep_gemm::sm90_fp8_gemm_1d2d_impl<0u, 4096u>(__nv_bfloat16*, float*)""",
    ATTENTION: """void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, cutlass::half_t>>()
        flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel
        void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::Mainloop>>>(Params)
        fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)
        cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_64x64x128_4x1x1
        _ZN7ck_tile6kentryILi2ENS_38FmhaBatchPrefillWithPagedKVCacheKernel
        triton_tem_fused_flex_attention_0
        void vllm::paged_attention_v2_kernel<__nv_bfloat16, 128>(float*)""",
    CONVOLUTION: """sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x32_stage4
        void cudnn::winograd_nonfused::winogradForwardData4x4<float, float>(Params)
        void implicit_convolve_sgemm<float, float, 1024, 6, 7, 3, 3, 5, 1, false, true, true>(int)
        cudnn_infer_volta_scudnn_128x64_relu_small_nn_v1""",
    RECURRENT: "void RNN_blockPersist_fp_LSTM<float, 128>(float*)",
    NORMS: """void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>(int)
        void cudnn::bn_bw_1C11_kernel_new<float, float, float2, 512, true, 1>(float)
        triton_red_fused_addmm_native_layer_norm_4
        _ZN5aiter24add_rmsnorm_quant_kernelIDF16bDF16bLi64""",
    SOFTMAX: """void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, c10::BFloat16, float>(float*)
        triton_per_fused__softmax_2""",
    EMBEDDING: "void split_embedding_codegen_forward_unweighted_kernel<float, float>(int)",
    SEARCHING: """void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<long, int>(int*)
        void moe_align_block_size_kernel<int>(int*)
        void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>>>(int)""",
    COPIES: """Memcpy HtoD (Pageable -> Device)
        Memset (Device)
        void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>(int)
        void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, unsigned int, 2, 64, 64>(float*)
        void per_token_group_quant_8bit_kernel<c10::BFloat16>(void*)""",
    REDUCTION: """void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>>>(int)
        triton_red_fused_sum_1""",
    ELEMENTWISE: """void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(int)
        void at::native::(anonymous namespace)::distribution_elementwise_grid_stride_kernel<normal_and_transform>(int)
        triton_poi_fused_addmm_relu_threshold_backward_0
        void vllm::act_and_mul_kernel<c10::BFloat16, silu_kernel>(float*)
        void rotary_embedding_kernel<c10::BFloat16, true>(long const*)""",
    OPTIMIZER: "void multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, FusedAdamMathFunctor<float>>(int)",
    COMMUNICATION: """ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)
        void deep_ep::internode::dispatch<false, 4>(int4*)
        void vllm::cross_device_reduce_1stage<__nv_bfloat16, 8>(float*)""",
    OTHER: """void fbgemm_gpu::bounds_check_indices_kernel<long>(int)
        compute_position_kernel""",
}  # fmt: skip
# Not classifications: what they list, they list for a reason of their own
NO_SECOND_LISTS = {
    "activations/checkpointing.py": "whose outputs to keep, in torch's own operators: a choice",
    "activations/gpu_assumptions.py": "which precision CUDA's autocast computes in: torch's own lists",
    "advice/overviews.py": "classes of modules",
    "panes/matrix_products.py": "where operators that multiply two matrices are given the first",
}


def cases(table, separator):
    return [(family, name.strip()) for family, names in table.items() for name in names.split(separator)]


def test_family_of_an_operator():
    assert not [(name, family) for family, name in cases(OPERATORS, None) if family_of_operator(name) != family]


def test_nodes_of_autograd_are_autograds_whatever_they_call():
    for name in ("AddmmBackward0", "torch::autograd::AccumulateGrad", "NativeLayerNormBackward0"):
        assert family_of_operator(f"autograd::engine::evaluate_function: {name}") == AUTOGRAD


def test_family_of_a_kernel():
    assert not [(name, family) for family, name in cases(KERNELS, "\n") if family_of_kernel(name) != family]


# The same on the device, and on the host, which records the call of such a kernel as an operator
COMPILED = {
    PRODUCTS: """triton_tem_fused_mm_0 triton_tem_fused_addmm_relu_3 triton_tem_fused_12 model_triton_tem_fused_mm_1
        triton_tem_fused_bmm_7 triton_tem_fused_convolution_relu_5""",
    ATTENTION: "triton_tem_fused_flex_attention_0 triton_tem_fused_add_flex_attention_backward_1",
    SOFTMAX: """triton_red_fused__softmax_mean_0 triton_poi_fused__log_softmax_3 cpp_fused__softmax_1
        triton_per_fused__log_softmax_nll_loss_forward_4""",
    NORMS: """triton_per_fused_native_layer_norm_2 triton_poi_fused__native_batch_norm_legit_no_training_relu_1
        triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0 triton_red_fused_addmm_native_layer_norm_4
        graph_0_cpp_fused_native_layer_norm_1 triton_unk_fused_native_group_norm_8""",
    REDUCTION: "triton_red_fused_mean_0 triton_per_fused_addmm_sum_2 triton_spl_fused_cumsum_0",
    ELEMENTWISE: """triton_poi_fused_add_relu_3 triton_poi_fused_addmm_relu_threshold_backward_0 triton_for_fused_0
        cpp_fused_add_mul_0 graph_12_cpp_fused_gelu_3 triton_mix_fused_add_1 triton_poi_fused_rsqrt_1""",
    OTHER: "triton_unk_fused_sum_0 cpp_fused__linear_pointwise_2 triton_ cpp_fused",
}  # fmt: skip


def test_a_compiled_kernel_is_of_what_it_fuses_on_the_device_and_where_the_host_calls_it():
    for family_of in (family_of_kernel, family_of_operator):
        assert not [(name, of) for of, name in cases(COMPILED, None) if family_of(name) != of]


def test_a_compiled_kernel_without_a_name_of_its_own_is_told_by_its_call(tmp_path):
    seen = capture_of(  # torch._inductor.config.triton.unique_kernel_names = False
        tmp_path,
        op("triton_per_fused_native_layer_norm_2", 0, 9),
        launched("triton_", 1, 10, 14, correlation=1),
        op("triton_red_fused_addmm_native_layer_norm_4", 20, 29),
        launched("triton_red_fused_addmm_native_layer_norm_4", 21, 30, 32, correlation=2),
    )
    assert seen.families()[["kernel_ns", "host_self_ns"]].to_dict("index") == {
        NORMS: {"kernel_ns": 6_000, "host_self_ns": 16_000}
    }


# By instruction shapes, by libraries that use nothing else, by formats of 8 and 4 bits that nothing else multiplies
MATRIX_UNITS = {
    True: """sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_execute_segment_k_off_kernel
        void deep_gemm::sm90_fp8_gemm_1d2d_impl<0u, 4096u>(__nv_bfloat16*, float*)
        _w8a8_block_fp8_matmul
        fmhaSm100fKernel_QkvBfloat16OBfloat16H128PagedKvCausalP32VarSeqQ128Kv128PersistentContext
        fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)
        _matmul_ogs_NNT_bf16xbf16xmxfp4_128x256x128x1_swiglu
        igemm_fwd_gtcx2_nhwc_fp16_bx0_ex1_bt256x64x32
        Cijk_Alik_Bljk_BBS_BH_Bias_HA_S_SAV_UserArgs_MT128x256x32_MI16x16x1_SN
        bmm_E4m3_E2m1E4m3_Fp32_t128x8x512_et64x8_m128x8x64_cga1x1x1_16dp256b""",
    False: """ampere_sgemm_128x64_tn
        void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4, false, false>(Params)
        void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16, float, true>(cublasSplitKParams<float>)
        void vllm::scaled_fp8_quant_kernel<float>(float*)
        void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(int)
        triton_poi_fused_addmm_relu_threshold_backward_0
        ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)""",
    None: """void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape>>(Params)
        fused_moe_kernel
        triton_tem_fused_addmm_relu_3
        fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<float>::Params)
        void vllm::paged_attention_v2_kernel<__nv_bfloat16, unsigned char, 128, (vllm::Fp8KVCacheDataType)1>(float*)
        compute_position_kernel""",
}  # fmt: skip


def test_tensor_cores_are_said_where_a_name_says_so_denied_where_it_denies_and_else_left_open():
    assert not [(name, uses) for uses, name in cases(MATRIX_UNITS, "\n") if uses_tensor_cores(name) is not uses]


def words_of(node):
    """What a literal collection lists, or a string lists between bars, as names of operators."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {word.strip("()^$:") for word in node.value.split("|")} if "|" in node.value else set()
    items = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
    strings = {item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str)}
    paths = (ast.unparse(item).split(".") for item in items if isinstance(item, ast.Attribute))
    return strings | {part for path in paths if "aten" in path[0] or "aten" in path for part in path[1:]}


def second_lists(source):
    computes = (*MULTIPLIES, ATTENTION, NORMS, SOFTMAX)
    for node in ast.walk(ast.parse(source)):
        if len({word for word in words_of(node) if word.islower() and family_of_operator(word) in computes}) >= 3:
            yield ast.unparse(node)[:80]


def test_nobody_keeps_a_second_list():
    found = {
        path.relative_to(ROOT).as_posix(): lists
        for path in PATHS
        if (lists := list(second_lists(path.read_text()))) and path != Path(operators.__file__)
    }
    assert {file: lists for file, lists in found.items() if file not in NO_SECOND_LISTS} == {}
    assert set(found) == set(NO_SECOND_LISTS), "an exception that is no more"


def test_the_check_notices_lists():
    assert list(second_lists("X = ('aten::mm', 'aten::bmm', 'aten::softmax')"))
    assert list(second_lists("X = re.compile(r'conv|lstm|layer_norm')"))
    assert list(second_lists("X = {_aten.mm.default, _aten.addmm.default, _aten.convolution.default}"))
    assert not list(second_lists("X = ('aten::mm', 'a row', 'aten::add', 'sum')"))
