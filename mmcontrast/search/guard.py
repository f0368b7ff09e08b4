"""Guard the page's server: refuse foreign hosts and sites, restrict what browsers do with answers, and limit decoding."""

import base64
import hashlib
import ipaddress
import re
import socket
from pathlib import Path

import soundfile
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmcontrast.embedder import Embedder
from mmcontrast.errors import UserError
from mmcontrast.modalities import AudioModality, DecodeError, ImageModality, Modality
from mmcontrast.modalities.audio import UNKNOWN, open_sound
from mmcontrast.modalities.library import LibraryImages

PAGE = Path(__file__).with_name("page.html")
MAX_PIXELS = 50_000_000  # of a picture that a client sends
MAX_SECONDS, MAX_VALUES = 120, 2**25  # of a sound; frames × channels
HEADERS = {
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}
NOTHING = "default-src 'none'; sandbox; frame-ancestors 'none'"  # the policy of every response but the page


class Guard:
    """ASGI middleware that answers only requests which name this server as their host (others: DNS rebinding) and come from its
    own page, if the browser says so, and adds headers that keep a browser from interpreting responses as anything else.

    Args:
        host: where the server listens. At 0.0.0.0 or :: any address and this machine's name are its own, too.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app = app
        self.hosts = {"localhost", "127.0.0.1", "::1", host.lower()}
        self.anywhere = host in ("0.0.0.0", "::")
        if self.anywhere:
            self.hosts |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in {**HEADERS, "content-security-policy": NOTHING}.items():
                    headers.setdefault(name, value)
            await send(message)

        reason = self.refused(Headers(scope=scope), scope["path"])
        await (JSONResponse({"error": reason}, 403) if reason else self.app)(scope, receive, send_with_headers)

    def refused(self, headers: Headers, path: str) -> str:
        """Return why a request is refused; empty if it is not."""
        host, origin = headers.get("host", ""), headers.get("origin")
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        if name not in self.hosts and not (self.anywhere and _is_address(name)):
            return f"this server is not {name[:80]!r}: use the address that it printed"
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return "a request of another site"
        if path != "/" and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "a request of another site"
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def page_and_policy() -> tuple[str, str]:
    """Return the page, and a policy under which only its own script and style run, and nothing is loaded from elsewhere."""
    page = PAGE.read_text(encoding="utf-8")

    def hash_source(tag: str) -> str:
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    sources = f"script-src {hash_source('script')}; style-src {hash_source('style')}; img-src 'self' blob: data:"
    sources += "; media-src 'self' blob:; connect-src 'self'"
    return page, f"default-src 'none'; {sources}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def narrow_limits(embedder: Embedder) -> None:
    """Tighten the limits of decoding, for files from strangers."""
    modalities: list[Modality] = [embedder.model.modality(field) for field in embedder.model.modalities]
    modalities += [modality.fast for modality in modalities if isinstance(modality, LibraryImages) and modality.fast]
    for modality in modalities:
        if isinstance(modality, ImageModality):
            modality.max_pixels = min(modality.max_pixels, MAX_PIXELS)
        if isinstance(modality, AudioModality):
            modality.max_seconds = min(modality.max_seconds, MAX_SECONDS)
            modality.max_values = min(modality.max_values, MAX_VALUES)


def refuse_long_sound(data: bytes) -> None:
    """Check the decoded size of a sound.

    Raises:
        UserError: for a sound that would be too large when it is decoded, or cannot be.
    """
    try:
        with open_sound(data) as file:
            values = file.frames * file.channels
    except DecodeError as error:
        raise UserError(f"the sound: {error}") from error
    except (soundfile.SoundFileError, ValueError) as error:
        raise UserError(f"the sound: not a sound that can be decoded ({error})") from error
    if MAX_VALUES < values < UNKNOWN:  # sounds of unknown length are counted while they are decoded
        raise UserError(f"the sound: {values} values, more than {MAX_VALUES}: give a shorter one")
