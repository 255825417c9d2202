"""Which tensors of a checkpoint fill which parameters of the drafter."""

from mimo_jax.checkpoint_plan import Claims, Leaves
from mimo_jax.config import DrafterConfig


def plan_drafter(claims: Claims, config: DrafterConfig) -> Leaves:
    """Claim every tensor of the drafter but its mask vector, which has several homes.

    Args:
        claims: The checkpoint's tensors; what is missing or does not fit is noted there.
        config: Its `config.json`.
    """
    leaves = Leaves()
    hidden, inner, attention = config.hidden_size, config.intermediate, config.attention
    q_rows, o_columns = attention.heads * attention.qk_dim, attention.heads * attention.v_dim
    features = (hidden, len(config.target_layer_ids) * hidden)
    leaves.add(("fc",), (), claims.plain("feature projection", "fc.weight", features))
    leaves.add(("hidden_norm",), (), claims.vector("norms", "hidden_norm.weight", hidden))
    leaves.add(("final_norm",), (), claims.vector("norms", "norm.weight", hidden))
    for i in range(config.num_layers):
        prefix, lead = f"layers.{i}.", (config.num_layers,)
        for path, name, length in (
            (("attention_norm",), "input_layernorm.weight", hidden),
            (("mlp_norm",), "post_attention_layernorm.weight", hidden),
            (("q_norm",), "self_attn.q_norm.weight", attention.qk_dim),
            (("k_norm",), "self_attn.k_norm.weight", attention.qk_dim),
        ):
            leaves.add(path, lead, claims.vector("norms", prefix + name, length))
        for path, part, name, shape in (
            (("attention", "q"), "attention", "self_attn.q_proj", (q_rows, hidden)),
            (("attention", "k"), "attention", "self_attn.k_proj", (attention.kv_heads * attention.qk_dim, hidden)),
            (("attention", "v"), "attention", "self_attn.v_proj", (attention.kv_heads * attention.v_dim, hidden)),
            (("attention", "o"), "attention", "self_attn.o_proj", (hidden, o_columns)),
            (("gate",), "mlp", "mlp.gate_proj", (inner, hidden)),
            (("up",), "mlp", "mlp.up_proj", (inner, hidden)),
            (("down",), "mlp", "mlp.down_proj", (hidden, inner)),
        ):
            rows = {"k": attention.qk_dim, "v": attention.v_dim}.get(path[-1], 0)
            leaves.add(path, lead, claims.plain(part, f"{prefix}{name}.weight", shape), head_rows=rows)
        if attention.sink:
            sink = claims.vector("attention", prefix + "self_attn.attention_sink_bias", attention.heads)
            leaves.add(("attention", "sink"), lead, sink)
    return leaves
