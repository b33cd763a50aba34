"""A policy as it lies on disk, with its tokenizer and what ends a response: one folder in the Hugging Face format.

What `train.py` and `eval.py` both need to know of a model before its weights are loaded.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data import stop_token_ids
from model import ModelConfig, Transformer, check_head

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*",
                   "merges.txt")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """As tokenizer.json has it. By the class that tokenizer_config.json names, transformers 5 makes some anew and with
    another way to split text than the model was trained with."""
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@dataclass(frozen=True)
class Policy:
    folder: Path  # a hub snapshot's is named by its commit, a built-in base's by the hash of its recipe
    config: ModelConfig
    dtype: torch.dtype  # of the weights in a forward pass
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    generation: dict  # its generation_config.json, with the stop tokens: else others stop elsewhere or never

    @classmethod
    def open(cls, folder: Path, *, dtype: str, device: torch.device, stop_tokens: str = "auto") -> "Policy":
        """`folder`: of a Hugging Face model; `dtype`: "auto" = bfloat16 on CUDA, float32 elsewhere.

        Raises FileNotFoundError for a folder that is no model's, ValueError for a model that this code cannot run.
        """
        if missing := [x for x in ("config.json", "*.safetensors", "tokenizer.*") if not any(folder.glob(x))]:
            inside = sorted({str(p.parent) for x in ("*", "*/*") for p in folder.glob(f"{x}/model*.safetensors")})
            raise FileNotFoundError(f"{folder} is no Hugging Face model, for it has no {' and no '.join(missing)}; "
                                    f"models in it: {', '.join(inside) or 'none'}")
        config = ModelConfig.from_folder(folder)
        check_head(folder, config)
        tokenizer = load_tokenizer(folder)
        saved = folder / "generation_config.json"
        generation = json.loads(saved.read_text()) if saved.exists() else {}
        stop_ids = stop_token_ids(tokenizer, generation_config=generation, override=stop_tokens)
        if beyond := [i for i in stop_ids if i >= config.vocab_size]:
            raise ValueError(f"{folder}: the model has no embedding of {tokenizer.convert_ids_to_tokens(beyond)}, ids "
                             f"{beyond} of {config.vocab_size} rows, to end a response: name others with --stop_tokens")
        if dtype == "auto":
            dtype = "bfloat16" if device.type == "cuda" else "float32"
        return cls(folder, config, getattr(torch, dtype), tokenizer, stop_ids,
                   {**generation, "eos_token_id": list(stop_ids)})

    def texts(self, responses: Iterable[np.ndarray]) -> list[str]:
        """Responses, (L,) token ids each, as text: without special tokens that begin, end or fill, and with others, for
        <answer> may be one."""
        tokenizer = self.tokenizer
        silent = {*self.stop_ids} & {*tokenizer.all_special_ids}
        silent |= {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        return [tokenizer.decode([i for i in response.tolist() if i not in silent]) for response in responses]

    def weights_hash(self) -> str:
        """blake2b, 16 hex digits, of the bytes of all *.safetensors in the folder, by name, and of what the model does
        with them by config.json."""
        digest = hashlib.blake2b(json.dumps(asdict(self.config)).encode(), digest_size=8)
        for path in sorted(self.folder.glob("*.safetensors")):
            with open(path, "rb") as file:
                hashlib.file_digest(file, lambda: digest)  # in chunks, on top of what it is of already
        return digest.hexdigest()

    def save(self, model: Transformer, path: Path, *, write: bool = True) -> None:
        """The weights of `model`, as they are in a forward pass, as a Hugging Face folder with this policy's tokenizer.
        Written aside, then renamed into the place of what was there: a kill leaves no mixture. All ranks call it, one
        writes."""
        aside = path.with_name(path.name + ".partial")
        if write:
            shutil.rmtree(aside, ignore_errors=True)  # of a kill
        model.save_pretrained(aside, dtype=self.dtype, write=write)
        if write:
            for file in [file for name in TOKENIZER_FILES for file in self.folder.glob(name) if file.is_file()]:
                shutil.copyfile(file, aside / file.name)
            (aside / "generation_config.json").write_text(json.dumps(self.generation, indent=2) + "\n")
            shutil.rmtree(path, ignore_errors=True)
            aside.rename(path)
