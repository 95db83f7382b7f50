"""The update written out by hand in plain PyTorch, one sequence at a time: what DeepSpeed must agree with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rollout.encoding import PromptEncoder
from rollout.media import MediaStore
from rollout.samples import TrainingSample


class PlainTrainer:
    """GRPO's clipped loss on policy, k3 penalty, truncated importance weights, clipped AdamW."""

    def __init__(self, model: Path, media_folder: Path, learning_rate: float, max_grad_norm: float) -> None:
        from transformers import AutoModelForImageTextToText

        self.model = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
        self.encoder = PromptEncoder.from_pretrained(model, MediaStore(media_folder))
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.max_grad_norm = max_grad_norm

    def log_probs(self, sample: TrainingSample) -> Tensor:
        """[tokens] log-probabilities of the completion at temperature 1, media placeholders banned."""
        prompt = self.encoder.expand(sample.prompt)
        ids = torch.tensor([[*sample.prompt_token_ids.tolist(), *sample.token_ids.tolist()]])
        features = dict(prompt.features)
        if features:
            types = torch.zeros_like(ids)
            types[:, : len(prompt.token_ids)] = features["mm_token_type_ids"]
            features["mm_token_type_ids"] = types
        logits = self.model(input_ids=ids, **features).logits[0].float()
        logits[:, list(self.encoder.banned_token_ids)] = float("-inf")
        start = len(prompt.token_ids)
        tokens = torch.from_numpy(sample.token_ids.astype("int64"))
        return logits[start - 1 : -1].log_softmax(-1).gather(-1, tokens[:, None])[:, 0]

    def update(self, samples: list[TrainingSample], kl_coefficient: float) -> tuple[float, float]:
        """One step of the token-mean loss. Returns the loss and the gradient's norm before clipping."""
        total = sum(int(sample.loss_mask.sum()) for sample in samples)
        self.optimiser.zero_grad()
        loss = torch.zeros(())
        for sample in samples:
            current = self.log_probs(sample)
            behaviour, reference, advantages, mask = (
                torch.from_numpy(array)
                for array in (
                    sample.behaviour_log_probs,
                    sample.reference_log_probs,
                    sample.advantages,
                    sample.loss_mask,
                )
            )
            weight = (current.detach() - behaviour).exp().clamp(max=2.0)
            ratio = (current - current.detach()).exp()  # on policy: never beyond the clip
            kl = (reference - current).exp() - (reference - current) - 1
            loss = loss + ((-weight * ratio * advantages + kl_coefficient * kl) * mask).sum() / total
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimiser.step()
        return float(loss.detach()), float(norm)
