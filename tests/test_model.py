"""The transformer against transformers: same numbers, same gradients, same files, and decoding that changes nothing."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import VOCAB

from model import KVCache, ModelConfig, PackedAttention, Transformer, check_head, fetch

transformers = pytest.importorskip("transformers", reason="transformers makes the reference models")
hub = pytest.importorskip("huggingface_hub")
safetensors_torch = pytest.importorskip("safetensors.torch")

KINDS = pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
LENGTHS = [7, 2, 19, 11]  # of the packed sequences


def sequences(seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator) for n in lengths]


def pack(rows):
    """(tokens, cu_seqlens, max_seqlen, targets): every token but the firsts is a target."""
    lengths = torch.tensor([len(row) for row in rows])
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
    first = set(cu_seqlens.tolist())
    targets = torch.tensor([t for t in range(int(lengths.sum())) if t not in first])
    return torch.cat(rows), cu_seqlens, int(lengths.max()), targets


def reference(hf, rows, temperature):
    """(log-probs, entropies) of all tokens but the firsts from transformers, a sequence at a time."""
    policies = [torch.distributions.Categorical(logits=hf(row[None]).logits[0, :-1] / temperature) for row in rows]
    return (torch.cat([policy.log_prob(row[1:]) for policy, row in zip(policies, rows, strict=True)]),
            torch.cat([policy.entropy() for policy in policies]))


def load(path, dtype=torch.float32):
    return Transformer.from_pretrained(path, dtype=dtype)


def edited(source, path, change):
    """A copy of checkpoint `source` whose tensors the given function has changed in place."""
    shutil.copytree(source, path)
    tensors = safetensors_torch.load_file(path / "model.safetensors")
    change(tensors)
    safetensors_torch.save_file(tensors, path / "model.safetensors")
    return path


# ---------------------------------------------------------------------------------------------- values and gradients


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@KINDS
@TIED
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_entropies_and_gradients_equal_transformers(tiny_hf, hf_model, kind, tied, temperature):
    rows = sequences()
    weight = torch.randn(sum(LENGTHS) - len(LENGTHS), generator=torch.Generator().manual_seed(2))
    hf, model = hf_model(kind, tied), load(tiny_hf(kind, tied))
    logp, entropy = reference(hf, rows, temperature)
    got = model.logprobs(*pack(rows), temperature=temperature, entropy=True)
    assert got[0].dtype == torch.float32 and logp.std() > 0.5  # far from uniform: wrong weights would show
    torch.testing.assert_close(got, (logp, entropy), rtol=0, atol=1e-4)
    expected, found = gradients(hf, (logp * weight).sum()), gradients(model, (got[0] * weight).sum())
    assert found.keys() == expected.keys()
    for name in found:
        assert (found[name] - expected[name]).norm() < 1e-4 * expected[name].norm(), name


def test_gradient_checkpointing_gives_the_same_gradient_and_keeps_less(tiny_hf):
    rows = sequences()
    model = load(tiny_hf("qwen3", False))
    kept, result = {}, {}
    for model.gradient_checkpointing in (0.0, 0.5, 1.0):
        kept[model.gradient_checkpointing] = 0

        def count(x, on=model.gradient_checkpointing):
            kept[on] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss = model.logprobs(*pack(rows)).square().mean()
        result[model.gradient_checkpointing] = gradients(model, loss)
    for name, gradient in result[0.0].items():
        for share in (0.5, 1.0):
            torch.testing.assert_close(result[share][name], gradient, rtol=1e-6, atol=1e-8)
    assert kept[1.0] < kept[0.0] / 2 and kept[0.5] == pytest.approx((kept[0.0] + kept[1.0]) / 2, rel=0.2)


def test_compiled_blocks_give_the_same_in_one_graph_for_all_layers_and_lengths(tiny_hf):
    """With one of the two layers recomputed in backward."""
    found = {}
    for compiled in (False, True):
        model = load(tiny_hf("qwen3", True))
        model.gradient_checkpointing = 0.5
        if compiled:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            model.compile_blocks(backend="aot_eager")
        found[compiled] = [gradients(model, model.logprobs(*pack(rows)).square().mean())
                           for rows in (sequences(), sequences()[:2], sequences()[1:])]
    for eager, fused in zip(found[False], found[True], strict=True):
        for name, gradient in eager.items():
            torch.testing.assert_close(fused[name], gradient, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # before the attention, and after it


# ------------------------------------------------------------------------------------------------------- decoding


@torch.no_grad()
def test_a_full_cache_says_so(tiny_hf):
    """That decoding with a cache gives the log-probs of transformers, the tests of the engine show."""
    model, (tokens, cu_seqlens, longest, _) = load(tiny_hf("qwen3", False)), pack(sequences())
    cache = KVCache(model.config, len(LENGTHS), longest, dtype=torch.float32, device=torch.device("cpu"))
    packed = PackedAttention(cu_seqlens, longest, keep_kv=True)
    model(tokens, packed)
    cache.fill(torch.arange(len(LENGTHS)), torch.arange(len(LENGTHS)), packed)
    with pytest.raises(ValueError, match=f"the KV cache is full: {longest} tokens"):
        model.decode(torch.zeros(len(LENGTHS), dtype=torch.long), cache)


# ---------------------------------------------------------------------------------------------------------- files


@KINDS
@TIED
def test_the_saved_folder_is_the_same_model_in_transformers(tiny_hf, hf_model, tmp_path, kind, tied):
    dtype, tokens, source = torch.float32 if tied else torch.bfloat16, sequences()[2][None], hf_model(kind, tied)
    load(tiny_hf(kind, tied), dtype).save_pretrained(tmp_path)
    saved, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and saved.dtype == dtype
    assert ModelConfig.from_folder(tmp_path).num_parameters() == saved.num_parameters()
    for name, tensor in source.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor.to(dtype)), name
    with torch.no_grad():
        assert dtype != torch.float32 or torch.equal(saved(tokens).logits, source(tokens).logits)


def test_a_sharded_checkpoint_loads_and_a_save_over_it_leaves_no_shard(tiny_hf, tmp_path):
    whole = load(tiny_hf("qwen3", False))
    shutil.copy(tiny_hf("qwen3", False) / "config.json", tmp_path)
    hub.save_torch_state_dict(whole.state_dict(), tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    loaded = load(tmp_path)
    aside = shards[1].rename(tmp_path / "aside")
    with pytest.raises(FileNotFoundError, match=f"has no {re.escape(shards[1].name)}"):
        load(tmp_path)
    aside.rename(shards[1])
    for name, tensor in whole.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():
        loaded.model.norm.weight.add_(1)
    loaded.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).model.norm.weight, whole.model.norm.weight + 1)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_tied_head_stored_twice_and_derived_tensors_are_passed_over(tiny_hf, tmp_path):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)

    source = tiny_hf("llama", True)
    model = load(edited(source, tmp_path / "copy", add))
    check_head(tmp_path / "copy", model.config)
    assert torch.equal(model.head, load(source).head)


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("model.layers.1.self_attn.k_norm.weight"),
     r"tensors missing: \['model\.layers\.1\.self_attn\.k_norm\.weight'\]"),
    (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}),
     r"unexpected or repeated tensor 'model\.layers\.2\.mlp\.up_proj\.weight'"),
    (lambda t: t.update({"model.norm.weight": torch.ones(1)}), r"is \(1,\), not \(64,\)"),  # would broadcast
    (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T.contiguous()}),
     rf"'lm_head\.weight' is \(64, {VOCAB}\), not \({VOCAB}, 64\)"),
])
def test_tensors_that_do_not_fit_are_named(tiny_hf, tmp_path, change, message):
    path = edited(tiny_hf("qwen3", False), tmp_path / "copy", change)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("size", [0, 1000, -1])
def test_a_truncated_file_is_named(tiny_hf, tmp_path, size):
    file = shutil.copytree(tiny_hf("qwen3", True), tmp_path / "copy") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} is damaged or cut short"):
        load(file.parent)


# --------------------------------------------------------------------------------------------------- config.json


def hf_config(path):
    return json.loads((path / "config.json").read_text())


@KINDS
def test_both_generations_of_config_json_are_read(tiny_hf, kind):
    new = hf_config(tiny_hf(kind, True))
    assert "rope_theta" not in new and new["rope_parameters"]["rope_theta"] == 500.0
    old = {k: v for k, v in new.items() if k != "rope_parameters"} | {"rope_theta": 500.0, "rope_scaling": None}
    config = ModelConfig.from_folder(tiny_hf(kind, True))
    assert config == ModelConfig.from_hf(old)
    assert config == ModelConfig.from_hf(config.to_hf(torch.bfloat16))
    assert (config.rope_theta, config.head_dim, config.rms_norm_eps) == (500, 32, 1e-3) and config.tie_word_embeddings


def test_what_config_json_leaves_out_takes_transformers_defaults(tiny_hf):
    hf = hf_config(tiny_hf("llama", True))
    for name in ("rope_parameters", "num_key_value_heads", "head_dim", "tie_word_embeddings"):
        del hf[name]
    ours, theirs = ModelConfig.from_hf(hf), transformers.LlamaConfig(**hf)
    for name in ("num_key_value_heads", "head_dim", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("kind, change, message", [
    ("qwen3", {"model_type": "mamba"}, r"'mamba' is not supported; supported are \['llama', 'qwen2', 'qwen3'\]"),
    ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, "asks for rope scaling"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "asks for rope scal"),
    ("llama", {"mlp_bias": True}, "asks for mlp_bias"),
    ("qwen3", {"attention_bias": True}, "asks for attention_bias"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "asks for sliding window attention"),
    ("llama", {"sliding_window": 16}, "asks for sliding window attention"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "asks for partial rotary"),
    ("qwen3", {"hidden_act": "gelu"}, "asks for an activation other than silu"),
    ("qwen3", {"hidden_size": None}, "config.json has no hidden_size"),
])
def test_unsupported_configs_are_refused(tiny_hf, kind, change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(hf_config(tiny_hf(kind, True)) | change)


# ---------------------------------------------------------------------------------------------------------- fetch


@pytest.mark.parametrize("model", ["no-such-folder", "./model", "/no/such/folder", "~/model", "a/b/c", "runs/model/"])
def test_fetch_says_that_a_path_is_no_folder(model):
    with pytest.raises(FileNotFoundError, match=f"no folder {re.escape(repr(model))}, and it is not a hub id"):
        fetch(model)


def test_a_folder_is_taken_as_it_is_and_a_hub_id_at_the_revision_that_it_names_or_that_is_given(tmp_path, monkeypatch):
    assert fetch(str(tmp_path)) == tmp_path
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, *, revision, allow_patterns: asked.append(
        (repo, revision)) or "folder")
    for model, revision in (("a/b", None), ("a/b@main", None), ("a/b@main", "c0ffee")):
        assert fetch(model, revision) == Path("folder")
    assert asked == [("a/b", None), ("a/b", "main"), ("a/b", "c0ffee")]


def test_fetch_says_that_a_hub_id_is_not_to_be_had_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is neither a folder nor to be had .*log in"):
        fetch("nobody/nothing")


# ------------------------------------------------------------------------------------- parts that contradict each other


def test_a_tied_checkpoint_that_stores_another_head_is_refused(tiny_hf, tmp_path):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][3, 5] += 0.5

    path = edited(tiny_hf("llama", True), tmp_path / "copy", add)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: config.json ties .*tie_word_embeddings to false"):
        check_head(path, ModelConfig.from_folder(path))
    (path / "config.json").write_text(json.dumps(hf_config(path) | {"tie_word_embeddings": False}))
    hf, rows = transformers.AutoModelForCausalLM.from_pretrained(path).eval(), sequences()
    with torch.no_grad():
        torch.testing.assert_close(load(path).logprobs(*pack(rows)), reference(hf, rows, 1.0)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("change, theta", [
    ({"rope_theta": 500.0}, 500.0), ({"rope_theta": None}, 500.0), ({"rope_theta": 1e6}, None),
    ({"rope_scaling": {"rope_theta": 1e4}}, None), ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, None),
    ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0}, 7.0)])
def test_rope_is_taken_from_wherever_it_stands_and_contradictions_are_refused(tiny_hf, change, theta):
    hf = hf_config(tiny_hf("qwen3", True)) | change
    if theta:
        assert ModelConfig.from_hf(hf).rope_theta == theta
    else:
        with pytest.raises(ValueError, match="has rope_theta twice, .* and .*remove|asks for rope scaling"):
            ModelConfig.from_hf(hf)
