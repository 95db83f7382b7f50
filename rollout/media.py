"""Media by content hash: stored once, carried everywhere as a reference, decoded only where pixels are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MediaKind = Literal["image", "video", "audio"]


@dataclass(frozen=True, slots=True)
class MediaRef:
    """A medium in the store.

    Attributes:
        kind: image, video or audio.
        sha256: hex digest of the stored bytes, which is also the name under which they are stored.
        media_type: MIME type of the stored bytes ("image/png").
    """

    kind: MediaKind
    sha256: str
    media_type: str
