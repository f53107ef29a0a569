"""The visitors' photos, in memory only: until they leave, until they have been idle, or until there is no room."""

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from PIL import Image

from birefnet.serve.errors import TooLargeError
from birefnet.serve.intake import decode_photo
from birefnet.serve.limits import Limits
from birefnet.serve.page.looks import Look
from birefnet.serve.service import ComputedPhoto


PREVIEW_SIDE = 1280
SECONDS_IDLE = 30 * 60
MOST_BYTES = 2**30  # of all sessions' photos
_PREVIEWS = 4  # decoded photos of a session


@dataclass
class PagePhoto:
    """An uploaded photo, still encoded, and the network's output for it."""

    name: str
    encoded: bytes
    model: str
    computed: ComputedPhoto  # without the photo itself, see `keep`

    @classmethod
    def keep(cls, name: str, encoded: bytes, model: str, computed: ComputedPhoto) -> "PagePhoto":
        """Lets go of the decoded photo, which takes ten times the room of the encoded one."""
        logits = computed.outputs["logits"].clone()  # not a view of a whole batch's
        outputs = type(computed.outputs)(logits=logits, target_size=computed.outputs["target_size"])
        return cls(name, encoded, model, ComputedPhoto(computed.remover, outputs))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        height, width = self.computed.outputs["target_size"]
        return width, height

    def with_photo(self, limits: Limits, longest_side: int | None = None) -> ComputedPhoto:
        """The computed photo with its pixels, at full size or as a smaller copy."""
        from birefnet.repository.image_processing_birefnet import read_photo  # imports torch

        photo = decode_photo(self.encoded, limits)
        if longest_side is not None and max(photo.size) > longest_side:
            photo.thumbnail((longest_side, longest_side), Image.Resampling.BILINEAR, reducing_gap=2)
        photo, alpha = read_photo(photo)
        kept = {"photo": photo, "alpha": alpha, "target_size": (photo.height, photo.width)}
        outputs = type(self.computed.outputs)(logits=self.computed.outputs["logits"], **kept)
        return ComputedPhoto(self.computed.remover, outputs)


@dataclass
class Session:
    """One visitor's photos. The token is the secret in the addresses of its pictures."""

    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    photos: list[PagePhoto] = field(default_factory=list)
    selected: int = 0
    look: Look = field(default_factory=Look)
    version: int = 0  # of the look; in the pictures' addresses, so that browsers ask anew
    used: float = field(default_factory=time.monotonic)
    _previews: OrderedDict = field(default_factory=OrderedDict)

    @property
    def bytes(self) -> int:
        return sum(len(photo.encoded) for photo in self.photos)

    def preview(self, photo: PagePhoto, limits: Limits) -> ComputedPhoto:
        """A copy of at most `PREVIEW_SIDE` pixels a side; the last few are kept decoded."""
        preview = self._previews.pop(id(photo), None)
        if preview is None or preview.outputs["logits"] is not photo.computed.outputs["logits"]:
            preview = photo.with_photo(limits, PREVIEW_SIDE)
        self._previews[id(photo)] = preview
        while len(self._previews) > _PREVIEWS:
            self._previews.popitem(last=False)
        return preview


class Sessions:
    """
    All sessions, by the name that the page has for them.

    Args:
        limits: a session's photos are bounded as those of a batch are.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def get(self, name: str) -> Session:
        """The session of a name, new if need be."""
        self._forget_idle()
        session = self._sessions.setdefault(name, Session())
        session.used = time.monotonic()
        self._sessions.move_to_end(name)
        return session

    def find(self, token: str) -> Session | None:
        """The session of a token, if there is one."""
        self._forget_idle()
        for session in self._sessions.values():
            if secrets.compare_digest(session.token.encode(), token.encode()):
                session.used = time.monotonic()
                return session
        return None

    def add(self, session: Session, photo: PagePhoto) -> None:
        """
        Adds a photo to a session. Where all sessions have too many bytes, those that were used least recently go.

        Raises:
            TooLargeError: the session has as many photos or bytes as are allowed.
        """
        if len(session.photos) >= self.limits.batch_photos or session.bytes > self.limits.batch_bytes:
            raise TooLargeError("The page is full; remove the photos before adding others.")
        session.photos.append(photo)
        while sum(other.bytes for other in self._sessions.values()) > MOST_BYTES and len(self._sessions) > 1:
            self._sessions.popitem(last=False)

    def forget(self, name: str) -> None:
        """Drops a session's photos."""
        self._sessions.pop(name, None)

    def _forget_idle(self) -> None:
        oldest = time.monotonic() - SECONDS_IDLE
        for name in [name for name, session in self._sessions.items() if session.used < oldest]:
            del self._sessions[name]
