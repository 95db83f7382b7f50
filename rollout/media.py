"""The media store: media by content hash, stored once, passed by reference, decoded only where pixels are needed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageOps, UnidentifiedImageError

from rollout.failures import DataError, Failure, FailureError, FailureKind

MediaKind = Literal["image", "video", "audio"]

# Formats that Pillow decodes by itself. EPS, PDF and the like start other programs on untrusted bytes.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_IMAGE_MAGICS = (_PNG_MAGIC, b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\x00", b"MM\x00*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class MediaRef:
    """A reference to a medium in the store.

    Attributes:
        kind: image, video or audio.
        sha256: hex digest of the stored bytes, which is also the name under which they are stored.
        media_type: MIME type of the stored bytes ("image/png").
    """

    kind: MediaKind
    sha256: str
    media_type: str


@dataclass(frozen=True, slots=True)
class MediaStore:
    """A folder of media named by the SHA-256 of their bytes: ``folder/ab/abcdef…``.

    It holds no open files, so it pickles: actors on other nodes open the same folder, which must then be on a volume
    that all hosts share. Any number of processes may put and read at once: a file appears whole or not at all, and
    putting the same bytes again changes nothing.

    Every method that takes or gives media raises :class:`DataError` where the medium is at fault, with one of the
    reasons ``media_missing``, ``media_unreadable``, ``media_empty``, ``media_too_large``, ``media_truncated``,
    ``media_corrupt``, ``media_not_an_image``, ``media_not_a_video``, ``media_not_audio``, and :class:`FailureError`
    of kind infrastructure where the store can't be written (``media_store_write_failed``).

    Attributes:
        folder: where the media lie; made on the first put.
        max_pixels: an image with more is refused before it is decoded (decompression bombs).
        max_bytes: a medium with more is refused before it is read.
    """

    folder: Path
    max_pixels: int = 64_000_000
    max_bytes: int = 512 * 2**20

    def put_image(self, image: Image.Image) -> MediaRef:
        """Store an image as an RGB PNG without metadata. Equal pixels give an equal reference (in one Pillow build)."""
        if image.width == 0 or image.height == 0:
            raise DataError("media_empty", f"an image of {image.width}x{image.height} pixels is empty")
        self._check_pixels(image.width, image.height, "image")
        try:
            rgb = _to_rgb(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise _decoding_error("image", error) from error
        rgb.info = {}
        buffer = io.BytesIO()
        rgb.save(buffer, format="PNG", compress_level=6)
        return self._write(buffer.getvalue(), "image", "image/png")

    def put_bytes(self, data: bytes, kind: MediaKind, media_type: str, *, source: str = "medium") -> MediaRef:
        """Check encoded bytes and store them unchanged.

        Images are decoded whole to check them; their media type is taken from the bytes. Of video and audio only the
        container's signature is checked.

        Args:
            data: the encoded medium.
            kind: image, video or audio.
            media_type: MIME type; ignored for images.
            source: what messages call it (a path).
        """
        self._check_size(len(data), source)
        if kind == "image":
            _, media_type = self._decode(data, source)
        elif not any(found == kind for found, _ in _signatures(data)):
            reason = "media_not_a_video" if kind == "video" else "media_not_audio"
            raise DataError(reason, f"{source} starts with {data[:12]!r}, which is no known {kind} container")
        return self._write(data, kind, media_type)

    def put_file(self, path: Path, kind: MediaKind | None = None) -> MediaRef:
        """Store a file. Without `kind` its first bytes decide; a file that no signature matches is read as an image."""
        source = str(path)
        try:
            if not path.is_file():
                what = "is a folder or a device; a medium must be a file" if path.exists() else "does not exist"
                raise DataError("media_missing", f"{source} {what}")
            self._check_size(path.stat().st_size, source)
            data = path.read_bytes()
        except (OSError, ValueError) as error:
            raise DataError("media_unreadable", f"{source} can't be read: {error}") from error
        matches = [(found, name) for found, name in _signatures(data) if kind is None or found == kind]
        found_kind, media_type = matches[0] if matches else (kind or "image", "application/octet-stream")
        return self.put_bytes(data, found_kind, media_type, source=source)

    def path(self, ref: MediaRef) -> Path:
        """Where the bytes of `ref` are stored, if they are."""
        if not _SHA256.fullmatch(ref.sha256):
            raise DataError("media_corrupt", f"a medium is named by a SHA-256 in hex, which {ref.sha256!r:.80} is not")
        return self.folder / ref.sha256[:2] / ref.sha256

    def read(self, ref: MediaRef) -> bytes:
        """The stored bytes, checked against their digest."""
        path = self.path(ref)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise DataError(
                "media_missing",
                f"{ref.kind} {ref.sha256[:12]} is not in the media store {self.folder}. With several hosts, "
                "the store must be on a volume that all of them share",
            ) from error
        except OSError as error:
            raise DataError("media_unreadable", f"{path} can't be read: {error}") from error
        if hashlib.sha256(data).hexdigest() != ref.sha256:
            problem = f"{path} is damaged: its bytes don't have the SHA-256 in its name. Store the medium again"
            raise DataError("media_corrupt", problem)
        return data

    def load_image(self, ref: MediaRef) -> Image.Image:
        """The decoded image: RGB, upright (EXIF orientation applied), transparency on white."""
        image, _ = self._decode(self.read(ref), f"image {ref.sha256[:12]}")
        try:
            return _to_rgb(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise _decoding_error(f"image {ref.sha256[:12]}", error) from error

    def _check_size(self, size_bytes: int, source: str) -> None:
        if size_bytes == 0:
            raise DataError("media_empty", f"{source} has no bytes")
        if size_bytes > self.max_bytes:
            raise DataError(
                "media_too_large", f"{source} has {size_bytes:,} bytes; the media store takes up to {self.max_bytes:,}"
            )

    def _check_pixels(self, width: int, height: int, source: str) -> None:
        if width * height > self.max_pixels:
            raise DataError(
                "media_too_large",
                f"{source} has {width}x{height} pixels; the media store takes up to {self.max_pixels:,}. Scale it down",
            )

    def _decode(self, data: bytes, source: str) -> tuple[Image.Image, str]:
        """The decoded image and its media type."""
        self._check_size(len(data), source)
        try:
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            self._check_pixels(image.width, image.height, source)
            image.load()
        except UnidentifiedImageError as error:
            raise _unidentified(data, source) from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError("media_too_large", f"{source}: {error}") from error
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, MemoryError) as error:
            if _ends_early(data):
                raise DataError("media_truncated", f"{source} is cut off after {len(data)} bytes") from error
            raise _decoding_error(source, error) from error
        return image, Image.MIME.get(image.format or "", "application/octet-stream")

    def _write(self, data: bytes, kind: MediaKind, media_type: str) -> MediaRef:
        ref = MediaRef(kind, hashlib.sha256(data).hexdigest(), media_type)
        path = self.path(ref)
        try:
            # Comparing rather than trusting the name heals a file that was damaged after it was written.
            if path.is_file() and path.read_bytes() == data:
                return ref
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, data)
        except OSError as error:
            raise FailureError(
                Failure(
                    FailureKind.INFRASTRUCTURE,
                    "media_store_write_failed",
                    f"the media store can't write {path} ({len(data):,} bytes): {error.strerror or error}. "
                    "Free space or choose another folder",
                )
            ) from error
        return ref


def _replace(path: Path, data: bytes) -> None:
    """Write beside `path` and rename, so that a reader sees the whole file or none."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".putting-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16 bits to 255 instead of scaling them.
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _unidentified(data: bytes, source: str) -> DataError:
    """Why Pillow found no decoder: a side of zero pixels, a header that is cut off, or no image at all."""
    if data.startswith(_PNG_MAGIC) and len(data) >= 24 and 0 in struct.unpack(">II", data[16:24]):
        return DataError("media_empty", f"{source} is a PNG with a side of zero pixels")
    if data.startswith((b"GIF87a", b"GIF89a")) and len(data) >= 10 and 0 in struct.unpack("<HH", data[6:10]):
        return DataError("media_empty", f"{source} is a GIF with a side of zero pixels")
    if data.startswith(_IMAGE_MAGICS) or (_ends_early(data) and data[8:12] == b"WEBP"):
        return DataError(
            "media_truncated", f"{source} starts like an image but its header is cut off after {len(data)} bytes"
        )
    return DataError(
        "media_not_an_image",
        f"{source} is not an image in any of {', '.join(IMAGE_FORMATS)} (it starts with {data[:12]!r})",
    )


def _ends_early(data: bytes) -> bool:
    """Whether a RIFF file (WebP) has fewer bytes than its header says, which Pillow doesn't report."""
    return data[:4] == b"RIFF" and len(data) < 8 + int.from_bytes(data[4:8], "little")


def _decoding_error(source: str, error: BaseException) -> DataError:
    reason = "media_truncated" if any(word in str(error).lower() for word in ("truncated", "eof")) else "media_corrupt"
    return DataError(reason, f"{source} can't be decoded: {error}")


def _signatures(data: bytes) -> tuple[tuple[MediaKind, str], ...]:
    """The kinds and media types that the first bytes allow: a container such as MP4 or Ogg holds video or audio."""
    head = data[:16]
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return (("audio", "audio/wav"),)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return (("video", "video/x-msvideo"),)
    if head[4:8] == b"ftyp":
        if head[8:11] == b"M4A":
            return (("audio", "audio/mp4"),)
        return (("video", "video/mp4"), ("audio", "audio/mp4"))
    if head.startswith(b"\x1aE\xdf\xa3"):
        return (("video", "video/webm"), ("audio", "audio/webm"))
    if head.startswith(b"OggS"):
        return (("audio", "audio/ogg"), ("video", "video/ogg"))
    if head.startswith(b"fLaC"):
        return (("audio", "audio/flac"),)
    if head.startswith(b"ID3") or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE6 in (0xE2, 0xE4, 0xE6)):
        return (("audio", "audio/mpeg"),)
    return ()
