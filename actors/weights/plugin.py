"""Entry point of vLLM's plugin system: registers our weight-transfer backends by name.

It runs in every vLLM process of the environment, those of other projects included, so it only adds names, lazily.
"""

from __future__ import annotations

import logging

ZMQ_BACKEND = "zmq"
NCCL_BACKEND = "counterpoint_nccl"
IPC_BACKEND = "counterpoint_ipc"


def register() -> None:
    """Register the backends. Does nothing where vLLM (before 0.26) has no weight-transfer framework."""
    try:
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    except ImportError as error:
        logging.getLogger(__name__).info("this vLLM has no weight-transfer framework: %s", error)
        return
    for name, module, backend in (
        (ZMQ_BACKEND, "actors.weights.worker.transfer_backend", "ZmqTransferBackend"),
        (NCCL_BACKEND, "actors.weights.push.vllm_backends", "CheckedNcclBackend"),
        (IPC_BACKEND, "actors.weights.push.vllm_backends", "CheckedIpcBackend"),
    ):
        try:
            WeightTransferEngineFactory.register_engine(name, module, backend)
        except ValueError:
            logging.getLogger(__name__).debug("weight-transfer backend %r is already registered", name)
