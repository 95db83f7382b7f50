"""Entry point of vLLM's plugin system: makes the `zmq` weight-transfer backend known in every vLLM process.

It runs in every vLLM process of the environment, also those of other projects: it only adds a name, lazily.
"""

from __future__ import annotations

import logging

BACKEND = "zmq"


def register() -> None:
    """Register the backend; without vLLM's weight-transfer framework (before 0.26) do nothing."""
    try:
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    except ImportError as error:
        logging.getLogger(__name__).info("this vLLM has no weight-transfer framework: %s", error)
        return
    try:
        WeightTransferEngineFactory.register_engine(BACKEND, "actors.weights.engine", "ZmqWeightTransferEngine")
    except ValueError:
        logging.getLogger(__name__).debug("weight-transfer backend %r is registered already", BACKEND)
