"""The report of a whole run, of a cut one and of an empty one, from records on disk."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.record.run_record import EvaluationResult, RunRecord, SampleRow
from orchestrator.report.page import write_report
from orchestrator.report.summary import summarise, training_seconds
from rollout.groups import GroupState, Transition
from rollout.ledger import Ledger
from rollout.media import MediaRef, MediaStore

STEPS = 60
CONFIG = "run:\n  name: digits\n  seed: 7\ntrainer:\n  steps: 60\n"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """What a test asks of a page: balanced tags, text, attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def digits(store: MediaStore, count: int) -> list[MediaRef]:
    """Real handwritten digits, 8 x 8, enlarged."""
    from sklearn.datasets import load_digits

    images = load_digits().images[:count]
    return [store.put_image(Image.fromarray(np.uint8(255 - image * 15.9)).resize((56, 56))) for image in images]


def step_metrics(step: int, random: np.random.Generator) -> dict[str, float]:
    done = step / STEPS
    parts = {"generate": 1.9, "score": 0.05, "reference": 0.3, "learn": 1.6, "sync": 0.2, "other": 0.1}
    times = {f"time/{part}_s": seconds * random.uniform(0.9, 1.1) for part, seconds in parts.items()}
    weights = {"version": step, "bytes": 2.3e6, "transfer_s": 0.02, "load_s": 0.11, "pause_s": 0.13}
    return {
        "train/loss": 0.1 - 0.1 * done,
        "train/kl_reference": 0.04 * done + random.uniform(0, 0.002),
        "train/entropy": 0.6 - 0.35 * done + random.uniform(-0.02, 0.02),
        "reward/mean": 0.42 + 0.36 * done + random.uniform(-0.05, 0.05),
        "rollout/mean_tokens": 14 - 3 * done + random.uniform(-0.4, 0.4),
        "rollout/mismatch_kl": 2e-7 * random.uniform(0.5, 2),
        "rollout/max_logprob_gap": 3e-6 * random.uniform(0.5, 2),
        "rollout/truncated_share": 0.08 * (1 - done) * random.uniform(0.5, 1.5),
        "rollout/staleness": float(step % 2),
        "rollout/tokens_per_s": 700 + random.uniform(-50, 50),
        "rollout/completions": 256.0,
        **{f"weights/{name}": value for name, value in weights.items()},
        "weights/verified_version": float(step if step != 31 else 30),
        **times,
        "time/step_s": sum(times.values()),
    }


def evaluation(record: RunRecord, step: int, refs: list[MediaRef]) -> None:
    for mode, bonus in (("greedy", 0.05), ("sampled", 0.0)):
        mean = 0.41 + 0.38 * step / STEPS + bonus
        rows = []
        for index in range(8):
            is_right = (index * 7 + 3) % 10 < mean * 10
            completion = f"The sum is {index + 9 if is_right else index + 4}."
            media = (refs[2 * index], refs[2 * index + 1])
            prompt = "[image] [image] What is the sum of these two digits?"
            rows.append(SampleRow(prompt, media, index + 9, completion, float(is_right), {"exact": float(is_right)}))
        record.evaluation(step, mode, EvaluationResult(mean, mean - 0.06, mean + 0.06, 256, 12.0), rows)


def ledger(folder: Path) -> None:
    with Ledger(folder / "ledger.db") as book:
        for number in range(100):
            name, state = f"g{number}", GroupState.ADMITTED
            rows = [Transition(name, None, state, 0.0, prompt_id="p", version=0)]
            if number < 3:
                rows.append(Transition(name, state, GroupState.DROPPED, 1.0, reason="reward_timeout"))
            elif number < 95:
                for target in (GroupState.GENERATING, GroupState.SCORING, GroupState.READY, GroupState.CONSUMED):
                    rows.append(Transition(name, state, target, 1.0, version=1))
                    state = target
            book.append(rows)


def write_run(folder: Path) -> None:
    """A run of 60 steps with everything in its record."""
    random = np.random.default_rng(0)
    refs = digits(MediaStore(folder / "media"), 16)
    (folder / "config.yaml").write_text(CONFIG)
    with RunRecord(folder) as record:
        record.event("started")
        evaluation(record, 0, refs)
        for step in range(1, STEPS + 1):
            record.metrics(step, step_metrics(step, random))
            if step % 20 == 0:
                evaluation(record, step, refs)
        record.event("mismatch_alarm", version=31, why="generator-0 holds version 30")
        record.event("finished", status="FINISHED", verdict="done")
    ledger(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    write_report(folder)
    return folder


def test_the_summary_holds_before_and_after_with_intervals_and_the_seed(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    before, after = summary["eval"]["before"]["greedy"], summary["eval"]["after"]["greedy"]
    assert before | {"mean_tokens": 0} == {
        "mean": pytest.approx(0.46),
        "low": pytest.approx(0.40),
        "high": pytest.approx(0.52),
        "n": 256,
        "step": 0,
        "mean_tokens": 0,
    }
    assert (after["mean"], after["step"]) == (pytest.approx(0.84), 60)
    assert summary["eval"]["best"]["sampled"]["mean"] == pytest.approx(0.79)
    assert summary["eval"]["gain"]["greedy"] == pytest.approx(0.38)
    assert (summary["seed"], summary["steps"], summary["state"]) == (7, 60, "finished")


def test_the_account_of_groups_adds_up_in_summary_and_page(run: Path) -> None:
    groups = json.loads((run / "summary.json").read_text())["groups"]
    assert groups == {
        "admitted": 100,
        "consumed": 92,
        "dropped": {"reward_timeout": 3},
        "open": 5,
        "is_balanced": True,
    }
    text = Page((run / "report.html").read_text()).text
    assert "the account is balanced." in text
    assert "dropped: reward timeout 3 3.0%" in text


def test_shares_of_time_add_up_to_one_and_what_no_part_claims_is_other(tmp_path: Path) -> None:
    with RunRecord(tmp_path) as record:
        record.metrics(1, {"time/step_s": 10.0, "time/generate_s": 4.0, "time/learn_s": 3.0, "time/other_s": 1.0})
    breakdown = summarise(tmp_path)["time"]
    # 10 s a step; 4 + 3 named, 1 given as other, 2 claimed by none: other is 3
    assert breakdown["seconds"]["other"] == pytest.approx(3.0)
    assert breakdown["shares"]["generate"] == pytest.approx(0.4)
    assert sum(breakdown["shares"].values()) == pytest.approx(1.0)


def test_the_page_needs_nothing_from_outside(run: Path) -> None:
    page = Page((run / "report.html").read_text())
    assert page.open == []
    for tag, attributes in page.attributes:
        for name in ("src", "href", "xlink:href", "data", "poster"):
            value = attributes.get(name) or "data:"
            assert value.startswith(("data:", "#")), f"<{tag} {name}={value[:60]}>"
    assert page.tags["script"] == page.tags["link"] == 0
    assert "url(http" not in (run / "report.html").read_text()


def test_every_picture_has_words_for_those_who_cannot_see_it(run: Path) -> None:
    page = Page((run / "report.html").read_text())
    images = [attributes for tag, attributes in page.attributes if tag == "img"]
    assert len(images) == 16
    assert all(attributes.get("alt") for attributes in images)
    pictures = [attributes for tag, attributes in page.attributes if tag == "svg"]
    assert len(pictures) > 8
    assert all(attributes.get("aria-label") or attributes.get("aria-hidden") for attributes in pictures)
    ids = [attributes["id"] for _, attributes in page.attributes if attributes.get("id")]
    assert len(ids) == len(set(ids))


def test_a_weight_update_that_was_not_verified_is_always_shown(run: Path) -> None:
    text = Page((run / "report.html").read_text()).text
    assert "59 of 60" in text
    assert re.search(r"31 31 not verified", text)


def test_plots_are_png_files_one_a_chart_and_an_overview(run: Path) -> None:
    names = {path.stem for path in (run / "plots").glob("*.png")}
    assert names >= {"evaluation", "reward", "kl", "entropy", "length", "mismatch", "staleness", "time", "overview"}
    assert all(Image.open(path).size[0] > 600 for path in (run / "plots").glob("*.png"))


def test_a_run_with_a_critic_shows_how_much_it_foretells(run: Path, tmp_path: Path) -> None:
    assert not (run / "plots" / "critic.png").exists()
    with RunRecord(tmp_path) as record:
        for step in (1, 2):
            record.metrics(step, {"critic/loss": 0.5 / step, "critic/explained_variance": 0.1 * step})
    write_report(tmp_path)
    assert (tmp_path / "plots" / "critic.png").exists()
    assert "Critic" in (tmp_path / "report.html").read_text()


def test_a_supervised_run_shows_its_loss_and_schedule_and_nothing_of_groups_or_evaluations(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: warm}\nsft: {}\ntrainer: {steps: 40}\n")
    with RunRecord(tmp_path) as record:
        record.event("started")
        for step in range(1, 41):
            metrics = {"train/loss": 2.0 / step, "train/learning_rate": 1e-3, "train/grad_norm": 1.0}
            times = {"time/step_s": 0.5, "time/learn_s": 0.4, "time/other_s": 0.1}
            record.metrics(step, metrics | times | {"train/tokens_per_second": 800.0})
        record.event("finished", status="FINISHED", verdict="done")
    text = Page(write_report(tmp_path).read_text()).text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["loss"] == {"first": {"value": 2.0, "step": 1}, "last": {"value": 0.05, "step": 40}}
    assert summary["throughput"]["tokens_per_s"] == pytest.approx(800.0)
    names = {path.stem for path in (tmp_path / "plots").glob("*.png")}
    assert names == {"loss", "learning_rate", "grad_norm", "throughput", "time", "overview"}
    assert "Training loss" in text
    for word in ("held-out", "Held-out", "Groups", "groups", "Weight", "Completions", "Reward", "reward"):
        assert word not in text.split("Versions and configuration")[0], word


def test_text_of_the_policy_is_shown_as_text_not_as_markup(tmp_path: Path) -> None:
    with RunRecord(tmp_path) as record:
        record.samples(1, [SampleRow("<b>bold</b>", (), None, "<script>alert(1)</script>", 0.0)])
    page = Page(write_report(tmp_path).read_text())
    assert page.tags["script"] == page.tags["b"] == 0
    assert "<script>alert(1)</script>" in page.text


def test_an_image_that_is_gone_or_damaged_does_not_stop_the_report(tmp_path: Path) -> None:
    gone = MediaRef("image", "ab" * 32, "image/png")
    with RunRecord(tmp_path) as record:
        record.samples(1, [SampleRow("p", (gone,), None, "c", 0.0)])
    assert "medium 1" in Page(write_report(tmp_path).read_text()).text


def test_an_empty_folder_gets_a_report_that_says_there_is_nothing_yet(tmp_path: Path) -> None:
    text = Page(write_report(tmp_path).read_text()).text
    assert "No held-out prompts have been evaluated yet" in text
    assert json.loads((tmp_path / "summary.json").read_text())["eval"]["before"] == {}


def test_a_cut_run_with_values_that_were_not_finite_gets_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: cut")
    with RunRecord(tmp_path) as record:
        record.event("started")
        record.metrics(1, {"train/entropy": math.nan, "reward/mean": 0.5, "time/step_s": 2.0, "weights/version": 1})
        record.metrics(2, {"train/entropy": math.inf, "reward/mean": math.nan, "time/step_s": 2.0})
        record.evaluation(0, "greedy", EvaluationResult(0.5, math.nan, math.nan, 1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "val')
    text = Page(write_report(tmp_path).read_text()).text
    assert "not finished · step 2" in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["state"], summary["eval"]["after"]) == ("unfinished", {})


def test_a_failed_run_shows_its_verdict_until_it_is_resumed(tmp_path: Path) -> None:
    with RunRecord(tmp_path) as record:
        record.event("started")
        record.event("finished", status="FAILED", verdict="half of all rewards failed")
        failed = summarise(tmp_path)
        assert "half of all rewards failed" in Page(write_report(tmp_path).read_text()).text
        record.event("resumed")
    resumed = summarise(tmp_path)
    assert (failed["state"], failed["verdict"]) == ("failed", "half of all rewards failed")
    assert (resumed["state"], resumed["verdict"]) == ("unfinished", None)


def test_training_time_leaves_out_the_gap_before_a_resume() -> None:
    def row(time: float) -> dict[str, float]:
        return {"time": time, "time/step_s": 10.0}

    events = [{"kind": "started", "time": 90.0}, {"kind": "resumed", "time": 995.0}]
    # 100..120 (two steps), cut, resumed at 995, one step 1000..1010
    assert training_seconds([row(110.0), row(120.0), row(1010.0)], events) == pytest.approx(30.0)


def test_rewards_beyond_one_are_not_shown_as_percentages(tmp_path: Path) -> None:
    with RunRecord(tmp_path) as record:
        record.evaluation(0, "greedy", EvaluationResult(-1.5, -1.7, -1.3, 10))
        record.evaluation(9, "greedy", EvaluationResult(2.25, 2.0, 2.5, 10))
    text = Page(write_report(tmp_path).read_text()).text
    assert "+3.75" in text
    assert "%" not in text.split("Training time")[0].replace("95% intervals", "")


def test_a_report_of_no_folder_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Give the run folder"):
        write_report(tmp_path / "missing")
