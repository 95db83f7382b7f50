"""What the fork server (forks.py) has imported before it makes a process. Imported there alone."""

from __future__ import annotations

import deepspeed.runtime.engine  # noqa: F401
import torch  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
import transformers.models.qwen2_5_vl.processing_qwen2_5_vl  # noqa: F401
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor  # noqa: F401
from vllm.v1.engine import core  # noqa: F401
from vllm.v1.worker import cpu_worker  # noqa: F401

import actors.trainer.policy_learner
import actors.trainer.policy_weights
import actors.trainer.value_objective
import actors.weights.push.vllm_backends
import actors.weights.worker.transfer_backend  # noqa: F401
