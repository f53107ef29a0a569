"""Bodies of requests as fields and files, whatever their encoding: multipart, URL-encoded or JSON."""

import json
from dataclasses import dataclass, field

from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request

from birefnet.serve.errors import RequestError
from birefnet.serve.guard import ClientLeftError


MOST_FIELDS = 50


@dataclass
class Form:
    """A request's fields and its files by field name, in their order."""

    values: dict = field(default_factory=dict)
    files: dict[str, list[UploadFile]] = field(default_factory=dict)

    def parse(self, model: type[BaseModel]) -> BaseModel:
        """
        The fields as a model of them. An empty field counts as absent.

        Raises:
            RequestError: a field is unknown or its value not allowed; the message names it.
        """
        try:
            return model.model_validate(
                {name: value for name, value in self.values.items() if value not in ("", None)}
            )
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            name = ".".join(map(str, first["loc"])) or "request"
            raise RequestError(f"{name}: {first['msg']}.", "invalid_parameters") from None

    def single(self, name: str) -> UploadFile | None:
        """
        The file of a field, if there is one.

        Raises:
            RequestError: the field has several files.
        """
        files = self.uploads(name)
        if len(files) > 1:
            raise RequestError(f"{name}: give one file.", "multiple_sources")
        return files[0] if files else None

    def uploads(self, *names: str) -> list[UploadFile]:
        """The files of these fields."""
        return [file for name in names for file in self.files.get(name, [])]


async def read_form(request: Request, most_files: int) -> Form:
    """
    Reads a request's body.

    Raises:
        RequestError: it is malformed, of another kind, or has too many parts.
        ClientLeftError: the client hung up.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "application/json":
            return _from_json(await request.body())
        if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
            most_text = 40 * 2**20  # a field may be a photo in base64; the body's own limit is checked before
            return _sorted(await request.form(max_files=most_files, max_fields=MOST_FIELDS, max_part_size=most_text))
    except (MultiPartException, HTTPException) as error:
        reason = getattr(error, "message", None) or getattr(error, "detail", "")
        raise RequestError(f"The form is malformed: {reason}", "invalid_form") from None
    except (ValueError, RecursionError):
        raise RequestError("The body is malformed.", "invalid_form") from None
    except ClientDisconnect:
        raise ClientLeftError from None
    raise RequestError(
        "Content-Type has to be multipart/form-data, application/x-www-form-urlencoded or application/json.",
        "invalid_form",
        415,
    )


def _from_json(body: bytes) -> Form:
    values = json.loads(body)
    if not isinstance(values, dict):
        raise RequestError("The JSON has to be an object.", "invalid_form")
    return Form(values)


def _sorted(parts) -> Form:
    form = Form()
    for name, value in parts.multi_items():
        if isinstance(value, UploadFile):
            form.files.setdefault(name, []).append(value)
        else:
            form.values[name] = value
    return form
