"""The media store: equal content, one file; and every way in which a medium can be broken, with real broken bytes."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import wave
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rollout.failures import DataError, FailureError, FailureKind
from rollout.media import MediaRef, MediaStore


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    return MediaStore(tmp_path / "media")


def picture(width: int = 32, height: int = 24, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_of_claimed_size(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = png_chunk(b"IDAT", zlib.compress(b"\0"))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + body + png_chunk(b"IEND", b"")


def files_in(store: MediaStore) -> list[Path]:
    return [path for path in store.folder.rglob("*") if path.is_file()] if store.folder.exists() else []


def test_an_image_comes_back_pixel_by_pixel(store: MediaStore) -> None:
    image = picture()
    ref = store.put_image(image)
    assert np.array_equal(np.asarray(store.load_image(ref)), np.asarray(image))
    assert ref.media_type == "image/png"


def test_equal_pixels_are_stored_once_whatever_metadata_they_carry(store: MediaStore) -> None:
    image = picture()
    tagged = image.copy()
    tagged.info["icc_profile"] = b"a profile"
    tagged.info["comment"] = "taken today"
    assert store.put_image(image) == store.put_image(tagged)
    assert len(files_in(store)) == 1


def test_a_file_keeps_its_own_bytes_and_says_what_they_are(store: MediaStore, tmp_path: Path) -> None:
    data = encoded(picture(), "JPEG")
    (tmp_path / "named.wrongly.png").write_bytes(data)
    ref = store.put_file(tmp_path / "named.wrongly.png")
    assert (ref.kind, ref.media_type) == ("image", "image/jpeg")
    assert store.read(ref) == data


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_every_supported_format_loads_as_rgb(store: MediaStore, kind: str) -> None:
    image = store.load_image(store.put_bytes(encoded(picture(), kind), "image", ""))
    assert (image.mode, image.size) == ("RGB", (32, 24))


def test_transparency_is_white_and_a_rotated_photo_is_upright(store: MediaStore) -> None:
    clear = store.load_image(store.put_image(Image.new("RGBA", (4, 4), (9, 9, 9, 0))))
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = store.put_bytes(encoded(picture(32, 24), "JPEG", exif=exif), "image", "")
    assert store.load_image(photo).size == (24, 32)


def test_sixteen_bits_are_scaled_not_clipped(store: MediaStore) -> None:
    grey = Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.uint16))
    assert np.asarray(store.load_image(store.put_image(grey)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_the_store_pickles_and_another_process_reads_the_same_folder(store: MediaStore) -> None:
    ref = store.put_image(picture())
    code = "import pickle, sys; store, ref = pickle.loads(sys.stdin.buffer.read()); print(store.load_image(ref).size)"
    read = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps((store, ref)), capture_output=True, timeout=60, check=True
    )
    assert read.stdout.strip() == b"(32, 24)"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_a_truncated_image_is_refused_and_not_stored(store: MediaStore, kind: str, share: float) -> None:
    data = encoded(picture(64, 64), kind)
    with pytest.raises(DataError) as raised:
        store.put_bytes(data[: max(16, int(len(data) * share))], "image", "")
    assert raised.value.failure.reason == "media_truncated"
    assert files_in(store) == []


BROKEN = {
    "no bytes": (b"", "media_empty"),
    "zero pixels PNG": (png_of_claimed_size(0, 7), "media_empty"),
    "zero pixels GIF": (b"GIF89a" + bytes(7) + b";", "media_empty"),
    "text": (b"a list of things, not a picture of them", "media_not_an_image"),
    "html": (b"<html><body>404 Not Found</body></html>", "media_not_an_image"),
    "pdf": (b"%PDF-1.7 and more", "media_not_an_image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "media_not_an_image"),
    "bomb": (png_of_claimed_size(60_000, 60_000), "media_too_large"),
    "just over the limit": (png_of_claimed_size(8001, 8000), "media_too_large"),
    "damaged within": (
        (data := encoded(picture(64, 64)))[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :],
        "media_corrupt",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_with_its_reason_and_its_name(store: MediaStore, tmp_path: Path, case: str) -> None:
    data, reason = BROKEN[case]
    path = tmp_path / "broken.png"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"broken\.png") as raised:
        store.put_file(path)
    assert (raised.value.failure.kind, raised.value.failure.reason) == (FailureKind.DATA, reason)
    assert files_in(store) == []


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_image_that_got_into_the_store_is_refused_on_loading(store: MediaStore, case: str) -> None:
    data, reason = BROKEN[case]
    ref = store._write(data, "image", "image/png")
    with pytest.raises(DataError) as raised:
        store.load_image(ref)
    assert raised.value.failure.reason == reason


def test_a_file_that_does_not_exist_or_is_a_folder_is_missing(store: MediaStore, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.png", tmp_path):
        with pytest.raises(DataError) as raised:
            store.put_file(path)
        assert raised.value.failure.reason == "media_missing"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_read_permission_is_unreadable(store: MediaStore, tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(picture()))
    path.chmod(0)
    with pytest.raises(DataError) as raised:
        store.put_file(path)
    assert raised.value.failure.reason == "media_unreadable"


def test_a_name_that_no_file_system_takes_is_unreadable(store: MediaStore, tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        store.put_file(tmp_path / ("x" * 5000))
    assert raised.value.failure.reason == "media_unreadable"


def test_an_image_in_memory_without_pixels_or_with_too_many_is_refused(tmp_path: Path) -> None:
    store = MediaStore(tmp_path / "media", max_pixels=100)
    for image, reason in ((Image.new("RGB", (0, 5)), "media_empty"), (picture(11, 10), "media_too_large")):
        with pytest.raises(DataError) as raised:
            store.put_image(image)
        assert raised.value.failure.reason == reason


def test_too_many_bytes_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "endless.png"
    with path.open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(DataError) as raised:
        MediaStore(tmp_path / "media").put_file(path)
    assert raised.value.failure.reason == "media_too_large"


def test_a_medium_that_was_damaged_in_the_store_is_noticed_and_healed_by_putting_it_again(store: MediaStore) -> None:
    ref = store.put_image(picture())
    store.path(ref).write_bytes(encoded(picture(seed=1)))
    with pytest.raises(DataError) as raised:
        store.load_image(ref)
    assert raised.value.failure.reason == "media_corrupt"
    assert store.put_image(picture()) == ref
    assert store.load_image(ref).size == (32, 24)


def test_a_medium_that_is_not_in_the_store_is_missing(store: MediaStore) -> None:
    with pytest.raises(DataError, match="volume") as raised:
        store.read(MediaRef("image", "0" * 64, "image/png"))
    assert raised.value.failure.reason == "media_missing"


@pytest.mark.parametrize("digest", ["../../etc/passwd", "0" * 63, "G" * 64, ""])
def test_a_reference_can_not_lead_out_of_the_store(store: MediaStore, digest: str) -> None:
    with pytest.raises(DataError, match="named by a SHA-256"):
        store.read(MediaRef("image", digest, "image/png"))


def test_a_store_that_can_not_be_written_is_an_infrastructure_failure(tmp_path: Path) -> None:
    (tmp_path / "media").write_text("a file where the folder should be")
    with pytest.raises(FailureError, match="can't write") as raised:
        MediaStore(tmp_path / "media").put_image(picture())
    assert raised.value.failure.kind is FailureKind.INFRASTRUCTURE


def sound() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(1600))
    return buffer.getvalue()


def test_audio_and_video_are_told_by_their_containers(store: MediaStore, tmp_path: Path) -> None:
    (tmp_path / "speech").write_bytes(sound())
    (tmp_path / "film").write_bytes(b"\x00\x00\x00\x18ftypisom" + bytes(32))
    assert store.put_file(tmp_path / "speech").media_type == "audio/wav"
    assert store.put_file(tmp_path / "film").media_type == "video/mp4"
    assert store.put_file(tmp_path / "film", "audio").kind == "audio"


@pytest.mark.parametrize(("kind", "reason"), [("video", "media_not_a_video"), ("audio", "media_not_audio")])
def test_what_is_neither_audio_nor_video_is_refused(store: MediaStore, kind: str, reason: str) -> None:
    with pytest.raises(DataError) as raised:
        store.put_bytes(encoded(picture()), kind, f"{kind}/mp4")  # type: ignore[arg-type]
    assert raised.value.failure.reason == reason
