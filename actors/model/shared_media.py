"""Runs each image of a micro-batch through the vision tower once, however many completions share its prompt.

A group of n completions holds the same images n times. The tower runs on the distinct ones and its output is repeated
where the language model wants it, so that the gradients of all n flow back into one pass. Done with hooks around the
tower, for the families whose processor flattens patches and describes them in `image_grid_thw` (Qwen-VL, GLM-V, ...).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rollout.encoding import ExpandedPrompt

PIXELS, GRID = "pixel_values", "image_grid_thw"


@dataclass(frozen=True, slots=True, eq=False)
class SharedImages:
    """Which distinct image stands behind each image of a micro-batch.

    Attributes:
        grid: [distinct images, 3] int64, patches of each in time, height and width; `pixel_values` holds just these.
        source: [images] int64, index of the distinct image behind each.
    """

    grid: Tensor
    source: Tensor

    def to(self, device: torch.device | str) -> SharedImages:
        """The same on another device."""
        return SharedImages(self.grid.to(device), self.source.to(device))

    def rows(self, total: int) -> Tensor | None:
        """Rows of the tower's output for the distinct images that give the output for all of them.

        Args:
            total: rows of the output; each patch gives one, or each block of merged patches.
        Returns:
            [rows for all images] int64, or None where the output isn't by patch.
        """
        patches = self.grid.prod(-1)
        ratio, rest = divmod(int(patches.sum()), max(total, 1))
        if rest or ratio == 0 or bool((patches % ratio).any()):
            return None
        sizes = patches // ratio
        starts = sizes.cumsum(0) - sizes
        lengths = sizes[self.source]
        first = torch.repeat_interleave(starts[self.source] - (lengths.cumsum(0) - lengths), lengths)
        return first + torch.arange(len(first), device=first.device)


def share_images(prompts: Sequence[ExpandedPrompt]) -> tuple[list[Mapping[str, Tensor]], SharedImages | None]:
    """Features of each prompt, with the pixels only where a prompt comes for the first time.

    Args:
        prompts: one a sequence; completions of one prompt share the same object.
    Returns:
        The features by sequence, and what the tower's output has to be repeated by: None where nothing is shared, or
        the family isn't one this works for.
    """
    features = [prompt.features for prompt in prompts]
    with_images = [index for index, feature in enumerate(features) if PIXELS in feature]
    distinct: dict[int, int] = {}
    starts: list[int] = []
    count = 0
    for index in with_images:
        if GRID not in features[index]:
            return features, None
        if id(prompts[index]) not in distinct:
            distinct[id(prompts[index])] = index
            starts.append(count)
            count += len(features[index][GRID])
    if len(distinct) == len(with_images):
        return features, None
    start_of = dict(zip(distinct, starts, strict=True))
    source = [
        start_of[id(prompts[index])] + offset for index in with_images for offset in range(len(features[index][GRID]))
    ]
    grid = torch.cat([features[index][GRID] for index in distinct.values()])
    firsts = set(distinct.values())
    thinned = [
        feature if index in firsts else {name: value for name, value in feature.items() if name != PIXELS}
        for index, feature in enumerate(features)
    ]
    return thinned, SharedImages(grid, torch.tensor(source))


@contextmanager
def repeated_images(tower: nn.Module | None, grid: Tensor | None, shared: SharedImages | None) -> Iterator[None]:
    """Run the tower on distinct images and hand on its output for all of them, for the length of one forward pass.

    Args:
        tower: the vision tower; called with the pixels and `grid_thw`.
        grid: [images, 3], what the model is called with.
        shared: from :func:`share_images`; None leaves everything as it is.
    Raises:
        ValueError: an output of the tower can't be told apart by image, so that this family isn't supported.
    """
    if shared is None or tower is None or grid is None:
        yield
        return

    def is_of_images(grid_thw: Any) -> bool:
        # Videos go through the same tower, in a call of their own.
        return isinstance(grid_thw, Tensor) and grid_thw.shape == grid.shape and bool((grid_thw == grid).all())

    pending: list[bool] = []

    def distinct(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        pending.append(is_of_images(keywords.get("grid_thw")))
        return (arguments, keywords | {"grid_thw": shared.grid}) if pending[-1] else None

    def repeat(_: nn.Module, __: Any, ___: Any, output: Any) -> Any:
        return _repeat(output, shared) if pending.pop() else None

    hooks = [
        tower.register_forward_pre_hook(distinct, with_kwargs=True),
        tower.register_forward_hook(repeat, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _repeat(output: Any, shared: SharedImages) -> Any:
    """Every tensor of the tower's output, in whatever container, repeated for all images."""
    if isinstance(output, Tensor):
        rows = shared.rows(len(output))
        if rows is None:
            raise ValueError(
                f"the vision tower returned {list(output.shape)} for {len(shared.grid)} images of "
                f"{int(shared.grid.prod(-1).sum())} patches, so its rows can't be assigned to the images"
            )
        return output.index_select(0, rows)
    if isinstance(output, Mapping):
        for name in list(output):
            output[name] = _repeat(output[name], shared)  # type: ignore[index]
        return output
    if isinstance(output, (list, tuple)):
        return type(output)(_repeat(item, shared) for item in output)
    return output
