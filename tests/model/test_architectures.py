"""Every architecture that is read: the logits of transformers, and the folder that is written back."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tritium
from tritium.model.config import ModelConfig
from tritium.model.hf import from_hf_config
from tritium.model.rope import RopeScaling
from tritium.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("quick")
STORIES = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260k"
TOKENS = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(0))
SHAPE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
SHAPE |= {"initializer_range": 0.2, "rope_theta": 500.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 7}
KINDS = {
    "llama": ("Llama", {}),
    "llama tied, many ends": ("Llama", {"tie_word_embeddings": True, "eos_token_id": [2, 3]}),
    "llama from qwen": ("Llama", {"sliding_window": 7, "max_window_layers": 2, "use_sliding_window": False}),
    "llama3 rope": ("Llama", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}}),
    "linear rope": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "dynamic rope": ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16}),
    "yarn rope": ("Llama", {"rope_scaling": YARN}),
    "qwen2": ("Qwen2", {}),
    "qwen2 sliding": ("Qwen2", SLIDING | {"max_window_layers": 2}),
    "qwen3": ("Qwen3", {}),
    "qwen3 yarn sliding": ("Qwen3", SLIDING | {"max_window_layers": 1, "rope_scaling": YARN}),
    "mistral": ("Mistral", {"sliding_window": 9}),
    "mistral whole": ("Mistral", {"sliding_window": None}),
    "phi3": ("Phi3", {"sliding_window": 11}),
    "phi4": ("Phi3", {"partial_rotary_factor": 0.5}),
    "gemma2": ("Gemma2", {"sliding_window": 5, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0}),
}


def theirs(kind: str, folder: Path):
    """A tiny random model of transformers, in a folder of its own."""
    transformers = pytest.importorskip("transformers")
    prefix, changes = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, prefix + "Config")(**SHAPE | changes, attn_implementation="eager")
    model = getattr(transformers, prefix + "ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p += 0.2 * torch.randn(p.shape)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_there_and_back(tmp_path, kind):
    import transformers

    reference = theirs(kind, tmp_path / "theirs")
    model = tritium.load(str(tmp_path / "theirs"), dtype=torch.float32)
    expected = reference(TOKENS[None]).logits[0]
    torch.testing.assert_close(model.logits(TOKENS), expected, rtol=0, atol=1e-4)
    model.save(str(tmp_path / "ours"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert type(again) is type(reference)
    torch.testing.assert_close(again.float()(TOKENS[None]).logits[0], expected, rtol=0, atol=1e-4)
    assert tritium.load(str(tmp_path / "ours")).config == model.config


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "dynamic rope"])
def test_decoding_is_the_forward_pass(tmp_path, kind):
    """With windows, softcaps and scales. (Dynamic NTK turns with the length: cached keys are of another one.)"""
    theirs(kind, tmp_path)
    model = tritium.load(str(tmp_path), dtype=torch.float32)
    found = tritium.generate(model, [TOKENS[:3].tolist()], max_tokens=30, temperature=0.0, stop_ids=[])[0]
    ids = torch.tensor([*TOKENS[:3].tolist(), *found.tokens])
    logp = model.logits(ids).log_softmax(-1)[2:-1]
    torch.testing.assert_close(torch.tensor(found.logps), logp.amax(-1), rtol=0, atol=2e-4)


def test_packed_documents_do_not_see_each_other_with_a_dynamic_base(tmp_path):
    theirs("dynamic rope", tmp_path)
    model = tritium.load(str(tmp_path), dtype=torch.float32)
    cu = torch.tensor([0, 30, 40], dtype=torch.int32)
    packed = model.logits(TOKENS, cu)
    torch.testing.assert_close(packed[:30], model.logits(TOKENS[:30]), rtol=0, atol=1e-5)
    torch.testing.assert_close(packed[30:], model.logits(TOKENS[30:]), rtol=0, atol=1e-5)


def test_the_real_model_has_its_stored_logits():
    if not STORIES.exists():
        pytest.skip(f"{STORIES} is not there")
    stored = np.load(STORIES / "reference_logits.npz")
    model = tritium.load(str(STORIES), dtype=torch.float32)
    for i in range(3):
        found = model.logits(torch.from_numpy(stored[f"ids_{i}"]))
        torch.testing.assert_close(found, torch.from_numpy(stored[f"logits_{i}"]), rtol=0, atol=1e-4)
        greedy, count = stored[f"greedy_{i}"].tolist(), len(stored[f"ids_{i}"])
        story = tritium.generate(model, [greedy[:count]], max_tokens=len(greedy) - count, temperature=0.0)[0]
        assert greedy[:count] + story.tokens == greedy


# What transformers does not have -------------------------------------------------------------------------------------

MINI = ModelConfig(96, 32, 48, 4, 4, 2, 8, 64, embedding_scale=12.0, residual_depth=1.4, width_base=8, family="minicpm")


def test_minicpm_scales_embedding_residuals_and_head(tmp_path):
    """h = 12 e, h += 1.4/√L · block(norm(h)), logits = W h · 8/E (arXiv 2404.06395, appendix A.1)."""
    model = Transformer(MINI).initialize(0)
    plain = Transformer(ModelConfig(96, 32, 48, 4, 4, 2, 8, 64)).initialize(0)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():  # the same numbers put into the matrices of a plain Llama
        plain.embedding *= 12
        for layer in plain.layers:
            layer.attention.o *= 1.4 / 2
            layer.mlp.down *= 1.4 / 2
        plain.head *= 8 / 32
    torch.testing.assert_close(model.logits(TOKENS), plain.logits(TOKENS), rtol=1e-5, atol=1e-5)
    model.save(str(tmp_path))
    raw = json.loads((tmp_path / "config.json").read_text())
    assert (raw["scale_emb"], raw["scale_depth"], raw["dim_model_base"]) == (12.0, 1.4, 8)
    assert torch.equal(tritium.load(str(tmp_path), dtype=torch.float32).logits(TOKENS), model.logits(TOKENS))


def test_mup_starts_matrices_narrower_the_wider_the_model():
    config = ModelConfig(512, 256, 256, 4, 4, 4, 64, init_std=0.1, width_base=64, family="minicpm")
    for name, p in Transformer(config).initialize(0).named_parameters():
        if p.dim() == 2:
            wanted = 0.1 / math.sqrt(256 / 64) if "layers." in name else 0.1
            assert p.std().item() == pytest.approx(wanted, rel=0.03), name


def test_logn_scales_queries_beyond_the_trained_length(tmp_path):
    shape = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4, num_kv_heads=2)
    model = Transformer(ModelConfig(**shape, head_dim=8, max_positions=64, logn_length=10, init_std=0.3)).initialize(0)
    scale = model.query_scale(torch.arange(40)).flatten()
    assert (scale[:10] == 1).all() and scale[39].item() == pytest.approx(math.log(40) / math.log(10))
    model.save(str(tmp_path))
    again = tritium.load(str(tmp_path), dtype=torch.float32)
    assert again.config.logn_length == 10 and torch.equal(again.logits(TOKENS), model.logits(TOKENS))
    plain = Transformer(ModelConfig(**shape, head_dim=8, max_positions=64)).initialize(0)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.logits(TOKENS)[:10], model.logits(TOKENS)[:10])
    assert not torch.allclose(plain.logits(TOKENS)[-1], model.logits(TOKENS)[-1])


def test_an_embedding_is_the_last_tokens_state_of_length_one(tmp_path):
    """From a folder as Qwen3-Embedding's: names without "model.", no head, though the configuration ties none."""
    bare = theirs("qwen3", tmp_path).model
    bare.save_pretrained(tmp_path)
    model, cu = tritium.load(str(tmp_path), dtype=torch.float32), torch.tensor([0, 15, 40], dtype=torch.int32)
    found = model.embed(TOKENS, cu)
    for row, document in zip(found, (TOKENS[:15], TOKENS[15:]), strict=True):
        state = bare(document[None]).last_hidden_state[0, -1]
        torch.testing.assert_close(row, F.normalize(state, dim=0), rtol=0, atol=1e-5)
    model.save(str(tmp_path / "ours"))
    assert torch.equal(tritium.load(str(tmp_path / "ours"), dtype=torch.float32).embed(TOKENS, cu), found)


def test_a_stretched_context_is_the_stretched_length(tmp_path):
    raw = SHAPE | {
        "model_type": "qwen2",
        "max_position_embeddings": 16,
        "rope_scaling": {"type": "yarn", "factor": 4.0},
    }
    config = from_hf_config(raw, tmp_path)
    assert config.max_positions == 64 and config.rope_scaling == RopeScaling("yarn", 4.0, 16)


# Loading --------------------------------------------------------------------------------------------------------------


def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    """Measured in a process of its own, on 200 MB: what it allocates at most, beyond what it had, in weights."""
    config = ModelConfig(16384, 512, 2048, 12, 8, 8, 64, tie_embeddings=False)
    model = Transformer(config, dtype=torch.bfloat16)
    for p in model.parameters():
        p.data.zero_()
    model.save(str(tmp_path))
    size = sum(p.nbytes for p in model.parameters())
    code = """
import sys, torch
from tritium.model.hf import load
def memory(kind): return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(kind))
before = memory("VmRSS")
model = load(sys.argv[1], torch.bfloat16)
print(memory("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.1 * size + 40e6, (int(done.stdout), size)  # and what importing left for later
