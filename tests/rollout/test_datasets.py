"""Data sets from files and builders: what becomes a prompt, what is set aside, and what a refused one says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from rollout.config import DatasetConfig
from rollout.datasets import DatasetError, PromptSet, dataset_builder, load_prompts
from rollout.media import MediaStore
from rollout.prompts import MediaPart, Message, Prompt, TextPart

WITH_IMAGES = DatasetConfig(path=Path("rows.jsonl"), images_column="images")
TEXT_ONLY = DatasetConfig(path=Path("rows.jsonl"))


@pytest.fixture
def media(tmp_path: Path) -> MediaStore:
    return MediaStore(tmp_path / "media")


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Two images in a folder beside the data file, as paths relative to it."""
    (tmp_path / "images").mkdir()
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "images" / f"{name}.png")
    return ["images/red.png", "images/blue.png"]


def write(tmp_path: Path, *rows: Any) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))


def load(tmp_path: Path, media: MediaStore, config: DatasetConfig = TEXT_ONLY) -> PromptSet:
    return load_prompts(config, media, base=tmp_path)


def colours(prompt: Prompt, media: MediaStore) -> list[Any]:
    return [media.load_image(ref).getpixel((0, 0)) for ref in prompt.media]


def test_a_row_becomes_a_prompt_with_target_and_metadata(tmp_path: Path, media: MediaStore) -> None:
    write(tmp_path, {"prompt": "2 + 2?", "target": 4, "level": "easy"})
    [prompt] = load(tmp_path, media).prompts
    assert prompt.messages == (Message("user", (TextPart("2 + 2?"),)),)
    assert (prompt.target, prompt.metadata) == (4, {"level": "easy"})


def test_placeholders_become_the_images_in_order(tmp_path: Path, media: MediaStore, pictures: list[str]) -> None:
    write(tmp_path, {"prompt": "<image> or <image>?", "images": pictures, "target": "red"})
    [prompt] = load(tmp_path, media, WITH_IMAGES).prompts
    kinds = [part.text if isinstance(part, TextPart) else "IMAGE" for part in prompt.messages[0].parts]
    assert kinds == ["IMAGE", " or ", "IMAGE", "?"]
    assert colours(prompt, media) == [(255, 0, 0), (0, 0, 255)]


def test_chat_messages_keep_their_turns_and_place_their_images(
    tmp_path: Path, media: MediaStore, pictures: list[str]
) -> None:
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is <image> in HTML?"}]},
        {"role": "assistant", "content": "A tag."},
        {"role": "user", "content": [{"type": "image", "image": pictures[1]}]},
    ]
    write(tmp_path, {"prompt": chat, "images": pictures[0], "target": "x"})
    config = WITH_IMAGES.model_copy(update={"system_prompt": "Be brief."})
    [prompt] = load(tmp_path, media, config).prompts
    assert [message.role for message in prompt.messages] == ["system", "user", "assistant", "user"]
    assert prompt.messages[1].parts[1] == TextPart("What is <image> in HTML?")
    assert colours(prompt, media) == [(255, 0, 0), (0, 0, 255)]


def test_parquet_rows_with_embedded_images_give_the_same_prompts_as_json_lines_with_paths(
    tmp_path: Path, media: MediaStore, pictures: list[str]
) -> None:
    write(tmp_path, {"prompt": "<image>?", "images": [pictures[0]], "target": "red"})
    embedded = [{"bytes": (tmp_path / pictures[0]).read_bytes(), "path": None}]
    table = pyarrow.Table.from_pylist([{"prompt": "<image>?", "images": embedded, "target": "red"}])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    from_parquet = load(tmp_path, media, WITH_IMAGES.model_copy(update={"path": Path("rows.parquet")}))
    assert from_parquet.digest == load(tmp_path, media, WITH_IMAGES).digest


def test_the_digest_follows_content_and_order_and_the_pixels(
    tmp_path: Path, media: MediaStore, pictures: list[str]
) -> None:
    rows = [{"prompt": f"<image>{n}", "images": pictures[:1], "target": "x"} for n in range(3)]
    write(tmp_path, *rows)
    first = load(tmp_path, media, WITH_IMAGES).digest
    assert load(tmp_path, media, WITH_IMAGES).digest == first
    write(tmp_path, *reversed(rows))
    assert load(tmp_path, media, WITH_IMAGES).digest != first
    write(tmp_path, *rows)
    Image.new("RGB", (8, 8), (254, 0, 0)).save(tmp_path / pictures[0])
    assert load(tmp_path, media, WITH_IMAGES).digest != first


def test_limit_counts_usable_prompts(tmp_path: Path, media: MediaStore) -> None:
    write(tmp_path, {"prompt": "a", "target": None}, *({"prompt": p, "target": 1} for p in "bcd"))
    prompts = load(tmp_path, media, TEXT_ONLY.model_copy(update={"limit": 2})).prompts
    assert [prompt.messages[0].parts[0] for prompt in prompts] == [TextPart("b"), TextPart("c")]


GOOD = {"prompt": "fine", "images": [], "target": "x"}
BAD_ROWS: dict[str, tuple[Any, str]] = {
    "target null": ({"prompt": "p", "images": [], "target": None}, "target_missing"),
    "target absent": ({"prompt": "p", "images": []}, "target_missing"),
    "target blank": ({"prompt": "p", "images": [], "target": "  "}, "target_missing"),
    "prompt blank": ({"prompt": "", "images": [], "target": "x"}, "prompt_missing"),
    "fewer images": ({"prompt": "<image><image>", "images": ["images/red.png"], "target": "x"}, "placeholder_mismatch"),
    "more images": ({"prompt": "p", "images": ["images/red.png"], "target": "x"}, "placeholder_mismatch"),
    "image missing": ({"prompt": "<image>", "images": ["images/green.png"], "target": "x"}, "media_missing"),
    "image truncated": ({"prompt": "<image>", "images": ["cut.png"], "target": "x"}, "media_truncated"),
    "image empty": ({"prompt": "<image>", "images": ["empty.png"], "target": "x"}, "media_empty"),
    "not an image": ({"prompt": "<image>", "images": ["rows.jsonl"], "target": "x"}, "media_not_an_image"),
    "image by url": ({"prompt": "<image>", "images": ["http://x/y.png"], "target": "x"}, "media_url_refused"),
    "image a number": ({"prompt": "<image>", "images": [7], "target": "x"}, "media_missing"),
    "not JSON": ('{"prompt": "p", ', "row_not_json"),
    "not an object": ("[1, 2]", "row_not_an_object"),
    "no such role": ({"prompt": [{"role": "bot", "content": "x"}], "target": "x"}, "message_malformed"),
    "no content": ({"prompt": [{"role": "user"}], "target": "x"}, "message_malformed"),
    "no such part": (
        {"prompt": [{"role": "user", "content": [{"type": "smell"}]}], "target": "x"},
        "message_malformed",
    ),
    "assistant last": ({"prompt": [{"role": "assistant", "content": "x"}], "target": "x"}, "message_malformed"),
    "prompt a number": ({"prompt": 5, "target": "x"}, "message_malformed"),
    "no messages": ({"prompt": [], "target": "x"}, "message_malformed"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_quarantined_with_its_number_and_reason(
    tmp_path: Path, media: MediaStore, pictures: list[str], case: str
) -> None:
    row, reason = BAD_ROWS[case]
    (tmp_path / "cut.png").write_bytes((tmp_path / pictures[0]).read_bytes()[:40])
    (tmp_path / "empty.png").touch()
    write(tmp_path, GOOD, row, GOOD)
    prompts = load(tmp_path, media, WITH_IMAGES)
    assert len(prompts) == 2
    assert [(number, failure.reason) for number, failure in prompts.quarantined] == [(2, reason)]
    assert prompts.quarantined_by_reason == {reason: 1}


def test_rows_need_no_target_where_the_recipe_says_so(tmp_path: Path, media: MediaStore) -> None:
    write(tmp_path, {"prompt": "write a poem"})
    [prompt] = load(tmp_path, media, TEXT_ONLY.model_copy(update={"target_column": None})).prompts
    assert prompt.target is None


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("setting", "column", "hint"),
    [
        ("prompt_column", "promt", "'prompt'"),
        ("target_column", "targets", "'target'"),
        ("images_column", "image", "'images'"),
    ],
)
def test_a_missing_column_names_file_setting_column_nearest_and_all_there_are(
    tmp_path: Path, media: MediaStore, suffix: str, setting: str, column: str, hint: str
) -> None:
    write(tmp_path, GOOD)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD]), tmp_path / "rows.parquet")
    config = DatasetConfig.model_validate(
        {"path": f"rows.{suffix}", "images_column": "images", setting: column},
    )
    with pytest.raises(DatasetError) as raised:
        load(tmp_path, media, config)
    message = str(raised.value)
    for said in (f"rows.{suffix}", setting, repr(column), f"Did you mean {hint}?", "'prompt', 'images', 'target'"):
        assert said in message


def test_a_missing_file_names_its_path_and_the_nearest_one(tmp_path: Path, media: MediaStore) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(DatasetError, match=r"row\.jsonl does not exist\. Did you mean 'rows\.jsonl'"):
        load(tmp_path, media, DatasetConfig(path=Path("row.jsonl")))


def test_a_file_of_another_format_is_refused(tmp_path: Path, media: MediaStore) -> None:
    (tmp_path / "rows.csv").write_text("prompt,target\n")
    with pytest.raises(DatasetError, match=r"neither \.jsonl nor \.parquet"):
        load(tmp_path, media, DatasetConfig(path=Path("rows.csv")))


def test_a_parquet_file_that_is_none_is_refused(tmp_path: Path, media: MediaStore) -> None:
    (tmp_path / "rows.parquet").write_text("surely not")
    with pytest.raises(DatasetError, match=r"rows\.parquet can't be read"):
        load(tmp_path, media, DatasetConfig(path=Path("rows.parquet")))


def test_a_data_set_without_a_usable_row_says_why_each_is_quarantined(tmp_path: Path, media: MediaStore) -> None:
    write(tmp_path, {"prompt": "a", "target": None}, {"prompt": "b", "target": None}, "nonsense")
    with pytest.raises(
        DatasetError, match=r"has no usable row: all 3 are quarantined \(2 x target_missing, 1 x row_not_json\)"
    ):
        load(tmp_path, media)


def test_an_empty_file_is_refused(tmp_path: Path, media: MediaStore) -> None:
    write(tmp_path)
    with pytest.raises(DatasetError, match="has no rows"):
        load(tmp_path, media)


@dataset_builder("test-squares")
def squares(media: MediaStore, split: str, count: int = 3, side: int = 4) -> Iterator[Prompt | dict[str, Any]]:
    yield {"prompt": f"{split}: which shape?<image>", "images": [Image.new("RGB", (side, side))], "target": "square"}
    for number in range(count):
        ref = media.put_image(Image.new("RGB", (side, side), (number, 0, 0)))
        yield Prompt((Message("user", (MediaPart(ref),)),), target="square")
    if count == 13:
        raise RuntimeError("thirteen squares")


def builder(name: str = "test-squares", **arguments: Any) -> DatasetConfig:
    return DatasetConfig(builder=name, images_column="images", split="held-out", arguments=arguments)


def test_a_builder_gets_split_and_arguments_and_may_yield_rows_and_prompts(tmp_path: Path, media: MediaStore) -> None:
    prompts = load(tmp_path, media, builder(count=2))
    assert len(prompts) == 3
    assert prompts.prompts[0].messages[0].parts[0] == TextPart("held-out: which shape?")
    assert prompts.name == "test-squares-held-out"


def test_an_unknown_builder_is_named_with_the_nearest(tmp_path: Path, media: MediaStore) -> None:
    with pytest.raises(DatasetError, match=r"'test-square'\. Did you mean 'test-squares'\?.*data\.modules"):
        load(tmp_path, media, builder("test-square"))


def test_an_argument_that_the_builder_does_not_take_is_named_with_the_nearest(
    tmp_path: Path, media: MediaStore
) -> None:
    with pytest.raises(DatasetError, match=r"'sides'; it takes count, side\. Did you mean 'side'"):
        load(tmp_path, media, builder(sides=3))


def test_a_builder_that_raises_is_reported_with_file_and_line(tmp_path: Path, media: MediaStore) -> None:
    with pytest.raises(DatasetError, match=r"test_datasets\.py:\d+: RuntimeError: thirteen squares"):
        load(tmp_path, media, builder(count=13))


def test_a_builder_that_yields_something_else_is_refused(tmp_path: Path, media: MediaStore) -> None:
    dataset_builder("test-strings")(lambda media, split: ["just text"])
    with pytest.raises(DatasetError, match="yielded a str as row 1"):
        load(tmp_path, media, builder("test-strings"))


def test_two_builders_can_not_share_a_name() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        dataset_builder("test-squares")(lambda media, split: [])
    dataset_builder("test-squares")(squares)
