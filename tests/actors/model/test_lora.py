"""LoRA adapters: where they sit, what they are merged into, and how a trainer learns, saves and exports them.

What peft and plain PyTorch make of the same adapters is the measure. That vLLM does is in test_lora_generation.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from actors.config import DeadlineConfig, FreezeConfig, LoraConfig, ModelConfig, ReferenceConfig, TrainerConfig
from actors.model.batches import ModelBatch, model_batch
from actors.model.forward import completion_hidden_states, completion_log_probs
from actors.model.loading import load_model
from actors.model.lora import (
    WEIGHTS_FILE,
    adapter_config,
    adapter_parameters,
    adapters,
    add_adapters,
    write_adapter_folder,
    write_empty_adapter,
)
from actors.model.output_head import ReferenceOutputs
from actors.model.reference_head import load_output_head
from actors.reference_pool import ReferenceServer, ReferenceSpec
from actors.trainer.policy_weights import adapter_tensors, base_tensors, merged_tensors, plain_tensors
from actors.trainer.spec import CriticSpec, PolicySpec
from actors.trainer.value_objective import load_value_model
from algorithms.config import AlgorithmConfig, KLConfig
from rollout.encoding import ExpandedPrompt
from rollout.samples import TrainingSample
from tests.actors.trainer.lora_ranks import KL_COEFFICIENT, Outcome, Task, run_ranks
from tests.actors.trainer.plain_update import PlainTrainer
from tests.actors.training_samples import make_samples
from tests.tiny_model import build_tiny_lm, build_tiny_vlm

LORA = LoraConfig(rank=4, alpha=6.0)
LEARNING_RATE = 1e-3
MAX_GRAD_NORM = 0.05
GRADIENT_FLOOR = 1e-5
"""Entries of smaller gradient are rounding noise, which Adam divides by itself."""
SEED = 3

# ranks, ZeRO stage, precision, more settings of the trainer
CASES: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    "one rank, ZeRO 0": (1, 0, "float32", {}),
    "one rank, ZeRO 2": (1, 2, "float32", {"micro_batch_tokens": 75}),
    "two ranks, ZeRO 0": (2, 0, "float32", {"micro_batch_tokens": 75}),
    "two ranks, ZeRO 3": (2, 3, "float32", {"micro_batch_tokens": 75}),
    "two ranks, ZeRO 3, bfloat16, checkpointed": (
        2,
        3,
        "bfloat16",
        {"gradient_checkpointing": True, "updates_per_step": 2},
    ),
}
FLOAT32 = [case for case, settings in CASES.items() if settings[2] == "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def vlm(folder: Path) -> Path:
    return build_tiny_vlm(folder / "vlm")


@pytest.fixture(scope="module")
def lm(folder: Path) -> Path:
    return build_tiny_lm(folder / "lm", tied=False)


@pytest.fixture(scope="module")
def samples(vlm: Path, folder: Path) -> list[TrainingSample]:
    return make_samples(vlm, folder / "media")


def loaded(path: Path, lora: LoraConfig | None = None, seed: int = SEED) -> Any:
    module = load_model(ModelConfig(path=path, precision="float32")).eval()
    if lora is not None:
        add_adapters(module, lora, seed=seed)
    return module


def randomise(module: nn.Module) -> None:
    """Adapters as after some training: B isn't 0 any more."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in adapter_parameters(module).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def two_completions() -> ModelBatch:
    prompts = [ExpandedPrompt(np.array(ids, np.int32), {}) for ids in ([9, 10, 11], [12])]
    completions = [np.arange(20, 24, dtype=np.int32), np.arange(30, 36, dtype=np.int32)]
    return model_batch(prompts, completions, pad_token_id=0)


def logits_of(module: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = module(input_ids=torch.arange(8, 48)[None]).logits
    return logits


def test_the_adapters_of_a_vision_language_model_sit_in_its_language_model_only(vlm: Path) -> None:
    """Its vision tower has layers of the same names."""
    plain, module = loaded(vlm), loaded(vlm, LORA)
    assert any(".visual." in name and name.endswith("up_proj") for name, _ in plain.named_modules())
    expected = [
        f"model.language_model.layers.{layer}.{block}.{name}"
        for layer in range(2)
        for block, names in (("self_attn", "q k v o"), ("mlp", "gate up down"))
        for name in (f"{each}_proj" for each in names.split())
    ]
    assert [adapter.path for adapter in adapters(module)] == expected
    assert type(module) is type(plain)
    assert adapters(plain) == []


def test_only_adapters_get_gradients(vlm: Path) -> None:
    module = loaded(vlm, LORA)
    randomise(module)
    completion_log_probs(module, two_completions(), temperature=1.0).log_probs.sum().backward()
    trained = {id(parameter) for parameter in adapter_parameters(module).values()}
    assert len(trained) == 28
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (id(parameter) in trained), name


def test_fresh_adapters_change_nothing(vlm: Path) -> None:
    assert torch.equal(logits_of(loaded(vlm, LORA)), logits_of(loaded(vlm)))


def test_a_seed_gives_the_same_adapters_anywhere_and_leaves_the_random_state_alone(lm: Path) -> None:
    torch.manual_seed(1)
    module = loaded(lm, LORA)
    after = torch.rand(3)
    torch.manual_seed(2)
    again, other = loaded(lm, LORA), loaded(lm, LORA, seed=SEED + 1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after)
    for name, parameter in adapter_parameters(module).items():
        assert torch.equal(parameter, adapter_parameters(again)[name])
        assert torch.equal(parameter, adapter_parameters(other)[name]) == name.endswith("lora_B.weight")


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 6 / 4), (True, 6 / 2)])
def test_an_adapted_layer_adds_b_a_x_times_alpha_over_the_rank_or_its_root(
    lm: Path, use_rslora: bool, scaling: float
) -> None:
    """alpha 6, rank 4: 6 / 4 = 1.5, or 6 / sqrt(4) = 3 with rsLoRA."""
    module = loaded(lm, LORA.model_copy(update={"use_rslora": use_rslora}))
    randomise(module)
    adapter = adapters(module)[0]
    layer, x = module.get_submodule(adapter.path), torch.randn(5, 128)
    assert adapter.scaling == scaling
    expected = x @ adapter.weight.T + scaling * (x @ adapter.a.T) @ adapter.b.T
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(x @ adapter.merged().T, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", ["vlm", "lm"])
def test_merged_tensors_are_those_of_pefts_own_merge(
    family: str, use_rslora: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path: Path = request.getfixturevalue(family)
    lora = LORA.model_copy(update={"use_rslora": use_rslora})
    module = loaded(path, lora)
    randomise(module)
    values = [(tensor.name, tensor.read()) for tensor in adapter_tensors(module, "float32")]
    write_adapter_folder(tmp_path, adapter_config(lora, module), values)
    by_peft = peft.PeftModel.from_pretrained(loaded(path), str(tmp_path))
    torch.testing.assert_close(logits_of(by_peft), logits_of(module), atol=1e-5, rtol=0)
    expected = dict(by_peft.merge_and_unload().named_parameters())
    found = {tensor.name: tensor.read() for tensor in plain_tensors(module, "float32")}
    assert list(found) == list(expected)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].detach(), atol=1e-6, rtol=0)


def test_the_base_and_the_merged_tensors_have_the_names_of_a_plain_model_and_tied_ones_appear_once(vlm: Path) -> None:
    module = loaded(vlm, LORA)
    randomise(module)
    plain = dict(loaded(vlm).named_parameters())
    base = base_tensors(module, "bfloat16")
    assert [tensor.name for tensor in base] == list(plain)
    assert all(torch.equal(tensor.read(), plain[tensor.name]) for tensor in base)
    merged = merged_tensors(module, "bfloat16")
    assert [tensor.name for tensor in merged] == [f"{adapter.path}.weight" for adapter in adapters(module)]
    for tensor in (*base, *merged):
        assert (tensor.dtype, tensor.shape) == ("bfloat16", plain[tensor.name].shape)
    for tensor in merged:
        assert tensor.read().dtype == torch.float32
        assert float((tensor.read() - plain[tensor.name]).detach().abs().max()) > 1e-3


def test_an_empty_adapter_has_the_names_and_shapes_of_a_real_one_and_adds_nothing(vlm: Path, tmp_path: Path) -> None:
    write_empty_adapter(tmp_path, ModelConfig(path=vlm, precision="bfloat16", lora=LORA))
    module = loaded(vlm, LORA)
    written = load_file(tmp_path / WEIGHTS_FILE)
    real = adapter_tensors(module, "bfloat16")
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == {t.name: t.shape for t in real}
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    by_peft = peft.PeftModel.from_pretrained(loaded(vlm), str(tmp_path))
    assert torch.equal(logits_of(by_peft), logits_of(loaded(vlm)))


def test_targets_that_match_nothing_are_refused_by_name(lm: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.lora\.targets = \[qkv, dense\] .* \(down_proj, gate_proj"):
        loaded(lm, LoraConfig(targets=("qkv", "dense")))


def test_a_target_that_only_some_layers_have_is_warned_of(lm: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = loaded(lm, LoraConfig(targets=("q_proj", "dense")))
    assert len(adapters(module)) == 2
    assert "no layer named ['dense']" in caplog.text


@pytest.mark.parametrize(("target", "why"), [("lm_head", "embeddings"), ("embed_tokens", "embeddings"), ("mlp", "MLP")])
def test_a_target_that_is_no_linear_layer_or_an_embedding_is_refused(lm: Path, target: str, why: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.lora\.targets reaches .*{target}, .*{why}"):
        loaded(lm, LoraConfig(targets=("q_proj", target)))


def test_the_exact_kl_to_the_base_is_zero_for_fresh_adapters_and_not_for_trained_ones(lm: Path) -> None:
    base, module, batch = loaded(lm), loaded(lm, LORA), two_completions()
    head = load_output_head(ModelConfig(path=lm, precision="float32"), lm)
    with torch.no_grad():
        outputs = ReferenceOutputs(head, completion_hidden_states(base, batch))
        fresh = completion_log_probs(module, batch, temperature=0.7, reference=outputs).kl
        randomise(module)
        trained = completion_log_probs(module, batch, temperature=0.7, reference=outputs).kl
        own = module(**batch.inputs).logits[batch.rows, batch.positions].div(0.7).log_softmax(-1)
        other = base(**batch.inputs).logits[batch.rows, batch.positions].div(0.7).log_softmax(-1)
    assert fresh is not None
    assert trained is not None
    assert float(fresh.abs().max()) < 1e-6
    exact = (own.exp() * (own - other)).sum(-1)
    assert float(exact.min()) > 1e-3
    torch.testing.assert_close(trained[batch.samples, batch.columns], exact, atol=1e-5, rtol=1e-4)


def test_the_reference_and_the_critic_have_no_adapters(vlm: Path, folder: Path) -> None:
    model = ModelConfig(path=vlm, precision="float32", lora=LORA)
    reference = ReferenceSpec(model, ReferenceConfig(), DeadlineConfig(), 1.0, folder / "media")
    critic = CriticSpec(model, TrainerConfig(), DeadlineConfig(), folder / "media", 0, 1, clip=None)
    for module in (ReferenceServer(reference, "cpu")._model, load_value_model(critic)):
        assert adapters(module) == []
    assert all(parameter.requires_grad for parameter in module.parameters())


def spec_of(model: Path, folder: Path, case: str) -> PolicySpec:
    ranks, stage, precision, trainer = CASES[case]
    return PolicySpec(
        model=ModelConfig(path=model, precision=precision, lora=LORA, freeze=FreezeConfig(vision_tower=True)),
        trainer=TrainerConfig(
            learning_rate=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM, ranks=ranks, zero_stage=stage, **trainer
        ),
        algorithm=AlgorithmConfig(kl=KLConfig(coefficient=KL_COEFFICIENT)),
        deadlines=DeadlineConfig(start_s=120, update_s=60, collective_s=60),
        temperature=1.0,
        media_folder=folder / "media",
        seed=SEED,
        total_updates=10,
    )


@pytest.fixture(scope="module")
def task_of(vlm: Path, folder: Path, samples: list[TrainingSample]) -> Callable[[str], Task]:
    return lambda case: Task(spec_of(vlm, folder, case), samples, folder / case.replace(" ", "-").replace(",", ""))


@pytest.fixture(scope="module")
def trained(task_of: Callable[[str], Task]) -> Callable[[str], list[Outcome]]:
    """Trains each case once, when first asked for it; what each rank saw."""
    results: dict[str, list[Outcome]] = {}

    def run(case: str) -> list[Outcome]:
        if case not in results:
            results[case] = run_ranks(task_of(case))
        return results[case]

    return run


class PlainLoraTrainer(PlainTrainer):
    """The update by hand, of adapters."""

    def __init__(self, model: Path, media_folder: Path) -> None:
        super().__init__(model, media_folder, LEARNING_RATE, MAX_GRAD_NORM)
        add_adapters(self.model, LORA, seed=SEED)
        self.adapters = adapter_parameters(self.model)
        self.optimiser = torch.optim.AdamW(
            self.adapters.values(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0
        )

    def copies(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.adapters.items()}


@pytest.fixture(scope="module")
def by_hand(vlm: Path, folder: Path, samples: list[TrainingSample]) -> tuple[dict[str, Tensor], ...]:
    """Adapters at first, after one and two updates, and where the second's gradient is more than noise."""
    trainer = PlainLoraTrainer(vlm, folder / "media")
    initial = trainer.copies()
    trainer.update(samples, KL_COEFFICIENT)
    first = trainer.copies()
    trainer.update(samples, KL_COEFFICIENT)
    has_gradient = {name: parameter.grad.abs() > GRADIENT_FLOOR for name, parameter in trainer.adapters.items()}
    return initial, first, trainer.copies(), has_gradient


@pytest.mark.engine
@pytest.mark.parametrize("case", FLOAT32)
def test_an_update_of_adapters_is_what_plain_pytorch_makes_of_it(
    case: str, trained: Callable[[str], list[Outcome]], by_hand: tuple[dict[str, Tensor], ...]
) -> None:
    initial, first, second, has_gradient = by_hand
    assert sum(int(mask.sum()) for mask in has_gradient.values()) > 10_000
    for outcome in trained(case):
        assert outcome.initial.keys() == initial.keys()
        for name, mask in has_gradient.items():
            assert torch.equal(outcome.initial[name], initial[name])
            # B alone moves at first, since A's gradient goes through it: by 1e-3 an entry; here to 1% of that.
            assert float(((outcome.first[name] - first[name]) * mask).abs().max()) < 1e-5
            assert float(((outcome.second[name] - second[name]) * mask).abs().max()) < 1e-5
            assert float((second[name] - initial[name]).abs().max()) > 5e-4


@pytest.mark.engine
def test_zero_3_on_two_ranks_learns_the_adapters_of_one_rank_without_it(
    trained: Callable[[str], list[Outcome]], by_hand: tuple[dict[str, Tensor], ...]
) -> None:
    *_, has_gradient = by_hand
    (alone,), sharded = trained("one rank, ZeRO 0"), trained("two ranks, ZeRO 3")
    for name, mask in has_gradient.items():
        assert torch.equal(sharded[0].second[name], sharded[1].second[name])
        assert float(((sharded[0].second[name] - alone.second[name]) * mask).abs().max()) < 1e-5


@pytest.mark.engine
@pytest.mark.parametrize("case", CASES)
def test_an_update_changes_adapters_alone(case: str, trained: Callable[[str], list[Outcome]], vlm: Path) -> None:
    dtype = getattr(torch, CASES[case][2])
    plain = {name: parameter.detach().to(dtype) for name, parameter in loaded(vlm).named_parameters()}
    for outcome in trained(case):
        assert outcome.base.keys() == plain.keys()
        assert all(torch.equal(tensor, plain[name]) for name, tensor in outcome.base.items())
        assert all(not torch.equal(outcome.second[name], tensor) for name, tensor in outcome.initial.items())
        assert all(metrics["train/skipped_updates"] == 0 for metrics in outcome.metrics)


@pytest.mark.engine
@pytest.mark.parametrize("case", CASES)
def test_an_export_is_a_plain_model_with_the_trainers_log_probabilities(
    case: str,
    trained: Callable[[str], list[Outcome]],
    task_of: Callable[[str], Task],
    samples: list[TrainingSample],
    vlm: Path,
    folder: Path,
) -> None:
    outcomes, export = trained(case), task_of(case).folder / "export"
    with safe_open(export / "model.safetensors", framework="pt") as exported:
        names = set(exported.keys())
    with safe_open(vlm / "model.safetensors", framework="pt") as original:
        assert names == set(original.keys())
    plain = PlainTrainer(export, folder / "media", LEARNING_RATE, MAX_GRAD_NORM)
    merged = dict(plain.model.named_parameters())
    for name, tensor in outcomes[0].merged.items():
        assert torch.equal(tensor.to(getattr(torch, CASES[case][2])).float(), merged[name])
    log_probs = {index: values for outcome in outcomes for index, values in outcome.log_probs.items()}
    assert sorted(log_probs) == list(range(len(samples)))
    with torch.no_grad():
        for index, sample in enumerate(samples):
            tolerance = 1e-5 if case in FLOAT32 else 0.05
            assert log_probs[index] == pytest.approx(plain.log_probs(sample).numpy(), abs=tolerance)


@pytest.mark.engine
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_holds_no_frozen_weight_and_going_back_to_it_equals_going_on(
    case: str, trained: Callable[[str], list[Outcome]], task_of: Callable[[str], Task], vlm: Path
) -> None:
    for outcome in trained(case):
        assert all(torch.equal(outcome.second[name], tensor) for name, tensor in outcome.resumed.items())
        assert any(not torch.equal(outcome.first[name], tensor) for name, tensor in outcome.second.items())
    files = [path for path in (task_of(case).folder / "state").rglob("*.pt") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < (vlm / "model.safetensors").stat().st_size / 4


@pytest.mark.engine
@pytest.mark.parametrize("case", ["one rank, ZeRO 0", "two ranks, ZeRO 3", "two ranks, ZeRO 3, bfloat16, checkpointed"])
def test_new_processes_go_on_from_a_checkpoint_exactly(
    case: str, trained: Callable[[str], list[Outcome]], task_of: Callable[[str], Task]
) -> None:
    before, after = trained(case), run_ranks(replace(task_of(case), resumes=True))
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(old.first[name], tensor) for name, tensor in new.first.items())
        assert all(torch.equal(old.second[name], tensor) for name, tensor in new.second.items())


@pytest.mark.engine
def test_a_checkpoint_of_other_adapters_is_refused_with_both_settings(trained: Callable[[str], list[Outcome]]) -> None:
    (outcome,) = trained("one rank, ZeRO 0")
    assert '"rank":4' in outcome.refusal
    assert '"rank":3' in outcome.refusal


@pytest.mark.engine
def test_the_exact_kl_to_the_base_trains_adapters_under_zero_3(
    vlm: Path, folder: Path, task_of: Callable[[str], Task], samples: list[TrainingSample]
) -> None:
    task = task_of("two ranks, ZeRO 3")
    reference = ReferenceSpec(
        task.spec.model, ReferenceConfig(), DeadlineConfig(), task.spec.temperature, folder / "media"
    )
    hidden = ReferenceServer(reference, "cpu").hidden_states(samples)
    pairs = zip(samples, hidden, strict=True)
    with_hidden = [replace(sample, reference_hidden=states, reference_log_probs=None) for sample, states in pairs]
    algorithm = AlgorithmConfig(kl=KLConfig(coefficient=KL_COEFFICIENT, estimator="full"))
    first, second = run_ranks(Task(replace(task.spec, algorithm=algorithm), with_hidden, folder / "full-kl"))[0].metrics
    # The policy starts as the base, whose hidden states these are.
    assert abs(first["train/kl_reference"]) < 1e-6
    assert second["train/kl_reference"] > 1e-5
