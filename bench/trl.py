"""TRL's side of `python -m bench trl`, for the interpreter of another environment: it imports nothing from this one.

Lines of JSON. Out: what is installed. In: the setting. Then for every empty line that comes in the trainer takes one
step, a batch of rollouts and its optimiser steps, and says what it took. Between steps it waits for its turn.
"""

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def right_or_wrong(completions: list[str], answer: list[str], **_) -> list[float]:
    """The reward: +1 for a response that ends in the right number, the whole of it or what a colon stands before."""
    return [1.0 if text.rpartition(":")[2] == gold else -1.0 for text, gold in zip(completions, answer, strict=True)]


class Turns(TrainerCallback):
    """Waits for a step's turn, and times it from there to the end of its last optimiser step."""

    def __init__(self, updates: int, answer: Callable[[dict], None]):
        self.updates, self.answer = updates, answer  # optimiser steps of a batch; who is told
        self.seconds, self.seen = Counter(), {}

    def timed(self, phase: str, call: Callable) -> Callable:
        def timed_call(*args, **kwargs):
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self.seconds[phase] += time.perf_counter() - start
            return result

        return timed_call

    def reward(self, completion_ids: list[list[int]], **batch) -> list[float]:
        rewards = right_or_wrong(**batch)
        self.seen = {"tokens_generated": sum(map(len, completion_ids)), "reward_mean": sum(rewards) / len(rewards)}
        return rewards

    def wait(self) -> None:
        if not sys.stdin.readline():
            sys.exit("bench is gone")
        self.seconds.clear()
        self.start, self.cpu = time.perf_counter(), time.process_time()

    def on_train_begin(self, *_, **__) -> None:
        self.wait()

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step % self.updates == 0:
            total, cpu, s = time.perf_counter() - self.start, time.process_time() - self.cpu, self.seconds
            # "batch" is all that is done once a batch, those two included; the rest are optimiser steps.
            self.answer({"seconds": {"generate": s["generate"], "logprob": s["logprob"], "update": total - s["batch"],
                                     "total": total, "CPU": cpu}, **self.seen})
            if state.global_step < state.max_steps:
                self.wait()


def train(setting: dict, folder: str, answer: Callable[[dict], None]) -> None:
    """`setting` is config.Config's, with `steps` batches of `prompts` and `answers` in their order, and `compiled`.

    What is left at TRL's default is the same here and there. Without gradient checkpointing, logs, bars and files:
    nothing that would slow it down. Scaled dot product attention is as fast as eager, a static cache as the usual one;
    continuous batching takes half a minute a step on a CPU.
    """
    updates = setting["prompts_per_step"] // setting["minibatch_prompts"]
    rollouts, turns = setting["minibatch_prompts"] * setting["rollouts_per_prompt"], Turns(updates, answer)
    args = GRPOConfig(
        folder, use_cpu=True, bf16=False, seed=setting["seed"], max_steps=setting["steps"] * updates,
        per_device_train_batch_size=rollouts, steps_per_generation=updates, shuffle_dataset=False,
        num_generations=setting["rollouts_per_prompt"], max_completion_length=setting["max_response_tokens"],
        temperature=setting["temperature"], beta=0.0, loss_type="grpo", epsilon=setting["eps_low"],
        epsilon_high=setting["eps_high"], learning_rate=setting["learning_rate"], lr_scheduler_type="constant",
        weight_decay=setting["weight_decay"], max_grad_norm=setting["grad_clip"], gradient_checkpointing=False,
        torch_compile=setting["compiled"], logging_strategy="no", save_strategy="no", report_to="none",
        disable_tqdm=True)
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(setting["model"], dtype=torch.float32, attn_implementation="sdpa"),
        turns.reward, args, Dataset.from_dict({"prompt": setting["prompts"], "answer": setting["answers"]}),
        processing_class=AutoTokenizer.from_pretrained(setting["model"]), callbacks=[turns])
    trainer._prepare_inputs = turns.timed("batch", trainer._prepare_inputs)
    trainer.model.generate = turns.timed("generate", trainer.model.generate)
    new = trainer._get_per_token_logps_and_entropies
    old = turns.timed("logprob", new)  # the same method takes log-probs before the optimiser steps, and in them
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (new if torch.is_grad_enabled() else old)(*a, **k)
    trainer.train()


def main() -> None:
    lines, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not stand among the lines

    def answer(line: dict) -> None:
        print(json.dumps(line), file=lines, flush=True)

    answer({name: version(name) for name in ("trl", "torch", "transformers", "accelerate")})
    with tempfile.TemporaryDirectory() as folder:
        train(json.loads(sys.stdin.readline()), folder, answer)


if __name__ == "__main__":
    main()
