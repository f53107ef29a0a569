"""The page's components and what they do."""

import asyncio
import contextlib
import html
import os
import tempfile
from pathlib import Path

from fastapi import FastAPI
from PIL import ImageColor

from birefnet.hub.variants import VARIANTS
from birefnet.serve.api.common import Server
from birefnet.serve.errors import RequestError, TooBusyError
from birefnet.serve.intake import decode_photo
from birefnet.serve.page.looks import BACKGROUNDS, Look
from birefnet.serve.page.pictures import picture_routes
from birefnet.serve.page.sessions import PagePhoto, Session, Sessions


FOLDER = Path(__file__).parent
TITLE = "BiRefNet: cut subjects out of photos"
FILE_TYPES = [".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif"]
AT_ONCE = 3  # photos of one visitor in the queue
_SECONDS_ON_DISK = 300  # of an upload that no handler has taken


def mount_page(app: FastAPI, server: Server) -> None:
    """Adds the page at `/` and its pictures to the application."""
    # Read by Gradio when it is imported: nothing is reported, and uploads have a folder that goes with the process.
    uploads = tempfile.TemporaryDirectory(prefix="birefnet-uploads-")
    app.state.uploads = uploads
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRADIO_TEMP_DIR": uploads.name,
    }
    import gradio

    sessions = Sessions(server.limits)
    app.include_router(picture_routes(server, sessions))
    keys = server.keys
    blocks = _build(gradio, server, sessions)
    _accept_only_uploads(gradio, blocks)
    gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        auth=(lambda name, key: keys.accept(key)) if keys else None,
        auth_message="Any user name, and an API key as the password." if keys else None,
        max_file_size=server.limits.upload_bytes,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        show_error=False,
        theme=_theme(gradio),
        css=(FOLDER / "page.css").read_text(encoding="utf-8"),
        head=f"<script>{(FOLDER / 'page.js').read_text(encoding='utf-8')}</script>",
    )


def _accept_only_uploads(gradio, blocks) -> None:
    """
    Refuses every path and URL that a client gives in place of an upload of its own.

    In an application that is mounted and not launched, Gradio takes any file of the server's disk. It fetches URLs in
    both cases.
    """
    blocks.has_launched = True  # Gradio then checks that a file is in the folder of uploads

    async def refuse(url: str, *arguments, **options):
        raise gradio.exceptions.InvalidPathError("URLs are not fetched for the page.")

    gradio.processing_utils.async_ssrf_protected_download = refuse


def _theme(gradio):
    """The system's own fonts: the usual themes load theirs from another host."""
    return gradio.themes.Base(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="blue"
    )


def _build(gradio, server: Server, sessions: Sessions):
    """The components. What they do is in [`_Actions`]."""
    names = server.service.shelf.names
    actions = _Actions(gradio, server, sessions)
    with gradio.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(60, _SECONDS_ON_DISK)) as blocks:
        gradio.HTML(f"<h1>{TITLE}</h1>", elem_id="title")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=300):
                files = gradio.File(
                    label="Photos: drop, paste or choose",
                    file_count="multiple",
                    file_types=FILE_TYPES,
                    height=150,
                    elem_id="photos",
                )
                model = gradio.Dropdown(
                    choices=names, value=names[0], label="Variant", info=advice(names[0]), filterable=False
                )
                background = gradio.Radio(
                    choices=[(name.capitalize(), name) for name in BACKGROUNDS],
                    value="transparent",
                    label="Background",
                    elem_id="background",
                )
                colour = gradio.Textbox(
                    value="#ffffff",
                    label="Colour",
                    info="A name such as white, or #rrggbb",
                    visible=False,
                    elem_id="colour",
                )
                picture = gradio.File(
                    label="Background picture", file_types=FILE_TYPES, height=110, visible=False, elem_id="picture"
                )
                blur = gradio.Slider(2, 40, value=12, step=1, label="Blur", visible=False)
                with gradio.Accordion("Edit the mask", open=False):
                    edits = _edit_controls(gradio)
            with gradio.Column(scale=3, min_width=300):
                status = gradio.HTML(_status("Add photos to begin."), elem_id="status")
                gradio.HTML((FOLDER / "viewer.html").read_text(encoding="utf-8"), elem_id="viewer")
                strip = gradio.HTML(
                    "", elem_id="strip", html_template="${value}", js_on_load=_SELECT, apply_default_css=False
                )
                clear = gradio.Button("Remove all photos", size="sm", elem_id="clear")
        view = gradio.JSON(visible="hidden", elem_id="view")
        shown = {"outputs": [status, strip, view]}
        look = [background, colour, blur, *edits]
        hidden = {"show_progress": "hidden", "queue": True, "api_visibility": "private"}

        files.upload(actions.add, [files, model], [files, *shown["outputs"]], concurrency_limit=None, **hidden)
        model.change(actions.change_model, [model], [model, *shown["outputs"]], concurrency_limit=None, **hidden)
        background.change(actions.show_controls, [background], [colour, picture, blur], **hidden)
        picture.upload(actions.set_picture, [picture], [picture, status, view], **hidden)
        strip.click(actions.select, None, [strip, view], **hidden)
        clear.click(actions.clear, None, shown["outputs"], **hidden)
        # One event of all controls: two events could be handled in the wrong order, and the older values would stay.
        # Sliders report while they are dragged. Of the changes during a call, only the last one is followed.
        changes = [control.change for control in look]
        gradio.on(changes, actions.set_look, look, [status, view], trigger_mode="always_last", **hidden)
        view.change(None, [view], None, js="(view) => window.birefnet.show(view)")
        blocks.unload(actions.forget)
    return blocks


# A click on a thumbnail, which has the photo's number, becomes the component's event.
_SELECT = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-index]');
  if (button) trigger('click', {index: Number(button.dataset.index)});
});
"""


def _edit_controls(gradio) -> list:
    """Controls of the matte's edits, in the order of `_Actions.set_look`."""
    return [
        gradio.Slider(0, 1, value=1, step=0.05, label="Sensitivity", info="Lower keeps more of unsure parts"),
        gradio.Slider(0, 1, value=0, step=0.05, label="Threshold", info="Above 0: a hard mask, cut at this value"),
        gradio.Slider(-30, 30, value=0, step=1, label="Grow", info="Pixels of the photo; negative shrinks"),
        gradio.Slider(0, 30, value=0, step=0.5, label="Feather", info="Softer edges, in pixels of the photo"),
        gradio.Checkbox(False, label="Keep the background instead"),
        gradio.Checkbox(True, label="Remove the old background's colour from edges"),
    ]


def advice(name: str) -> str:
    """One line about when to take a model."""
    if name in VARIANTS:
        return VARIANTS[name].good_for
    return "The weights that come with the package: small and fast." if name == "embedded" else "Your own model."


class _Actions:
    """What the components do. Each visitor's photos and look are in a session."""

    def __init__(self, gradio, server: Server, sessions: Sessions):
        self.gradio, self.server, self.sessions = gradio, server, sessions
        request = gradio.Request  # Gradio passes the request to arguments that are annotated with it
        for name in ("add", "change_model", "set_look", "set_picture", "clear", "forget", "select"):
            getattr(type(self), name).__annotations__["request"] = request
        type(self).select.__annotations__["event"] = gradio.EventData

    async def add(self, paths: list[str], model: str, request):
        """Takes uploaded files into the session and cuts them out; shows each as soon as it is done."""
        session = self.sessions.get(request.session_hash)
        uploads = [(os.path.basename(path), _take(path)) for path in paths or []]
        first = len(session.photos)
        async for done, errors in self._cut_out(session, uploads, model):
            if first < len(session.photos) and session.selected < first:
                session.selected = first
            text = _progress(done, len(uploads), errors)
            yield self.gradio.update(value=None), _status(text, errors), _strip(session), _view(session)

    async def change_model(self, model: str, request):
        """Runs another model on the session's photos."""
        session = self.sessions.get(request.session_hash)
        described = self.gradio.update(info=advice(model))
        photos, session.photos = session.photos, []
        selected = session.selected
        if not photos:
            yield described, _status("Add photos to begin."), "", None
        uploads = [(photo.name, photo.encoded) for photo in photos]
        async for done, errors in self._cut_out(session, uploads, model):
            session.selected = min(selected, max(0, len(session.photos) - 1))
            yield described, _status(_progress(done, len(uploads), errors), errors), _strip(session), _view(session)

    async def _cut_out(self, session: Session, uploads: list[tuple[str, bytes]], model: str):
        """Yields the number of photos that are done, and the errors by name, in the order of the uploads."""
        errors: dict[str, str] = {}
        yield 0, errors
        free = asyncio.Semaphore(AT_ONCE)
        tasks = [asyncio.create_task(self._compute(name, encoded, model, free)) for name, encoded in uploads]
        try:
            for done, ((name, _), task) in enumerate(zip(uploads, tasks, strict=True), start=1):
                try:
                    self.sessions.add(session, await task)
                    session.version += 1
                except RequestError as error:
                    errors[name] = str(error)
                yield done, errors
        finally:  # also when the visitor leaves
            for task in tasks:
                task.cancel()

    async def _compute(self, name: str, encoded: bytes, model: str, free: asyncio.Semaphore) -> PagePhoto:
        service = self.server.service
        async with free:
            while True:
                with contextlib.suppress(_FullError), _place(service):
                    computed = await service.run(encoded, service.shelf.resolve(model), lambda computed: computed)
                    return PagePhoto.keep(name, encoded, model, computed)
                await asyncio.sleep(0.5)  # a page waits where a client of the API would come again

    def show_controls(self, background: str):
        """Shows the control that belongs to a kind of background."""
        return [self.gradio.update(visible=background == kind) for kind in ("colour", "picture", "blur")]

    def set_look(self, background, colour, blur, sensitivity, threshold, grow, feather, invert, refine, request):
        """Another background or edit: the preview follows from the kept output of the network."""
        session = self.sessions.get(request.session_hash)
        try:
            rgb = _colour(colour)
        except ValueError:
            words = f"{str(colour)[:40]!r} is not a colour. Write a name such as white, or #rrggbb."
            return _status("The background was not changed.", {"Colour": words}), _view(session)
        edits = {"sensitivity": sensitivity, "grow": int(grow), "feather": feather, "invert": invert}
        if threshold > 0:
            edits["threshold"] = threshold
        session.look = Look(background, rgb, session.look.picture, blur, edits, refine)
        session.version += 1
        return _status(_count(session)), _view(session)

    async def set_picture(self, path: str, request):
        """A background picture, which stays with the session."""
        session = self.sessions.get(request.session_hash)
        encoded = _take(path)
        try:
            picture = await asyncio.to_thread(lambda: decode_photo(encoded, self.server.limits).convert("RGB"))
        except RequestError as error:
            return (
                None,
                _status("The background was not changed.", {os.path.basename(path): str(error)}),
                _view(session),
            )
        picture.thumbnail((4096, 4096))
        look = session.look
        session.look = Look("picture", look.colour, picture, look.blur, look.edits, look.refine_foreground)
        session.version += 1
        return None, _status(_count(session)), _view(session)

    def select(self, event, request):
        """Shows the photo whose thumbnail was chosen."""
        session = self.sessions.get(request.session_hash)
        session.selected = max(0, min(int(event.index), len(session.photos) - 1))
        return _strip(session), _view(session)

    def clear(self, request):
        """Forgets the session's photos."""
        self.sessions.forget(request.session_hash)
        return _status("All photos are removed."), "", None

    def forget(self, request) -> None:
        """The visitor has left."""
        self.sessions.forget(request.session_hash)


class _FullError(Exception):
    """There is no place at the moment."""


@contextlib.contextmanager
def _place(service):
    """A place in the queue, as the API's requests have it."""
    try:
        service.check_place()
    except TooBusyError as error:
        if error.status == 429:
            raise _FullError from None
        raise
    with service.place():
        yield


def _take(path: str) -> bytes:
    """An upload's contents; the file is removed, since from now on the photo is in memory only."""
    upload = Path(path).resolve()
    if not upload.is_relative_to(Path(os.environ["GRADIO_TEMP_DIR"]).resolve()):  # Gradio has checked this as well
        raise RequestError("The file is not an upload.", "invalid_photo")
    try:
        return upload.read_bytes()
    finally:
        upload.unlink(missing_ok=True)


def _colour(text: str) -> tuple[int, int, int]:
    for candidate in (text.strip(), f"#{text.strip()}"):
        with contextlib.suppress(ValueError):
            return ImageColor.getrgb(candidate)[:3]
    raise ValueError


def _progress(done: int, total: int, errors: dict) -> str:
    if done < total:
        return f"Photo {done + 1} of {total} …"
    good = total - len(errors)
    return f"{good} of {total} photos cut out." if total > 1 else ("Done." if good else "Nothing was cut out.")


def _count(session: Session) -> str:
    if len(session.photos) > 1:
        return f"{len(session.photos)} photos."
    return "Done." if session.photos else "Add photos to begin."


def _status(text: str, errors: dict[str, str] | None = None) -> str:
    """What a screen reader announces, and errors in words."""
    problems = "".join(
        f"<li><strong>{html.escape(name)}</strong>: {html.escape(words)}</li>"
        for name, words in (errors or {}).items()
    )
    listed = f'<ul role="alert">{problems}</ul>' if problems else ""
    return f'<p role="status">{html.escape(text)}</p>{listed}'


def _strip(session: Session) -> str:
    """Thumbnails to choose from, where there are several photos."""
    if len(session.photos) < 2:
        return ""
    buttons = []
    for index, photo in enumerate(session.photos):
        name, current = html.escape(photo.name, quote=True), "true" if index == session.selected else "false"
        source = f"/page/{session.token}/{index}/thumbnail.webp?{photo.model}"
        buttons.append(
            f'<button type="button" data-index="{index}" aria-pressed="{current}" title="{name}">'
            f'<img src="{html.escape(source)}" alt="{name}"></button>'
        )
    return f'<div role="group" aria-label="Photos">{"".join(buttons)}</div>'


def _view(session: Session) -> dict | None:
    """What the viewer shows."""
    if not session.photos:
        return None
    session.selected = min(session.selected, len(session.photos) - 1)
    photo = session.photos[session.selected]
    address = f"/page/{session.token}/{session.selected}"
    return {
        "name": photo.name,
        "width": photo.size[0],
        "height": photo.size[1],
        "address": address,
        "version": f"{session.version}-{photo.model}-{session.selected}",
        "archive": f"/page/{session.token}/cutouts.zip" if len(session.photos) > 1 else None,
        "count": len(session.photos),
    }
