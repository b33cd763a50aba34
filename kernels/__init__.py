"""The operations of a GRPO step that deserve a kernel, one file each: what it computes and why so, a torch reference,
the Triton form, and one public function. Nothing here knows of models, prompts or adversaries."""

from kernels.group_advantage import group_advantage
from kernels.linear_logprob import linear_logprob

__all__ = ["group_advantage", "linear_logprob"]
