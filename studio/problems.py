"""What goes wrong in a request, told as RFC 9457 has it; `problems` are shaped as the trainer's."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

Record = dict[str, Any]

MOST_SHOWN = 200  # characters of a wrong value
log = logging.getLogger("studio")


class Problem(HTTPException):
    """A request that is not done: why, as a stable code and as words."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        problems: Sequence[Mapping[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Take what is told."""
        super().__init__(status, detail, headers)
        self.code, self.problems = code, [dict(problem) for problem in problems]

    @property
    def title(self) -> str:
        """Say the code in words."""
        return self.code.replace("_", " ").capitalize()

    @property
    def status(self) -> int:
        """Name the status as the document does."""
        return self.status_code

    def document(self, instance: str) -> Record:
        """Write it as RFC 9457 has it."""
        return {
            "type": f"/problems/{self.code.replace('_', '-')}",
            "title": self.title,
            "status": self.status_code,
            "detail": self.detail,
            "instance": instance,
            "code": self.code,
            "problems": self.problems,
        }


def problem_at(path: str, expected: str, found: object, hint: str = "") -> dict[str, str]:
    """Say what is wrong with one value, as the trainer does."""
    return {"path": path, "expected": expected, "found": show(found), "hint": hint}


def show(value: object) -> str:
    """Write a wrong value so that it can be recognised, and no longer."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 1]}…"


def invalid(*problems: Mapping[str, str], code: str = "request_invalid") -> Problem:
    """Refuse a request for the values it holds."""
    return Problem(422, code, sentence(problems), problems)


def respond(request: Request, problem: Problem) -> Response:
    """Answer a program with a document, and a person with a page."""
    if "text/html" in request.headers.get("accept", ""):
        from studio.views import render

        values = {"bare": problem.status in (401, 421), "problem": problem}
        page = render(request, "problem.html", status_code=problem.status, **values)
        page.headers.update(problem.headers or {})
        return page
    return JSONResponse(
        problem.document(request.url.path),
        problem.status_code,
        problem.headers,
        "application/problem+json",
    )


def tell_problems(app: FastAPI) -> None:
    """Give everything that goes wrong in requests the same shape."""

    async def told(request: Request, error: Exception) -> Response:
        return respond(request, as_problem(error))

    for kind in (HTTPException, RequestValidationError):
        app.add_exception_handler(kind, told)


def as_problem(error: Exception) -> Problem:
    """Make a problem of what the framework, or a mistake of ours, raises."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestValidationError):
        return invalid(*(problem_of(each) for each in error.errors()))
    if isinstance(error, HTTPException):
        code = HTTPStatus(error.status_code).name.lower()
        return Problem(error.status_code, code, str(error.detail), headers=error.headers)
    number = secrets.token_hex(8)
    log.error("Error %s", number, exc_info=error)
    return Problem(
        500, "internal_error", f"Something went wrong here. Look for {number} in the log."
    )


def sentence(problems: Sequence[Mapping[str, str]]) -> str:
    """Say the first of some problems, and how many there are."""
    first = problems[0]
    said = f"{first['path']}: expected {first['expected']}, got {first['found']}"
    return said if len(problems) == 1 else f"{len(problems)} problems, the first is {said}"


def problem_of(error: Mapping[str, Any]) -> dict[str, str]:
    """Say what pydantic found in our own words."""
    path = ".".join(str(part) for part in error["loc"][1:]) or "body"
    if error["type"] == "missing":
        return problem_at(path, "a value", "nothing")
    if error["type"] == "extra_forbidden":
        return problem_at(path, "a known key", "an unknown one")
    expected = str(error["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    return problem_at(path, expected, error["input"])


# --- Bodies ---


def read_json(body: bytes) -> Any:
    """Read JSON as the trainer reads its config: strictly, so that both understand the same."""
    try:
        document = json.loads(
            body.decode("utf-8-sig"),
            object_pairs_hook=once_each,
            parse_constant=refuse_constant,
            parse_float=finite,
        )
        json.dumps(document, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        said = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise Problem(400, "json_invalid", f"The body is no JSON: {said}") from error
    return document


def once_each(pairs: list[tuple[str, Any]]) -> Record:
    """Refuse a key that is given twice, as nobody knows which of the values is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the key {show(twice)} is there twice")
    return found


def refuse_constant(text: str) -> Any:
    """Refuse NaN and Infinity, which are no JSON."""
    raise ValueError(f"{text} is no number")


def finite(text: str) -> float:
    """Refuse a number beyond all bounds."""
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{show(text)} is beyond all bounds")
    return number


class StrictRequest(Request):
    """A request whose JSON is read strictly."""

    async def json(self) -> Any:
        """Read the body."""
        if not hasattr(self, "_json"):  # as the class above keeps it
            self._json = read_json(await self.body())
        return self._json


class StrictRoute(APIRoute):
    """A route whose body, if it takes one, is JSON and says so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Check the content type first: a form of another site cannot send this one."""
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            request = StrictRequest(request.scope, request.receive)
            if self.body_field and await request.body():
                kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                if kind != "application/json":
                    raise Problem(
                        415,
                        "unsupported_media_type",
                        f"Expected Content-Type application/json, got {show(kind) or 'none'}",
                    )
            return await handle(request)

        return strictly
