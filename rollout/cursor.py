"""Which prompt is drawn next: shuffled epochs without end. A resumed run continues with exactly the next prompt."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from rollout.datasets import DatasetError, PromptSet
from rollout.prompts import Prompt


class PromptCursor:
    """Draws prompts: each once an epoch, in an order that follows from the seed and the epoch alone.

    Checkpoints: ``state(open_prompts)`` with the prompts of the groups that are open at that moment. A cursor restored
    from it draws those first and then what would have come next, so no prompt is lost or drawn twice. (Prompts drawn
    after the checkpoint come again by themselves.)
    """

    def __init__(self, prompt_set: PromptSet, *, seed: int) -> None:
        if not prompt_set.prompts:
            raise DatasetError(f"{prompt_set.name} has no prompts to draw")
        self._set = prompt_set
        self._by_id = {prompt.prompt_id: prompt for prompt in prompt_set.prompts}
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._order = self._order_of(0)
        self._quarantined: set[str] = set()
        self._given_back: deque[Prompt] = deque()

    @property
    def epoch(self) -> int:
        """How many whole passes over the prompts are done."""
        return self._epoch

    @property
    def quarantined(self) -> frozenset[str]:
        """Ids of the prompts that are never drawn again."""
        return frozenset(self._quarantined)

    def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts: first those that were open at the checkpoint, then the epoch's and the next epochs'.

        Raises:
            DatasetError: every prompt is quarantined.
        """
        return [self._next() for _ in range(n)]

    def quarantine(self, prompt_id: str) -> None:
        """Never draw this prompt again. Raises ValueError for a prompt that isn't of this set."""
        self._check_known(prompt_id)
        self._quarantined.add(prompt_id)

    def state(self, open_prompts: Iterable[Prompt] = ()) -> dict[str, Any]:
        """What :meth:`restore` continues from. JSON-serialisable.

        Args:
            open_prompts: prompts drawn whose groups are still open; the restored cursor draws them first. This
                cursor itself stays as it is.
        Raises:
            ValueError: an open prompt isn't of this set.
        """
        given_back = [prompt.prompt_id for prompt in (*open_prompts, *self._given_back)]
        for prompt_id in given_back:
            self._check_known(prompt_id)
        return {
            "digest": self._set.digest,
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "quarantined": sorted(self._quarantined),
            "given_back": given_back,
        }

    @classmethod
    def restore(cls, prompt_set: PromptSet, state: Mapping[str, Any]) -> PromptCursor:
        """The cursor whose state `state` is.

        Raises:
            DatasetError: the prompts are not those of the state, so some would be drawn twice and others never.
        """
        if state["digest"] != prompt_set.digest:
            raise DatasetError(
                f"{prompt_set.source} has changed since the checkpoint: its digest was {state['digest'][:12]} and is "
                f"{prompt_set.digest[:12]} now ({len(prompt_set)} prompts). Restore the data of the checkpoint, or "
                "start a new run"
            )
        cursor = cls(prompt_set, seed=state["seed"])
        cursor._epoch, cursor._position = state["epoch"], state["position"]
        cursor._order = cursor._order_of(cursor._epoch)
        cursor._quarantined = set(state["quarantined"])
        cursor._given_back = deque(cursor._by_id[prompt_id] for prompt_id in state["given_back"])
        return cursor

    def _next(self) -> Prompt:
        if len(self._quarantined) == len(self._by_id):
            raise DatasetError(
                f"every one of the {len(self._by_id)} prompts of {self._set.name} is quarantined. The group_dropped "
                "events of the run record say why"
            )
        while True:
            prompt = self._given_back.popleft() if self._given_back else self._next_of_epoch()
            if prompt.prompt_id not in self._quarantined:
                return prompt

    def _next_of_epoch(self) -> Prompt:
        if self._position == len(self._order):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._order_of(self._epoch)
        prompt = self._set.prompts[self._order[self._position]]
        self._position += 1
        return prompt

    def _order_of(self, epoch: int) -> list[int]:
        order: list[int] = np.random.default_rng([self._seed, epoch]).permutation(len(self._set.prompts)).tolist()
        return order

    def _check_known(self, prompt_id: str) -> None:
        if prompt_id not in self._by_id:
            raise ValueError(f"prompt {prompt_id} is not one of the {len(self._by_id)} prompts of {self._set.name}")
