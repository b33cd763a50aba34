"""Three training steps on fixed rollouts, under torchrun or not: what came out goes to a file. Of test_sharding.py.

    sharded_steps.py OUT usual|compiled CASE FLAG ...    CASE: the name of the file's entry, then train.py's
                                                        flags; more cases follow after a bare +
"""

import hashlib
import sys

import torch

import ranks as processes
import train
from config import parse_args
from ranks import Ranks
from train import Trainer

STEPS = 3
trained, pack = [], train.pack  # how many rollouts stand in each row that this rank trains on


def counted(batch, rollouts, device):
    trained.extend([len(rollouts)] * torch.is_grad_enabled())
    return pack(batch, rollouts, device)


def adversaries(trainer: Trainer) -> dict[str, torch.Tensor]:
    parts = {"bins": trainer.bins, "prompt": trainer.prompt_gdro, "rollout": trainer.rollout_gdro}
    return {f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()
            if v.dtype.kind != "U"}


def masters(trainer: Trainer) -> torch.Tensor:
    return torch.cat([processes.full(p).flatten() for p in trainer.model.parameters()])


def main() -> None:
    out, how, *words = sys.argv[1:]
    if how == "compiled":  # a lone float32 process is sharded, too
        processes.is_sharded = lambda *_: True
    ranks, found, train.pack = Ranks(), {}, counted
    while words:
        case, *flags = words[: words.index("+")] if "+" in words else words
        words = words[len(flags) + 2 :]
        cfg, _ = parse_args([*flags, "--max_mismatch", "1e9"])
        trainer = Trainer(cfg, ranks)
        if how == "compiled" and cfg.gradient_checkpointing:
            trainer.model.compile_blocks(backend="aot_eager")  # as on a GPU, up to the code that is made of the graphs
        began = masters(trainer)
        trainer.engine.load_weights = lambda weights: list(weights)  # the sampler keeps the base's: the same rollouts
        with trainer.grader:
            lines, by_rank = [], []
            for i in range(STEPS):
                lines.append(trainer.step(i)[0])
                by_rank.append(ranks.from_all(sum(trained)))
                trained.clear()
        state = adversaries(trainer)
        found[case] = {
            "loss": [x["loss"] for x in lines], "grad_norm": [x["grad_norm"] for x in lines],
            "kl": [x["kl"] for x in lines], "rollouts": by_rank,
            "began": began, "masters": masters(trainer),
            "adversaries": {k: torch.from_numpy(v) for k, v in state.items()},
            "hash": hashlib.blake2b(b"".join(v.tobytes() for v in state.values())).hexdigest()}
    if ranks.rank == 0:
        torch.save(found, out)
    del trainer
    ranks.leave()


if __name__ == "__main__":
    main()
