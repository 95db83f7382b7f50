"""The LoRA adapter of a vLLM engine: written as a folder, the form that vLLM loads, and replaced in place."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.config import ModelConfig

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from actors.weights.pull.receiver import ReceivedPart

NAME = "policy"


class VllmAdapter:
    """The one adapter that all requests share. Make it with :meth:`start`.

    Attributes:
        request: the adapter, as every request of the engine names it.
    """

    def __init__(self, engine: Any, folder: tempfile.TemporaryDirectory[str]) -> None:
        from vllm.lora.request import LoRARequest

        self._engine = engine
        self._folder = folder
        self.request: LoRARequest = LoRARequest(NAME, 1, folder.name)

    @classmethod
    async def start(cls, engine: Any, model: ModelConfig) -> VllmAdapter:
        """Load an adapter of zeros into a started engine, which leaves the model's output unchanged."""
        from actors.model.lora import write_empty_adapter

        folder = tempfile.TemporaryDirectory(prefix="counterpoint-adapter-")
        await asyncio.to_thread(write_empty_adapter, Path(folder.name), model)
        adapter = cls(engine, folder)
        await engine.add_lora(adapter.request)
        return adapter

    def write(self, part: ReceivedPart) -> None:
        """Write a received adapter to the folder."""
        from actors.model.lora import write_adapter_folder
        from actors.weights.source import tensors_in

        content = bytearray(part.held.memory.view)  # a small copy: torch wants a writable buffer
        tensors = tensors_in(part.manifest, content)
        write_adapter_folder(Path(self._folder.name), json.loads(part.manifest.attributes), tensors)

    async def load(self) -> None:
        """Load the written adapter in place: running requests continue with it."""
        from vllm.lora.request import LoRARequest

        # a request of the engine itself must not set load_inplace
        await self._engine.add_lora(LoRARequest(NAME, 1, self.request.lora_path, load_inplace=True))

    def close(self) -> None:
        """Delete the folder."""
        self._folder.cleanup()
