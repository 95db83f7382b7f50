"""Entry point of vLLM's plugin system: makes our weight-transfer backends known in every vLLM process.

It runs in every vLLM process of the environment, also those of other projects: it only adds names, lazily.
"""

from __future__ import annotations

import logging

BACKEND = "zmq"
NCCL_BACKEND = "counterpoint_nccl"
IPC_BACKEND = "counterpoint_ipc"


def register() -> None:
    """Register the backends; without vLLM's weight-transfer framework (before 0.26) do nothing."""
    try:
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    except ImportError as error:
        logging.getLogger(__name__).info("this vLLM has no weight-transfer framework: %s", error)
        return
    for name, module, engine in (
        (BACKEND, "actors.weights.worker.transfer_backend", "ZmqWeightTransferEngine"),
        (NCCL_BACKEND, "actors.weights.push.vllm_backends", "CheckedNcclEngine"),
        (IPC_BACKEND, "actors.weights.push.vllm_backends", "CheckedIpcEngine"),
    ):
        try:
            WeightTransferEngineFactory.register_engine(name, module, engine)
        except ValueError:
            logging.getLogger(__name__).debug("weight-transfer backend %r is registered already", name)
