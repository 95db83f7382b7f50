"""The exact KL to the reference, from two models' hidden states and heads, against plain PyTorch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)

from actors.config import DeadlineConfig, ModelConfig, ReferenceConfig, TrainerConfig
from actors.model.batches import ModelBatch, model_batch
from actors.model.forward import completion_hidden_states, completion_log_probs
from actors.model.loading import load_model
from actors.model.output_head import OutputHead, ReferenceOutputs, expected_transform
from actors.model.reference_head import INDEX, SINGLE, load_output_head
from actors.reference_pool import ReferencePool, ReferenceSpec
from actors.trainer.policy import PolicyGroup
from actors.trainer.sample_checks import Columns, check_hidden_states, check_samples
from actors.trainer.spec import PolicySpec
from algorithms.config import AlgorithmConfig, KLConfig
from rollout.encoding import ExpandedPrompt
from rollout.failures import FailureError
from rollout.samples import TrainingSample
from tests.actors.trainer.plain_update import PlainTrainer
from tests.actors.training_samples import make_samples
from tests.forks import ray_of_forks
from tests.tiny_model import build_tiny_lm, build_tiny_vlm

KL_COEFFICIENT = 0.5
LEARNING_RATE = 1e-3
MAX_GRAD_NORM = 0.05
GRADIENT_FLOOR = 1e-5
"""Entries of smaller gradient are rounding noise, which Adam divides by itself."""
TEMPERATURE = 0.7
BANNED = (5, 6)

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gemma(width: int) -> Any:
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE, hidden_size=width, final_logit_softcapping=2.0))


def granite(width: int) -> Any:
    return GraniteForCausalLM(GraniteConfig(**SHAPE, hidden_size=width, logits_scaling=3.0))


def cohere(width: int) -> Any:
    return CohereForCausalLM(CohereConfig(**SHAPE, hidden_size=width, logit_scale=0.25))


PAIRS = {
    "capped from divided": (gemma, granite),
    "divided from capped": (granite, gemma),
    "multiplied from itself": (cohere, cohere),
}


def two_completions() -> ModelBatch:
    prompts = [ExpandedPrompt(np.array(ids, np.int32), {}) for ids in ([9, 10, 11], [12])]
    completions = [np.arange(20, 24, dtype=np.int32), np.arange(30, 36, dtype=np.int32)]
    return model_batch(prompts, completions, pad_token_id=0)


def head_of(model: Any) -> OutputHead:
    head = model.get_output_embeddings()
    bias = None if head.bias is None else head.bias.detach()
    return OutputHead(head.weight.detach(), bias, expected_transform(model.config))


def log_softmax(model: Any, batch: ModelBatch) -> Tensor:
    """[N, V] float64, from the model's own logits."""
    logits = model(**batch.inputs, use_cache=False).logits[batch.rows, batch.positions].double() / TEMPERATURE
    return logits.index_fill(-1, torch.tensor(BANNED), -1e30).log_softmax(-1)


@pytest.mark.parametrize("budget_bytes", [4096, 1 << 30], ids=["in tiles", "whole"])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_kl_between_two_models_and_its_gradient_are_those_of_their_whole_logits(
    pair: str, budget_bytes: int
) -> None:
    torch.manual_seed(0)
    make_policy, make_reference = PAIRS[pair]
    policy, reference = make_policy(32).float(), make_reference(48).float().requires_grad_(False)
    batch = two_completions()
    outputs = ReferenceOutputs(head_of(reference), completion_hidden_states(reference, batch))
    found = completion_log_probs(
        policy, batch, temperature=TEMPERATURE, banned_token_ids=BANNED, reference=outputs, budget_bytes=budget_bytes
    )
    own, other = log_softmax(policy, batch), log_softmax(reference, batch)
    exact = (own.exp() * (own - other)).sum(-1)
    assert found.kl is not None
    assert float(exact.detach().min()) > 1e-4
    torch.testing.assert_close(found.kl[batch.samples, batch.columns].double(), exact, atol=1e-6, rtol=1e-4)
    assert found.kl[0, 4:].tolist() == [0.0, 0.0]
    chosen = own.gather(1, batch.tokens[:, None])[:, 0]
    weights = torch.linspace(-1, 2, len(exact))
    parameters = list(policy.parameters())
    loss = ((found.kl + found.log_probs)[batch.samples, batch.columns] * weights).sum()
    gradients = torch.autograd.grad(loss, parameters)
    expected = torch.autograd.grad(((exact + chosen) * weights).sum(), parameters)
    torch.testing.assert_close(gradients, expected, atol=2e-5, rtol=1e-4)


def test_a_policy_that_is_its_reference_is_at_distance_zero_and_stays() -> None:
    torch.manual_seed(0)
    model, batch = gemma(32).float(), two_completions()
    with torch.no_grad():
        hidden = completion_hidden_states(model, batch)
    found = completion_log_probs(model, batch, temperature=1.0, reference=ReferenceOutputs(head_of(model), hidden))
    assert found.kl is not None
    assert float(found.kl.detach().abs().max()) < 1e-6
    found.kl.sum().backward()
    assert max(float(parameter.grad.abs().max()) for parameter in model.parameters()) < 1e-6


class CubedLlama(LlamaForCausalLM):
    """Does something behind its head that no configuration tells of."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        output = super().forward(*arguments, **options)
        output.logits = output.logits.pow(3)
        return output


def test_a_family_that_does_something_unknown_behind_its_head_is_refused(tmp_path: Path) -> None:
    folder = build_tiny_lm(tmp_path)
    model, batch = CubedLlama.from_pretrained(folder, dtype=torch.float32), two_completions()
    with pytest.raises(ValueError, match=r"Set algorithm\.kl\.estimator to k3"):
        completion_hidden_states(model, batch)
    plain = load_model(ModelConfig(path=folder, precision="float32"))
    outputs = ReferenceOutputs(head_of(plain), completion_hidden_states(plain, batch))
    with pytest.raises(ValueError, match=r"Set algorithm\.kl\.estimator to k3"):
        completion_log_probs(model, batch, temperature=1.0, reference=outputs)
    assert "forward" not in vars(model.get_output_embeddings())


@pytest.mark.parametrize("build", [build_tiny_vlm, build_tiny_lm])
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_folder_is_read_without_the_rest(
    build: Any, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(path=build(tmp_path, tied=tied), precision="float32")
    expected = load_model(config).get_output_embeddings().weight
    if not tied:  # two files, as large models have
        tensors = load_file(tmp_path / SINGLE)
        parts = {"one": ["lm_head.weight"], "two": [name for name in tensors if name != "lm_head.weight"]}
        for part, names in parts.items():
            save_file({name: tensors[name] for name in names}, tmp_path / f"{part}.safetensors", {"format": "pt"})
        places = {name: f"{part}.safetensors" for part, names in parts.items() for name in names}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
        (tmp_path / SINGLE).unlink()
    monkeypatch.delattr("actors.model.reference_head.load_model")  # would be a NameError
    assert torch.equal(load_output_head(config, tmp_path).weight, expected)
    bfloat16 = load_output_head(config.model_copy(update={"precision": "bfloat16"}), tmp_path)
    assert torch.equal(bfloat16.weight, expected.bfloat16())


def test_a_folder_without_safetensors_is_loaded_whole(tmp_path: Path) -> None:
    config = ModelConfig(path=build_tiny_lm(tmp_path, tied=False), precision="float32")
    tensors = load_file(tmp_path / SINGLE)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / SINGLE).unlink()
    assert torch.equal(load_output_head(config, tmp_path).weight, tensors["lm_head.weight"])


def sample_with(hidden: Any, sample: TrainingSample) -> TrainingSample:
    return replace(sample, reference_hidden=hidden)


def test_hidden_states_of_another_shape_or_of_some_samples_only_are_refused(tmp_path: Path) -> None:
    one, two = make_samples(build_tiny_vlm(tmp_path / "model"), tmp_path / "media", 2)
    tokens, hidden = len(one.token_ids), Columns(optional=("reference_hidden",))
    with pytest.raises(FailureError, match="1 of 2 samples have no reference_hidden"):
        check_samples([sample_with(np.zeros((tokens, 4), np.float32), one), two], (), hidden)
    with pytest.raises(FailureError, match=rf"reference_hidden \[{tokens + 1}, 4\] for {tokens} tokens"):
        check_samples([sample_with(np.zeros((tokens + 1, 4), np.float32), one)], (), hidden)
    with pytest.raises(FailureError, match="width 4: the exact KL needs 8"):
        check_hidden_states([sample_with(np.zeros((tokens, 4), np.float16), one)], 8)
    with pytest.raises(FailureError, match="width none: the exact KL needs 8"):
        check_hidden_states([one], 8)


class PlainExact(PlainTrainer):
    """The same update, held back by the exact KL to another model."""

    def __init__(self, model: Path, reference: Path, media_folder: Path) -> None:
        super().__init__(model, media_folder, LEARNING_RATE, MAX_GRAD_NORM)
        self.policy = self.model
        self.reference = PlainTrainer(reference, media_folder, LEARNING_RATE, MAX_GRAD_NORM).model

    def distributions(self, model: Any, sample: TrainingSample) -> Tensor:
        """[tokens, V] log-probabilities of every token, through the one that the log-probability is taken of."""
        found: list[Tensor] = []
        self.model = model
        hook = model.register_forward_hook(lambda _, __, output: found.append(output.logits[0].float()))
        try:
            self.log_probs(sample)
        finally:
            hook.remove()
            self.model = self.policy
        logits = found[0].index_fill(-1, torch.tensor(self.encoder.banned_token_ids), -1e30)
        return logits[len(sample.prompt_token_ids) - 1 : -1].log_softmax(-1)

    def exact_update(self, samples: list[TrainingSample]) -> dict[str, float]:
        """One step. Returns the loss, the gradient's norm before clipping, and the mean KL."""
        total = sum(int(sample.loss_mask.sum()) for sample in samples)
        self.optimiser.zero_grad()
        loss, distance = torch.zeros(()), 0.0
        for sample in samples:
            own = self.distributions(self.policy, sample)
            with torch.no_grad():
                other = self.distributions(self.reference, sample)
            tokens = torch.from_numpy(sample.token_ids.astype("int64"))
            current = own.gather(1, tokens[:, None])[:, 0]
            behaviour, advantages, mask = (
                torch.from_numpy(array) for array in (sample.behaviour_log_probs, sample.advantages, sample.loss_mask)
            )
            weight = (current.detach() - behaviour).exp().clamp(max=2.0)
            ratio = (current - current.detach()).exp()
            kl = (own.exp() * (own - other)).sum(-1)
            loss = loss + ((-weight * ratio * advantages + KL_COEFFICIENT * kl) * mask).sum() / total
            distance += float((kl.detach() * mask).sum()) / total
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimiser.step()
        return {"loss": float(loss.detach()), "grad_norm": float(norm), "kl_reference": distance}


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_of_forks():
        yield


@dataclass(frozen=True)
class Setting:
    """Two models, and samples with the hidden states of the second."""

    model: Path
    reference: Path
    media: Path
    samples: list[TrainingSample]


@pytest.fixture(scope="module")
def setting(session: None, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("full-kl")
    model = build_tiny_vlm(folder / "model")
    reference = build_tiny_vlm(folder / "reference", tied=False, seed=1)
    samples = [replace(s, reference_log_probs=None) for s in make_samples(model, folder / "media")]
    spec = ReferenceSpec(
        model=ModelConfig(path=model, precision="float32"),
        config=ReferenceConfig(path=reference, micro_batch_tokens=100),
        deadlines=DeadlineConfig(start_s=120, update_s=60),
        temperature=1.0,
        media_folder=folder / "media",
    )

    async def hidden_states() -> list[Any]:
        pool = await ReferencePool.start(spec)
        try:
            return await pool.hidden_states(samples)
        finally:
            await pool.stop()

    hidden = asyncio.run(hidden_states())
    made = [sample_with(states, sample) for states, sample in zip(hidden, samples, strict=True)]
    return Setting(model, reference, folder / "media", made)


def spec_of(setting: Setting, trainer: dict[str, Any], reference: Path | None) -> PolicySpec:
    return PolicySpec(
        model=ModelConfig(path=setting.model, precision="float32"),
        trainer=TrainerConfig(learning_rate=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM, **trainer),
        algorithm=AlgorithmConfig(kl=KLConfig(coefficient=KL_COEFFICIENT, estimator="full")),
        deadlines=DeadlineConfig(start_s=120, update_s=60, collective_s=60),
        temperature=1.0,
        media_folder=setting.media,
        seed=0,
        total_updates=10,
        reference=reference,
    )


# ranks, ZeRO stage, micro_batch_tokens: 75 holds one or two samples, 16384 all.
CASES = {
    "one rank, ZeRO 0": (1, 0, 16384),
    "two ranks, ZeRO 3, in parts": (2, 3, 75),
}


@pytest.mark.engine
@pytest.mark.parametrize("case", CASES)
def test_updates_by_the_exact_kl_are_what_plain_pytorch_makes_of_them(
    case: str, setting: Setting, tmp_path: Path
) -> None:
    ranks, stage, tokens = CASES[case]
    trainer = {"ranks": ranks, "zero_stage": stage, "micro_batch_tokens": tokens}

    async def updated() -> list[dict[str, float]]:
        group = await PolicyGroup.start(spec_of(setting, trainer, setting.reference))
        try:
            with pytest.raises(FailureError, match="width none"):
                await group.update([sample_with(None, sample) for sample in setting.samples], KL_COEFFICIENT)
            metrics = [await group.update(setting.samples, KL_COEFFICIENT)]
            await group.export(tmp_path / "first")
            return [*metrics, await group.update(setting.samples, KL_COEFFICIENT)]
        finally:
            await group.stop()

    metrics = asyncio.run(updated())
    exported = PlainTrainer(tmp_path / "first", setting.media, LEARNING_RATE, MAX_GRAD_NORM).model
    plain = PlainExact(setting.model, setting.reference, setting.media)
    for turn in range(2):
        for name, value in plain.exact_update(setting.samples).items():
            assert metrics[turn][f"train/{name}"] == pytest.approx(value, rel=1e-4), (turn, name)
        assert metrics[turn]["train/kl_reference"] > 1e-3
        assert metrics[turn]["train/skipped_updates"] == 0
        if turn == 0:
            for (name, found), hand in zip(exported.named_parameters(), plain.policy.parameters(), strict=True):
                assert hand.grad is not None
                where = hand.grad.abs() > GRADIENT_FLOOR
                assert float(((found - hand).detach().abs() * where).max()) < 1e-5, name


@pytest.mark.engine
async def test_a_reference_of_another_vocabulary_is_refused_with_both_sizes(setting: Setting, tmp_path: Path) -> None:
    build_tiny_vlm(tmp_path, tied=False)
    tensors = load_file(tmp_path / SINGLE)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name][:120].clone()
    save_file(tensors, tmp_path / SINGLE, {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["vocab_size"] = 120
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FailureError, match=r"has 120 logits and .* has 128. Set it to k3"):
        await PolicyGroup.start(spec_of(setting, {}, tmp_path))
