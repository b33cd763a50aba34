"""TRL's side of `python -m bench trl`, for the interpreter of another environment: it imports nothing from this one.

The setting comes in as JSON, and what each step took goes out: a batch of rollouts and its optimiser steps.
"""

import json
import sys
import tempfile
import time

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Watch(TrainerCallback):
    """Times steps from one to the next: each ends with the last optimiser step of its batch."""

    def __init__(self, updates: int):
        self.updates, self.lines, self.seen = updates, [], {}  # optimiser steps of a batch

    def reward(self, completions: list[str], completion_ids: list[list[int]], answer: list[str], **_) -> list[float]:
        """+1 for a response that ends in the right number, the whole of it or what a colon stands before."""
        rewards = [1.0 if text.rpartition(":")[2] == gold else -1.0
                   for text, gold in zip(completions, answer, strict=True)]
        self.seen = {"tokens_generated": sum(map(len, completion_ids)), "reward_mean": sum(rewards) / len(rewards)}
        return rewards

    def on_train_begin(self, *_, **__) -> None:
        self.start, self.cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step % self.updates == 0:
            took = {"total": time.perf_counter() - self.start, "CPU": time.process_time() - self.cpu}
            self.lines.append({"seconds": took, **self.seen, "trl": trl.__version__})
            self.on_train_begin()


def train(setting: dict, folder: str) -> list[dict]:
    """`setting` is config.Config's, with `steps` batches of `prompts` and `answers` in their order, and `compiled`.

    What is left at TRL's default is the same here and there. Without gradient checkpointing, logs, bars and files:
    nothing that would slow it down. Scaled dot product attention is as fast as eager, a static cache as the usual one;
    continuous batching takes half a minute a step on a CPU.
    """
    updates = setting["prompts_per_step"] // setting["minibatch_prompts"]
    rollouts, watch = setting["minibatch_prompts"] * setting["rollouts_per_prompt"], Watch(updates)
    args = GRPOConfig(
        folder, use_cpu=True, bf16=False, seed=setting["seed"], max_steps=setting["steps"] * updates,
        per_device_train_batch_size=rollouts, steps_per_generation=updates, shuffle_dataset=False,
        num_generations=setting["rollouts_per_prompt"], max_completion_length=setting["max_response_tokens"],
        temperature=setting["temperature"], beta=0.0, loss_type="grpo", epsilon=setting["eps_low"],
        epsilon_high=setting["eps_high"], learning_rate=setting["learning_rate"], lr_scheduler_type="constant",
        weight_decay=setting["weight_decay"], max_grad_norm=setting["grad_clip"], gradient_checkpointing=False,
        torch_compile=setting["compiled"], logging_strategy="no", save_strategy="no", report_to="none",
        disable_tqdm=True)
    GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(setting["model"], dtype=torch.float32, attn_implementation="sdpa"),
        watch.reward, args, Dataset.from_dict({"prompt": setting["prompts"], "answer": setting["answers"]}),
        processing_class=AutoTokenizer.from_pretrained(setting["model"]), callbacks=[watch]).train()
    return watch.lines


if __name__ == "__main__":
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not stand before the lines
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(train(json.load(sys.stdin), folder)), file=out, flush=True)
