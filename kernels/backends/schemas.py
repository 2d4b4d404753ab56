"""Schemas of the ops with a Triton kernel, used when trialign._C, which registers its own, is missing.

A test compares each with the one compiled into trialign._C (csrc/cpu/*.cpp).
"""

from __future__ import annotations

SCHEMAS = {
    "adamw": "(Tensor(a!) master, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, Tensor(d!)? param_out, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, int step, float grad_scale) -> ()",
    "add_rms_norm": "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    "attention": "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int max_seqlen, float scale, "
    "Tensor? alibi_slopes, int? window) -> (Tensor, Tensor)",
    "attention_backward": "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, Tensor cu_seqlens, "
    "int max_seqlen, float scale, Tensor? alibi_slopes, int? window) -> (Tensor, Tensor, Tensor)",
    "gae": "(Tensor rewards, Tensor values, Tensor mask, Tensor cu_seqlens, float gamma, float lam) "
    "-> (Tensor, Tensor)",
    "kl_estimate": "(Tensor logp, Tensor logp_ref, int kind) -> (Tensor, Tensor)",
    "logprob_backward": "(Tensor logits, Tensor labels, Tensor stats, Tensor? grad_logprob, Tensor? grad_entropy, "
    "float scale, int vocab_start) -> Tensor",
    "logprob_backward_": "(Tensor(a!) logits, Tensor labels, Tensor stats, Tensor? grad_logprob, "
    "Tensor? grad_entropy, float scale, int vocab_start) -> ()",
    "logprob_stats": "(Tensor logits, Tensor labels, float scale, int vocab_start) -> Tensor",
    "logprob_update_": "(Tensor(a!) stats, Tensor logits, Tensor labels, float scale, int vocab_start) -> ()",
    "paged_attention": "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor lengths, float scale, "
    "Tensor? alibi_slopes, int? window) -> Tensor",
    "permute": "(Tensor x, Tensor order, int k) -> Tensor",
    "policy_loss": "(Tensor logp, Tensor old_logp, Tensor advantages, float clip_low, float clip_high, "
    "float? dual_clip) -> (Tensor, Tensor, Tensor, Tensor)",
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    "rms_norm_backward": "(Tensor grad, Tensor x, Tensor weight, Tensor rstd, Tensor? grad_total) -> (Tensor, Tensor)",
    "rope_": "(Tensor(a!) x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> ()",
    "route": "(Tensor logits, int k, bool normalize) -> (Tensor, Tensor)",
    "route_backward": "(Tensor grad, Tensor logits, Tensor weights, Tensor experts, bool normalize) -> Tensor",
    "sample": "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor keys, Tensor counters) "
    "-> (Tensor, Tensor)",
    "sort_by_expert": "(Tensor experts, int num_experts) -> (Tensor, Tensor)",
    "swiglu": "(Tensor gate_up) -> Tensor",
    "swiglu_backward": "(Tensor grad, Tensor gate_up) -> Tensor",
    "unpermute": "(Tensor rows, Tensor order, Tensor? weights, int k) -> Tensor",
    "unpermute_backward": "(Tensor grad, Tensor rows, Tensor order, Tensor weights) -> (Tensor, Tensor)",
    "value_loss": "(Tensor values, Tensor old_values, Tensor returns, float? clip) -> (Tensor, Tensor, Tensor)",
    "write_kv": "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()",
}
