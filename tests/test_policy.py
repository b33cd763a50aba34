"""A policy's folder: which weights lie in it, how long its context is, what is said when they are saved."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data import Problem, encode_prompts
from model import Transformer
from policy import Policy

CPU = torch.device("cpu")


def opened(folder, **options) -> Policy:
    return Policy.open(folder, dtype="float32", device=CPU, **options)


def test_the_hash_of_weights_is_of_every_byte_of_every_shard_and_of_nothing_else(base, tmp_path):
    folder, elsewhere = shutil.copytree(base, tmp_path / "m"), tmp_path / "elsewhere"
    policy = opened(folder)
    (folder / "z.safetensors").write_bytes(b"a shard")
    before = policy.weights_hash()
    (folder / "README.md").write_text("words")
    shutil.move(folder, elsewhere)
    moved = dataclasses.replace(policy, folder=elsewhere)
    assert moved.weights_hash() == before
    (elsewhere / "z.safetensors").write_bytes(b"A shard")
    assert moved.weights_hash() != before != opened(base).weights_hash()
    other = dataclasses.replace(opened(base), config=dataclasses.replace(policy.config, rope_theta=20.0))
    assert other.weights_hash() != opened(base).weights_hash()


def test_weights_of_which_there_are_two_are_refused(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "m")
    shutil.copy(folder / "model.safetensors", folder / "model_ema.safetensors")
    with pytest.raises(ValueError, match="model_ema.safetensors beside model.safetensors"):
        opened(folder)
    index = {"weight_map": {"model.norm.weight": "model_ema.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))  # of shards from before
    with pytest.raises(ValueError, match="model.safetensors beside model_ema.safetensors"):
        opened(folder)


@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_text_is_split_as_tokenizer_json_has_it_whatever_class_is_named_and_after_saving_too(base, tmp_path, named):
    split = [pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|[^\p{L}\p{N}]"), "isolated"),
             pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Sequence(split), decoders.ByteLevel()
    inner.train_from_iterator(["What is 12 plus 345? 357. " + " ".join(map(str, range(99)))], trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    folder, text = shutil.copytree(base, tmp_path / "m"), "What is 12 plus 345 ?"
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named, "eos_token": "<end>"}))
    policy = opened(folder)
    policy.save(Transformer.from_pretrained(base, dtype=torch.float32), tmp_path / "saved")
    for tokenizer in (policy.tokenizer, opened(tmp_path / "saved").tokenizer):
        assert tokenizer(text)["input_ids"] == inner.encode(text).ids
        assert tokenizer.decode(inner.encode(text).ids) == text
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["tokenizer_class"] == named


def test_texts_keep_tags_that_are_special_tokens_and_lose_what_begins_ends_or_fills(base, tmp_path):
    folder, tokenizer = shutil.copytree(base, tmp_path / "m"), opened(base).tokenizer
    one, two, sign = tokenizer.convert_tokens_to_ids(["1", "2", "s"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["1", "s"]})  # in the place of tags
    tokenizer.save_pretrained(folder)
    policy = opened(folder, stop_tokens="s")
    end, pad = policy.tokenizer.eos_token_id, policy.tokenizer.pad_token_id
    assert policy.texts([np.array([pad, one, two, one, sign]), np.array([two, end])]) == ["121", "2"]
    assert opened(base, stop_tokens="2").texts([np.array([one, two])]) == ["12"]  # an ordinary word
    policy.save(Transformer.from_pretrained(base, dtype=torch.float32), tmp_path / "saved")
    assert opened(tmp_path / "saved").stop_ids == tuple(sorted({sign, end}))


def test_limits_that_are_not_given_come_from_the_context(base):
    policy = opened(base)  # a context of 256
    assert policy.config.limits(0, 0) == (128, 128) and policy.config.limits(200, 0) == (200, 56)
    assert policy.config.limits(0, 0, (100, 20)) == (100, 20) and policy.config.limits(0, 8) == (128, 8)
    for prompt, response in ((250, 8), (300, 0)):
        with pytest.raises(ValueError, match="context is 256"):
            policy.config.limits(prompt, response)


def test_a_folder_whose_parts_do_not_go_together_is_refused_with_the_remedy(base, tmp_path):
    runs = shutil.copytree(base, tmp_path / "out" / "run" / "best").parents[1]
    with pytest.raises(FileNotFoundError, match=r"no config.json and no \*.safetensors .*models in it: .*run/best"):
        opened(runs)
    for part, message in (("tokenizer.json", "no tokenizer"), ("model.safetensors", "safetensors; models in it: none")):
        folder = shutil.copytree(base, tmp_path / part)
        (folder / part).unlink()
        with pytest.raises(FileNotFoundError, match=message):
            opened(folder)
    quantised = shutil.copytree(base, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match="quantised weights .*bfloat16"):
        opened(quantised)
    grown = shutil.copytree(base, tmp_path / "grown")
    tokenizer = opened(base).tokenizer
    tokenizer.add_special_tokens({"eos_token": "<new>"})
    tokenizer.save_pretrained(grown)
    with pytest.raises(ValueError, match=r"no embedding of \['<new>'\], ids \[(\d+)\] of \1 rows.*--stop_tokens"):
        opened(grown)
    policy = Policy.open(grown, dtype="float32", device=CPU, stop_tokens="<end>")
    with pytest.raises(ValueError, match="problem a: the model has no embedding of '<new>', id .*--chat_template"):
        encode_prompts([Problem("a", "1<new>1", "1", "math")], policy.tokenizer, suffix="", chat_template="never",
                       max_tokens=9, rows=policy.config.vocab_size)


def test_a_kill_while_a_policy_is_saved_leaves_the_one_before_it_whole(base, tmp_path, monkeypatch):
    policy = opened(base)
    model = Transformer.from_pretrained(base, dtype=policy.dtype)
    policy.save(model, tmp_path / "best")
    before = opened(tmp_path / "best").weights_hash()
    model.model.norm.weight.data += 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "copyfile", interrupted)
        policy.save(model, tmp_path / "best")
    assert opened(tmp_path / "best").weights_hash() == before
    policy.save(model, tmp_path / "best")
    assert opened(tmp_path / "best").weights_hash() != before and [p.name for p in tmp_path.iterdir()] == ["best"]


def interrupted(*args):
    raise KeyboardInterrupt
