"""Makes tiny random models of more architectures, and their golden logits, with transformers.

    pip install torch transformers==4.57.1 gguf numpy
    python tests/golden/make_tiny.py [NAME...]

Writes tiny/NAME.gguf and tiny/NAME.golden.json, in the form that README.md describes, and lora/. The logits are a
fp32 forward pass of transformers on the weights as the file holds them. Which tensor gets which name, and whose
rows are permuted, follows gguf's own name tables and the conventions in README.md.
"""
import hashlib
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers as tf

HERE = Path(__file__).parent
VOCABULARY = 260
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
    bos_token_id=256, eos_token_id=257, pad_token_id=None,
)
EXPERTS = dict(num_experts_per_tok=2)

# Name: (general.architecture, class, config beyond SIZES)
MODELS = {
    "mixtral-F16": ("llama", tf.MixtralForCausalLM, dict(
        num_hidden_layers=2, num_local_experts=4, rope_theta=1e6, rms_norm_eps=1e-5, sliding_window=None, **EXPERTS)),
    "granite-F16": ("granite", tf.GraniteForCausalLM, dict(
        num_hidden_layers=2, embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.4,
        logits_scaling=2.0, rms_norm_eps=1e-5)),
    "granitemoe-F16": ("granitemoe", tf.GraniteMoeForCausalLM, dict(
        num_hidden_layers=2, embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.4,
        logits_scaling=2.0, rms_norm_eps=1e-5, num_local_experts=4, **EXPERTS)),
    "smollm3-F16": ("smollm3", tf.SmolLM3ForCausalLM, dict(
        num_hidden_layers=4, rope_theta=5e5, rms_norm_eps=1e-6, use_sliding_window=False)),
    "stablelm-F16": ("stablelm", tf.StableLmForCausalLM, dict(
        num_hidden_layers=2, partial_rotary_factor=0.25, use_qkv_bias=True, layer_norm_eps=1e-5)),
    "stablelm-parallel-F16": ("stablelm", tf.StableLmForCausalLM, dict(
        num_hidden_layers=2, partial_rotary_factor=0.5, use_parallel_residual=True, qk_layernorm=True,
        layer_norm_eps=1e-5)),
    "phi2-F16": ("phi2", tf.PhiForCausalLM, dict(
        num_hidden_layers=2, num_key_value_heads=4, partial_rotary_factor=0.5, layer_norm_eps=1e-5)),
    "olmoe-F16": ("olmoe", tf.OlmoeForCausalLM, dict(
        num_hidden_layers=2, num_experts=4, norm_topk_prob=False, rms_norm_eps=1e-5, **EXPERTS)),
    "olmo3-F16": ("olmo2", tf.Olmo3ForCausalLM, dict(
        num_hidden_layers=4, sliding_window=16, rope_theta=5e5, rms_norm_eps=1e-6)),
    "command-r-F16": ("command-r", tf.CohereForCausalLM, dict(
        num_hidden_layers=2, use_qk_norm=False, logit_scale=0.25, layer_norm_eps=1e-5)),
    "command-r-plus-F16": ("command-r", tf.CohereForCausalLM, dict(
        num_hidden_layers=2, use_qk_norm=True, logit_scale=0.25, layer_norm_eps=1e-5)),
    "cohere2-F16": ("cohere2", tf.Cohere2ForCausalLM, dict(
        num_hidden_layers=4, sliding_window=16, logit_scale=0.25, layer_norm_eps=1e-5)),
    "seed-oss-F16": ("seed_oss", tf.SeedOssForCausalLM, dict(
        num_hidden_layers=2, head_dim=24, rms_norm_eps=1e-6, attention_bias=True, attention_out_bias=False)),
    "exaone4-F16": ("exaone4", tf.Exaone4ForCausalLM, dict(
        num_hidden_layers=4, sliding_window=16, sliding_window_pattern=4, rms_norm_eps=1e-5)),
    "llama-lora-base-F16": ("llama", tf.LlamaForCausalLM, dict(num_hidden_layers=2, rms_norm_eps=1e-5)),
}

PERMUTED = {"llama", "granite", "granitemoe", "smollm3"}
NORMS_AFTER = {"olmo2", "exaone4"}


def permute(w, heads):
    """Rows of halves to rows of pairs, head by head."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def tensors(arch, model, config):
    """The tensors by their names in the file."""
    after = arch in NORMS_AFTER
    plain = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "self_attn.dense": "attn_output",
        "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm" if after or arch == "seed_oss" else "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "block_sparse_moe.gate": "ffn_gate_inp", "mlp.gate": "ffn_gate_inp",
        "block_sparse_moe.router.layer": "ffn_gate_inp",
    }
    top = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.final_layernorm": "output_norm",
        "lm_head": "output",
    }
    out, experts, heads = {}, {}, {}
    for name, value in model.state_dict().items():
        value = value.numpy()
        stem, kind = name.rsplit(".", 1)
        if stem in top:
            if stem == "lm_head" and config.tie_word_embeddings:
                continue
            out[f"{top[stem]}.{kind}"] = value
            continue
        _, _, layer, rest = stem.split(".", 3)
        to = lambda part: f"blk.{layer}.{part}.{kind}"
        parts = rest.split(".")
        if rest in plain:
            part = plain[rest]
            if arch in PERMUTED and part in ("attn_q", "attn_k"):
                n = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
                value = permute(value, n)
            out[to(part)] = value
        elif "experts" in parts:
            which = {"w1": "gate", "w3": "up", "w2": "down"}.get(parts[-1], parts[-1].removesuffix("_proj"))
            experts.setdefault(to(f"ffn_{which}_exps"), {})[int(parts[-2])] = value
        elif rest == "block_sparse_moe.input_linear":
            gate, up = np.split(value, 2, axis=1)
            out[to("ffn_gate_exps")], out[to("ffn_up_exps")] = gate, up
        elif rest == "block_sparse_moe.output_linear":
            out[to("ffn_down_exps")] = value
        elif ".norms." in rest:
            part = "attn_q_norm" if "q_layernorm" in rest else "attn_k_norm"
            heads.setdefault(to(part), {})[int(parts[-1])] = value
        else:
            raise ValueError(f"{name} of {arch}")
    for name, by_number in {**experts, **heads}.items():
        out[name] = np.stack([by_number[i] for i in range(len(by_number))])
    return out


def is_matrix(name, value):
    return value.ndim > 1 and "norm" not in name


def byte_chars():
    """GPT-2's spelling of bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    chars, n = {}, 0
    for b in range(256):
        if b in printable:
            chars[b] = chr(b)
        else:
            chars[b] = chr(256 + n)
            n += 1
    return [chars[b] for b in range(256)]


def write(path, arch, config, by_name):
    w = gguf.GGUFWriter(path, arch)
    w.add_type("model")
    w.add_name(path.stem)
    w.add_block_count(config.num_hidden_layers)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_vocab_size(config.vocab_size)
    w.add_rope_freq_base(config.rope_theta)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_rope_dimension_count(int(head_dim * getattr(config, "partial_rotary_factor", 1.0)))
    if hasattr(config, "rms_norm_eps"):
        w.add_layer_norm_rms_eps(config.rms_norm_eps)
    if hasattr(config, "layer_norm_eps"):
        w.add_layer_norm_eps(config.layer_norm_eps)
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if count:
        w.add_expert_count(count)
        w.add_expert_used_count(config.num_experts_per_tok)
    if getattr(config, "sliding_window", None):
        w.add_sliding_window(config.sliding_window)
    if arch.startswith("granite"):
        w.add_embedding_scale(config.embedding_multiplier)
        w.add_attention_scale(config.attention_multiplier)
        w.add_residual_scale(config.residual_multiplier)
        w.add_logit_scale(config.logits_scaling)
    if arch in ("command-r", "cohere2"):
        w.add_logit_scale(config.logit_scale)
    if arch == "stablelm":
        w.add_parallel_residual(config.use_parallel_residual)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list([*byte_chars(), "<s>", "</s>", "in", "re"])
    w.add_token_types([1] * 256 + [3, 3, 1, 1])
    w.add_token_merges(["i n", "r e"])
    w.add_bos_token_id(256)
    w.add_eos_token_id(257)
    w.add_add_bos_token(False)
    for name, value in by_name.items():
        dtype = np.float16 if is_matrix(name, value) and "ffn_gate_inp" not in name else np.float32
        w.add_tensor(name, value.astype(dtype))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def build(name):
    arch, cls, extra = MODELS[name]
    torch.manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    # Every parameter is set below; some classes cannot set those of norms without biases themselves.
    for base in cls.__mro__:
        if "_init_weights" in vars(base):
            base._init_weights = lambda self, module: None
    config = cls.config_class(**{**SIZES, **extra}, attn_implementation="eager")
    model = cls(config).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim > 1 and "norm" not in key:
                # As the file will hold them. Wide enough that every part of a block shows in the logits.
                p.copy_((torch.randn_like(p) * (1.4 / p.shape[-1] ** 0.5)).half().float())
            elif "norm" in key and key.endswith("weight"):
                p.copy_(1 + 0.2 * torch.randn_like(p))
            else:
                p.copy_(0.1 * torch.randn_like(p))
        model.tie_weights()
    return arch, model, config


@torch.no_grad()
def golden(model, config, path, arch, cls, seed):
    g = torch.Generator().manual_seed(seed)
    prompts = []
    for length in (1, 7, 40):
        best = None
        for _ in range(6):
            ids = torch.randint(0, VOCABULARY, (length,), generator=g).tolist()
            seen, greedy, margins = list(ids), [], []
            for _ in range(16):
                logits = model(torch.tensor([seen]), use_cache=False).logits[0, -1].float()
                top = logits.topk(2)
                greedy.append(int(top.indices[0]))
                margins.append(float(top.values[0] - top.values[1]))
                seen.append(greedy[-1])
            if best is None or min(margins) > min(best["margins"]):
                logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
                best = dict(ids=ids, logits=[[float(f"{x:.6g}") for x in logits.tolist()]], greedy=greedy,
                            margins=[float(f"{m:.4g}") for m in margins])
        prompts.append(best)
    return dict(
        arch=arch, hf_class=cls.__name__, made_with=f"transformers {tf.__version__}, torch {torch.__version__}",
        config={k: v for k, v in config.to_diff_dict().items() if isinstance(v, (int, float, str, bool, list, dict))},
        n_vocab=VOCABULARY, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), prompts=prompts)


def adapter(path, arch, matrices, rank, alpha, seed, model):
    """Writes an adapter, and adds it to the model times `scale` when called with it."""
    g = torch.Generator().manual_seed(seed)
    w = gguf.GGUFWriter(path, arch)
    w.add_type("adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", alpha)
    pairs = []
    for key, name, heads in matrices:
        weight = model.get_parameter(key)
        a = (torch.randn(rank, weight.shape[1], generator=g) / weight.shape[1] ** 0.5).half().float()
        b = (torch.randn(weight.shape[0], rank, generator=g) / rank ** 0.5).half().float()
        pairs.append((weight, a, b))
        stored = permute(b.numpy(), heads) if heads else b.numpy()
        w.add_tensor(f"{name}.weight.lora_a", a.numpy().astype(np.float16))
        w.add_tensor(f"{name}.weight.lora_b", stored.astype(np.float16))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()

    @torch.no_grad()
    def add(scale):
        for weight, a, b in pairs:
            weight += scale * alpha / rank * (b @ a)
    return add


def lora():
    name = "llama-lora-base-F16"
    arch, model, config = build(name)
    folder = HERE / "lora"
    folder.mkdir(exist_ok=True)
    path = folder / "base.gguf"
    write(path, arch, config, tensors(arch, model, config))
    first = [(f"model.layers.{i}.self_attn.{p}_proj.weight", f"blk.{i}.attn_{p}", h)
             for i in (0, 1) for p, h in (("q", config.num_attention_heads), ("v", None))]
    second = [("model.layers.0.mlp.gate_proj.weight", "blk.0.ffn_gate", None),
              ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down", None),
              ("model.layers.1.self_attn.k_proj.weight", "blk.1.attn_k", config.num_key_value_heads),
              ("model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output", None),
              ("lm_head.weight", "output", None)]
    one = adapter(folder / "first.gguf", arch, first, 4, 8.0, 1, model)
    two = adapter(folder / "second.gguf", arch, second, 3, 1.5, 2, model)
    cases = []
    for scales in ((0.0, 0.0), (1.0, 0.0), (0.5, 1.0), (-0.5, 0.75)):
        one(scales[0]), two(scales[1])
        made = golden(model, config, path, arch, type(model), 7)
        one(-scales[0]), two(-scales[1])
        cases.append(dict(scales=scales, prompts=made["prompts"]))
    (folder / "golden.json").write_text(json.dumps(dict(cases=cases)) + "\n")


def main(names):
    for name in names or MODELS:
        if name == "llama-lora-base-F16":
            lora()
            continue
        arch, model, config = build(name)
        path = HERE / "tiny" / f"{name}.gguf"
        write(path, arch, config, tensors(arch, model, config))
        made = golden(model, config, path, arch, type(model), len(name))
        path.with_suffix(".golden.json").write_text(json.dumps(made) + "\n")
        print(name, path.stat().st_size, [min(p["margins"]) for p in made["prompts"]],
              [float(np.std(p["logits"])) for p in made["prompts"]])


main(sys.argv[1:])
