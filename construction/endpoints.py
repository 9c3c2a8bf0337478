"""Asks models behind endpoints that speak OpenAI's protocol, many at once, and keeps every answer.

    for question, answer in ask(questions, recipe.models, store):
        ...

vLLM, Ollama, llama.cpp, `transformers serve` and commercial services speak it. The library `openai`
repeats requests that fail, waits as the server says (Retry-After), and knows time-outs.

An answer is kept (store.py) when it arrives, whatever it says. So a question is never paid for
twice, also after a kill.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
import re
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, NamedTuple

import openai
from anyio.from_thread import start_blocking_portal
from openai import AsyncOpenAI
from PIL import Image as PILImage
from tqdm import tqdm

from construction.recipe import Endpoint, Models
from construction.store import Store, key_of
from datasets.images import read_image
from utils.console import LOGGER_NAME
from utils.errors import UserError, suggest

AHEAD = 1000  # questions in memory, so that a caller who is busy for some seconds stops no endpoint
CONNECT = 10.0  # seconds to connect
# Questions in a row that an endpoint fails before it is set aside, or as many as it gets at once.
FAILURES = 3
PICTURE_TOKENS = 4000  # more than models read for a picture of `picture_side`; for the budget
MESSAGE = 300  # characters of a server's message in ours
KIND = "answer"  # in the store
THOUGHTS = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)

logger = logging.getLogger(LOGGER_NAME)


@dataclass(frozen=True)
class Question:
    """One request to a model.

    Attributes:
        pictures: (sha256, file) of the pictures that go with it.
        schema: JSON schema of the answer, for servers that take one.
        number: 0 for the first try, 1 for the next, ...; another number is another question.
        about: anything that the caller wants back with the answer.
    """

    prompt: str
    pictures: tuple[tuple[str, str], ...] = ()
    schema: Mapping[str, Any] | None = None
    number: int = 0
    about: Any = None

    def key(self, model: str, models: Models) -> str:
        """Its key in the store, which has all that the answer depends on."""
        return key_of(
            [sha256 for sha256, _ in self.pictures], self.prompt, self.schema, model,
            models.temperature, models.max_tokens, models.picture_side, self.number,
        )  # fmt: skip


class Answer(NamedTuple):
    """A model's answer.

    Attributes:
        finish_reason: the server's, such as "stop", or "length" for an answer that is cut.
        read, written: tokens.
        cost: in the unit of the endpoint's `price`.
        problem: why there is no answer. Such an answer is not kept.
    """

    text: str
    finish_reason: str = "stop"
    read: int = 0
    written: int = 0
    cost: float = 0.0
    model: str = ""
    url: str = ""
    problem: str = ""

    @property
    def said(self) -> str:
        """The text without the reasoning that some models put before it."""
        return THOUGHTS.sub("", self.text).strip()


class Usage(NamedTuple):
    """What answers of a model took: their number, tokens read and written, and cost."""

    answers: int = 0
    read: int = 0
    written: int = 0
    cost: float = 0.0

    def plus(self, answer: Answer) -> Usage:
        return Usage(
            self.answers + 1,
            self.read + answer.read,
            self.written + answer.written,
            self.cost + answer.cost,
        )

    def __str__(self) -> str:
        return (
            f"{self.answers} answers, {self.read} tokens read, {self.written} written, "
            f"cost {self.cost:.4g}"
        )


def usage(store: Store) -> dict[str, Usage]:
    """By model, what all answers in the store took."""
    of: dict[str, Usage] = {}
    for value in store.values(KIND):
        answer = Answer(*value)
        of[answer.model] = of.get(answer.model, Usage()).plus(answer)
    return of


def kept_answer(question: Question, models: Models, store: Store) -> Answer | None:
    """The answer that is in the store; of the first endpoint's model, if several have answered."""
    for model in dict.fromkeys(endpoint.model for endpoint in models.endpoints):
        value = store.get(KIND, question.key(model, models))
        if value is not None:
            return Answer(*value)
    return None


def ask(
    questions: Iterable[Question],
    models: Models,
    store: Store,
    total: int | None = None,
    what: str = "answers",
) -> Generator[tuple[Question, Answer], None, None]:
    """Ask what is not in the store; yields questions with answers, in the order of their arrival.

    A question that its server fails or refuses while it answers others comes back with a `problem`.
    An endpoint that fails all is set aside with a warning, and the others go on.

    Args:
        total: number of questions, for the progress bar.
        what: is asked for, for the progress bar and the log.

    Raises UserError if no endpoint is left, for a key or a model that a server refuses, and before
    a request that might exceed the budget. Answers that have arrived are kept, then and if the
    caller stops.
    """
    asker = _Asker(models, store)
    done: SimpleQueue[Future[Answer]] = SimpleQueue()
    asked: dict[str, tuple[Future[Answer], list[Question]]] = {}  # by key; the same is asked once
    keys: dict[Future[Answer], str] = {}
    waiting, this_run = 0, Usage()
    # With smoothing=0 the rate is that of the answers since the start, without those kept before.
    bar = tqdm(total=total, desc=what, unit="answer", smoothing=0, disable=None)

    def arrived() -> Iterator[tuple[Question, Answer]]:
        nonlocal waiting, this_run
        future = done.get()
        _, same = asked.pop(keys.pop(future))
        waiting -= len(same)
        answer = future.result()  # raises what the request has raised
        if not answer.problem:
            this_run = this_run.plus(answer)
        bar.set_postfix_str(f"cost {this_run.cost:.4g}", refresh=False)
        bar.update(len(same))
        for question in same:
            yield question, answer

    with bar, start_blocking_portal() as portal:
        try:
            for question in questions:
                if (answer := kept_answer(question, models, store)) is not None:
                    if not bar.disable:  # a disabled bar has no `initial`
                        bar.initial += 1
                    bar.update()
                    yield question, answer
                    continue
                key = question.key("", models)
                if key in asked:
                    asked[key][1].append(question)
                else:
                    future = portal.start_task_soon(asker.answer, question)
                    asked[key], keys[future] = (future, [question]), key
                    future.add_done_callback(done.put)
                waiting += 1
                while waiting >= AHEAD or not done.empty():
                    yield from arrived()
            while asked:
                yield from arrived()
        finally:
            for future in [*keys]:
                future.cancel()
            portal.call(asker.close)
            if this_run.answers:
                logger.info(f"{what}: {this_run}")


class _Server:
    """An endpoint while it is asked.

    Attributes:
        failures: questions in a row that it has failed or refused; `patience` of them are too many.
        takes_schema: False when it has refused `response_format`.
        limit: its name of the limit on tokens.
    """

    def __init__(self, endpoint: Endpoint, models: Models) -> None:
        self.endpoint = endpoint
        self.name = f"{endpoint.url} ({endpoint.model})"
        key = os.environ.get(endpoint.key, "") if endpoint.key else "none"
        if not key:
            raise UserError(
                f"{self.name}: the environment variable {endpoint.key} is not set; it must hold "
                "the API key (models.endpoints.key in the recipe)"
            )
        self.client = AsyncOpenAI(
            base_url=endpoint.url,
            api_key=key,
            timeout=openai.Timeout(endpoint.timeout, connect=min(CONNECT, endpoint.timeout)),
            max_retries=models.retries,
        )
        self.failures, self.down = 0, False
        self.patience = max(FAILURES, endpoint.at_once)
        self.takes_schema, self.limit = True, "max_tokens"
        self.next_start = 0.0

    def cost(self, read: int, written: int) -> float:
        return (read * self.endpoint.price[0] + written * self.endpoint.price[1]) / 1e6

    async def wait_for_turn(self) -> None:
        """Space the requests by `per_minute`."""
        if self.endpoint.per_minute:
            now = time.monotonic()
            start = max(now, self.next_start)
            self.next_start = start + 60 / self.endpoint.per_minute
            await asyncio.sleep(start - now)


class _Asker:
    """Sends questions, each in a task of the event loop, to whichever server is free."""

    def __init__(self, models: Models, store: Store) -> None:
        self.models, self.store = models, store
        self.servers = [_Server(endpoint, models) for endpoint in models.endpoints]
        self.free: asyncio.Queue[_Server] = asyncio.Queue()  # a server for each request it may get
        for server in self.servers:
            for _ in range(server.endpoint.at_once):
                self.free.put_nowait(server)
        self.spent = sum(u.cost for u in usage(store).values()) if models.budget else 0.0
        self.reserved: list[float] = []  # the most that each request in flight can cost
        self.settled = asyncio.Condition()  # when `reserved` has changed
        self.fresh: list[tuple[str, Answer]] = []  # not in the store yet
        self.keeping = asyncio.Lock()

    async def answer(self, question: Question) -> Answer:
        """The answer, when it is in the store. Raises UserError as `ask` does."""
        failures = 0
        while True:
            server = await self.free.get()
            if server.down:
                continue
            try:
                answer = await self._send(server, question)
            except UserError:
                server.down = True  # for the questions that wait for it
                raise
            except _Failed as failed:
                was_down = server.down
                self._count_failure(server, failed)
                if not was_down and server.down and all(s.down for s in self.servers):
                    raise UserError(
                        f"{server.name}: {failed}; start it and run the same command again; "
                        f"{self._kept()} are kept"
                    ) from None
                failures += not server.down
                if failed.final or failures >= 2 + (0 if failed.repeated else self.models.retries):
                    return Answer("", "error", problem=f"no answer: {server.name}: {failed}")
            else:
                server.failures = 0
                return answer
            finally:
                self.free.put_nowait(server)

    async def close(self) -> None:
        """Keep what has arrived, and close the connections."""
        await self._keep()
        for server in self.servers:
            await server.client.close()

    async def _send(self, server: _Server, question: Question) -> Answer:
        """Ask one server, within the budget, and keep its answer. Raises _Failed and UserError."""
        most_read = len(question.prompt.encode()) + len(json.dumps(question.schema))
        most_read += PICTURE_TOKENS * len(question.pictures)
        most = server.cost(most_read, self.models.max_tokens)
        await self._reserve(server, most)
        try:
            await server.wait_for_turn()
            completion = await self._complete(server, question)
            choices = getattr(completion, "choices", None)
            if not choices:
                text = " ".join(str(completion).split())[:MESSAGE]
                reason = f"its answer is no chat completion (should the URL end in /v1?): {text}"
                raise _Failed(reason, repeated=False)
            message, tokens = choices[0].message, completion.usage
            read, written = (tokens.prompt_tokens, tokens.completion_tokens) if tokens else (0, 0)
            answer = Answer(
                message.content or message.refusal or "",
                choices[0].finish_reason or "",
                read,
                written,
                server.cost(read, written) if tokens else most,
                server.endpoint.model,
                server.endpoint.url,
            )
            self.spent += answer.cost
            self.fresh.append((question.key(answer.model, self.models), answer))
            await self._keep()
            return answer
        finally:
            async with self.settled:
                self.reserved.remove(most)
                self.settled.notify_all()

    async def _complete(self, server: _Server, question: Question) -> Any:
        """The server's reply. Raises _Failed if it does not answer, and UserError."""
        try:
            schema = question.schema if server.takes_schema else None
            request = await asyncio.to_thread(self._request, server, question)
            create = server.client.chat.completions.create
            try:
                return await create(**request, **_response_format(schema))
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if "max_completion_tokens" in error.message and "max_tokens" in request:
                    server.limit = "max_completion_tokens"
                    request[server.limit] = request.pop("max_tokens")
                elif not schema:
                    raise
                else:
                    schema = None
            reply = await create(**request, **_response_format(schema))
            if question.schema and not schema and server.takes_schema:
                server.takes_schema = False
                logger.info(f"{server.name}: refuses a JSON schema; asked without one")
            return reply
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            variable = server.endpoint.key
            advice = (
                f"check the API key in the environment variable {variable}"
                if variable
                else "name the environment variable with its API key in models.endpoints.key"
            )
            raise UserError(f"{server.name}: {_reason(error)}; {advice}") from None
        except openai.NotFoundError as error:
            raise UserError(await self._unknown_model(server, error)) from None
        except openai.APIStatusError as error:
            # 408 (time-out), 409 (conflict), 429 (too many requests) and 5xx may pass.
            final = error.status_code < 500 and error.status_code not in (408, 409, 429)
            raise _Failed(_reason(error), final=final) from None
        except openai.APITimeoutError:
            raise _Failed(f"no answer within {server.endpoint.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise _Failed(f"{error.__cause__ or error}", unreachable=True) from None
        except (openai.OpenAIError, ValueError) as error:  # a reply that is not JSON
            raise _Failed(_reason(error), repeated=False) from None

    def _request(self, server: _Server, question: Question) -> dict[str, Any]:
        """The arguments of `create`."""
        content: Any = question.prompt
        if question.pictures:
            urls = [picture_url(file, self.models.picture_side) for _, file in question.pictures]
            content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            content.append({"type": "text", "text": question.prompt})
        return {
            "model": server.endpoint.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": self.models.temperature,
            server.limit: self.models.max_tokens,
        }

    def _count_failure(self, server: _Server, failed: _Failed) -> None:
        """Set a server aside if it is unreachable or fails one question after the other. Raises
        UserError if it refuses one after the other."""
        server.failures += 1
        if failed.final and server.failures >= server.patience:
            server.down = True
            raise UserError(f"{server.name}: refuses all questions: {failed}") from None
        if not server.down and (failed.unreachable or server.failures >= server.patience):
            server.down = True
            if left := sum(not s.down for s in self.servers):
                logger.warning(
                    f"{server.name}: {failed}; it is set aside, {left} of {len(self.servers)} "
                    "endpoints are left"
                )

    async def _reserve(self, server: _Server, most: float) -> None:
        """Wait until this much of the budget is free. Raises UserError if it will never be."""
        async with self.settled:
            while self.models.budget and (
                self.spent + sum(self.reserved) + most > self.models.budget
            ):
                if not self.reserved:
                    raise UserError(
                        f"the budget of {self.models.budget:g} is used up: {self.spent:.4g} are "
                        f"spent, and an answer of {server.name} may cost {most:.2g}; "
                        f"{self._kept()} are kept: raise models.budget in the recipe, and run the "
                        "same command again"
                    )
                await self.settled.wait()
            self.reserved.append(most)

    async def _keep(self) -> None:
        """Put what is fresh into the store: one write for all that arrive during the one before."""
        async with self.keeping:
            if self.fresh:
                batch, self.fresh = self.fresh, []
                await asyncio.shield(asyncio.to_thread(self.store.put, KIND, batch))

    async def _unknown_model(self, server: _Server, error: openai.NotFoundError) -> str:
        """The message for a 404: the model, or else the URL, is wrong."""
        try:
            known = [model.id async for model in server.client.models.list()]
        except (openai.OpenAIError, ValueError, AttributeError, TypeError):
            known = []
        if known and server.endpoint.model not in known:
            return (
                f"{server.endpoint.url}: has no model '{server.endpoint.model}'."
                f"{suggest(server.endpoint.model, known)} It has {', '.join(sorted(known)[:20])}"
            )
        return f"{server.name}: {_reason(error)}; check the URL, which ends in /v1 for most servers"

    def _kept(self) -> str:
        return f"{sum(1 for _ in self.store.values(KIND)) + len(self.fresh)} answers"


class _Failed(Exception):
    """A server gives no answer to a question.

    Args:
        final: it refuses this question, so asking it again is of no use.
        unreachable: there is no connection.
        repeated: the library has repeated the request.
    """

    def __init__(
        self, reason: str, final: bool = False, unreachable: bool = False, repeated: bool = True
    ) -> None:
        super().__init__(reason)
        self.final, self.unreachable, self.repeated = final, unreachable, repeated


def picture_url(file: str, side: int) -> str:
    """A picture as a data URL, a JPEG whose longer side has at most `side` pixels. Raises
    BrokenImage."""
    image = read_image(file)
    if max(image.size) > side:
        image.thumbnail((side, side), PILImage.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=95, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _response_format(schema: Mapping[str, Any] | None) -> dict[str, Any]:
    if not schema:
        return {}
    named = {"name": "answer", "strict": True, "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _reason(error: Exception) -> str:
    """The server's message, on one line."""
    body = getattr(error, "body", None)
    message = (body.get("message") or body.get("detail")) if isinstance(body, dict) else None
    status = getattr(error, "status_code", None)
    text = " ".join(str(message or getattr(error, "message", "") or error).split())[:MESSAGE]
    return f"{status}: {text}" if status and not text.startswith("Error code") else text
