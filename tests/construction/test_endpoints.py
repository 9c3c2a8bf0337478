"""Models are asked through endpoints that fail in every way; no answer is lost or paid for twice."""

import base64
import io
import os
import signal
import time
from collections import Counter
from multiprocessing import get_context

import openai
import pytest
from PIL import Image as PILImage

from construction.endpoints import Question, _Asker, ask, kept_answer, picture_url, usage
from construction.recipe import Endpoint, Models
from construction.store import Store
from tests.construction.server import ModelServer, default_reply
from utils.errors import UserError, run_main
from utils.interrupt import exit_on_signals


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store") as store:
        yield store


def models_of(*servers, at_once=4, timeout=5.0, per_minute=None, price=(0.0, 0.0), key="", **rest):
    endpoints = tuple(
        Endpoint(
            url=getattr(s, "url", s), model=getattr(s, "model", "tiny"), at_once=at_once,
            timeout=timeout, per_minute=per_minute, price=price, key=key,
        )
        for s in servers
    )  # fmt: skip
    return Models(**{"endpoints": endpoints, "retries": 2, **rest})


def questions(count=12, **rest):
    return [Question(f"question {i}", **rest) for i in range(count)]


def answers(asked, models, store):
    return {question.prompt: answer for question, answer in ask(asked, models, store)}


def expected(asked):
    return {question.prompt: default_reply(question.prompt, [], 0) for question in asked}


def texts(found):
    return {prompt: answer.text for prompt, answer in found.items()}


def test_every_question_is_answered_with_as_many_at_once_as_the_endpoint_may_get(store):
    with ModelServer(delay=0.05) as server:
        found = answers(questions(), models_of(server), store)
    assert texts(found) == expected(questions())
    assert server.most == 4
    assert {(a.finish_reason, a.read, a.written, a.model, a.problem) for a in found.values()} == {
        ("stop", 100, 20, "tiny", "")
    }


def test_a_kept_answer_is_not_asked_for_again_and_another_number_is_another_question(store):
    with ModelServer() as server:
        models = models_of(server)
        first = answers(questions(), models, store)
        assert answers(questions(), models, store) == first
        assert set(server.requests.values()) == {1}
        list(ask(questions(number=1), models, store))
        assert set(server.requests.values()) == {2}
        list(ask(questions(), models.model_copy(update={"temperature": 0.1}), store))
        assert set(server.requests.values()) == {3}
    assert usage(store) == {"tiny": (36, 3600, 720, 0.0)}


def test_the_same_question_is_asked_once_and_both_get_the_answer(store):
    with ModelServer() as server:
        twice = [Question("same", about=i) for i in range(5)]
        found = list(ask(twice, models_of(server), store))
    assert sorted(question.about for question, _ in found) == [0, 1, 2, 3, 4]
    assert len({answer for _, answer in found}) == 1 and server.requests == {"same": 1}


def test_pictures_are_sent_as_jpegs_of_a_limited_size(store, tmp_path):
    file = tmp_path / "large.png"
    PILImage.new("RGB", (300, 900), (200, 30, 30)).save(file)
    with ModelServer() as server:
        asked = [Question("who?", (("hash", str(file)),))]
        models = models_of(server, picture_side=384)
        list(ask(asked, models, store))
    picture, text = server.last["messages"][0]["content"]
    assert text == {"type": "text", "text": "who?"}
    data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
    with PILImage.open(io.BytesIO(data)) as image:
        assert image.format == "JPEG" and image.size == (128, 384)
        assert all(abs(a - b) < 4 for a, b in zip(image.getpixel((64, 200)), (200, 30, 30)))  # noqa: B905
    assert picture_url(str(file), 2000) != picture["image_url"]["url"]


@pytest.mark.parametrize("fault", [429, 500, 503, "reset", "timeout", "malformed", "no_choices"])
def test_a_request_that_fails_once_is_repeated(fault, store):
    def once(prompt, nth):
        return fault if nth == 0 and prompt.endswith(("3", "5")) else None

    with ModelServer(fault=once) as server:
        found = answers(questions(), models_of(server, timeout=0.5), store)
    assert texts(found) == expected(questions())
    assert set(server.answered.values()) == {1}


def test_no_answer_is_lost_when_much_goes_wrong_at_once(store):
    faults = (429, 500, 503, "reset", "malformed", "no_choices", None, None)

    def fault(prompt, nth):
        number = int(prompt.split()[1])
        return faults[(3 * number + 5 * nth) % len(faults)] if nth < 2 else None

    with ModelServer(fault=fault) as one, ModelServer(fault=fault) as two:
        models = models_of(one, two, at_once=8, retries=4)
        found = answers(questions(120), models, store)
        assert texts(found) == expected(questions(120))
        assert max((one.answered + two.answered).values()) == 1
    assert usage(store)["tiny"].answers == 120


def test_a_question_that_always_fails_comes_back_with_the_reason_and_is_not_kept(store):
    with ModelServer(fault=lambda prompt, nth: 500 if prompt.endswith("3") else None) as server:
        models = models_of(server, at_once=1)
        found = answers(questions(6), models, store)
        assert found["question 3"].problem == f"no answer: {server.url} (tiny): 500: fault 500"
        assert kept_answer(questions(6)[3], models, store) is None
        server.fault = lambda prompt, nth: None
        assert texts(answers(questions(6), models, store)) == expected(questions(6))
        assert set(server.answered.values()) == {1}


def test_a_question_that_is_refused_comes_back_with_the_reason(store):
    with ModelServer(fault=lambda prompt, nth: 400 if prompt.endswith("3") else None) as server:
        found = answers(questions(6), models_of(server), store)
        assert found["question 3"].problem == f"no answer: {server.url} (tiny): 400: fault 400"
        assert server.requests["question 3"] == 1  # repeating it would be of no use
    assert len(found) == 6 and usage(store)["tiny"].answers == 5


def test_a_server_that_refuses_everything_ends_it(store):
    with (
        ModelServer(fault=lambda prompt, nth: 400) as server,
        pytest.raises(UserError, match="refuses all questions: 400: fault 400"),
    ):
        answers(questions(), models_of(server, at_once=1), store)
    assert sum(server.requests.values()) == 3


def test_an_answer_that_is_cut_is_kept_too(store):
    with ModelServer(fault=lambda prompt, nth: "cut") as server:
        found = answers(questions(1), models_of(server), store)
        assert found["question 0"].finish_reason == "length"
        assert answers(questions(1), models_of(server), store) == found
    assert server.requests == {"question 0": 1}


@pytest.mark.parametrize("schema", [True, False])
def test_a_server_without_json_schemas_is_asked_without(schema, store):
    with ModelServer(schema=schema) as server:
        asked = questions(schema={"type": "object"})
        assert len(answers(asked, models_of(server, at_once=1), store)) == 12
    assert ("response_format" in server.last) == schema
    assert sum(server.requests.values()) == (12 if schema else 13)  # it is refused once
    if schema:
        assert server.last["response_format"]["json_schema"]["schema"] == {"type": "object"}


def test_a_server_that_has_another_name_for_the_limit_on_tokens_gets_that(store):
    with ModelServer(refuses_max_tokens=True) as server:
        assert len(answers(questions(), models_of(server, at_once=1), store)) == 12
    assert server.last["max_completion_tokens"] == 300 and sum(server.requests.values()) == 13


def test_endpoints_share_the_work_and_answers_of_any_of_their_models_count(store):
    with ModelServer(delay=0.02) as one, ModelServer(delay=0.02, model="other") as two:
        found = answers(questions(40), models_of(one, two), store)
        assert texts(found) == expected(questions(40))
        assert one.requests and two.requests
        assert answers(questions(40), models_of(one, two), store) == found
        assert sum(one.requests.values()) + sum(two.requests.values()) == 40
    assert {name: u.answers for name, u in usage(store).items()} == Counter(
        a.model for a in found.values()
    )


@pytest.mark.parametrize("down", ["closed", 500, "timeout"])
def test_an_endpoint_that_is_down_is_set_aside_with_one_warning_and_the_others_go_on(
    down, store, caplog
):
    with ModelServer() as good, ModelServer(fault=lambda *_: down) as bad:
        if down == "closed":
            bad.__exit__()
        models = models_of(bad, good, timeout=0.2, at_once=4, retries=1)
        assert texts(answers(questions(40), models, store)) == expected(questions(40))
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning.startswith(f"{bad.url} (tiny): ")
    assert warning.endswith("it is set aside, 1 of 2 endpoints are left")


def test_without_any_endpoint_the_error_says_what_to_do_and_answers_are_kept(store):
    def dies(prompt, nth):
        return "reset" if sum(server.requests.values()) > 6 else None

    with ModelServer(fault=dies) as server:
        with pytest.raises(UserError) as error:
            answers(questions(), models_of(server, at_once=1), store)
        assert str(error.value).startswith(f"{server.url} (tiny): ")
        assert str(error.value).endswith(
            "start it and run the same command again; 6 answers are kept"
        )
        server.fault = lambda prompt, nth: None
        assert texts(answers(questions(), models_of(server), store)) == expected(questions())
        assert set(server.answered.values()) == {1}


def test_the_budget_stops_before_a_request_that_could_exceed_it(store):
    price = (10.0, 1000.0)  # an answer costs 0.021, and at most 0.3 + what a prompt may cost
    with ModelServer(delay=0.01) as server:
        with pytest.raises(UserError, match="the budget of 1 is used up") as error:
            answers(questions(100), models_of(server, price=price, budget=1), store)
        spent = usage(store)["tiny"]
        assert 0.6 < spent.cost <= 1 and spent.answers == sum(server.requests.values())
        assert f"{spent.cost:.4g} are spent" in str(error.value)
        assert f"{spent.answers} answers are kept" in str(error.value)
        with pytest.raises(UserError, match="budget"):  # also in the next run
            answers(questions(100), models_of(server, price=price, budget=1), store)
        assert usage(store)["tiny"] == spent
        answers(questions(100), models_of(server, price=price, budget=3), store)
        assert set(server.requests.values()) == {1} and len(server.requests) == 100


def test_requests_keep_to_the_rate(store):
    with ModelServer() as server:
        start = time.monotonic()
        answers(questions(6), models_of(server, per_minute=1200), store)
        assert max(server.times) - start >= 5 * 60 / 1200  # it can never be shorter


def test_a_wrong_key_is_an_error_that_names_its_variable(store, monkeypatch):
    with ModelServer(key="secret") as server:
        monkeypatch.delenv("TEST_KEY", raising=False)
        with pytest.raises(UserError, match="the environment variable TEST_KEY is not set"):
            answers(questions(), models_of(server, key="TEST_KEY"), store)
        with pytest.raises(UserError, match="401: Incorrect API key provided; name the env"):
            answers(questions(), models_of(server), store)
        monkeypatch.setenv("TEST_KEY", "wrong")
        with pytest.raises(UserError, match="401: .*; check the API key in .* TEST_KEY"):
            answers(questions(), models_of(server, key="TEST_KEY"), store)
        monkeypatch.setenv("TEST_KEY", "secret")
        assert len(answers(questions(), models_of(server, key="TEST_KEY"), store)) == 12


def test_an_unknown_model_is_an_error_that_lists_those_of_the_server(store):
    with ModelServer(model="qwen-vl") as server:
        endpoint = Endpoint(url=server.url, model="qwen-v")
        with pytest.raises(
            UserError, match="no model 'qwen-v'. Did you mean 'qwen-vl'. It has qwe"
        ):
            answers(questions(), Models(endpoints=(endpoint,)), store)


def test_a_url_of_something_else_is_an_error_that_names_it(store):
    with ModelServer() as server:
        models = models_of(server.url.removesuffix("/v1"), at_once=1)
        server.fault = lambda prompt, nth: "no_choices"
        with pytest.raises(UserError, match=r"no chat completion \(should the URL end in /v1\?\)"):
            answers(questions(), models, store)


def test_questions_are_read_only_as_far_ahead_as_they_are_needed(store, monkeypatch):
    monkeypatch.setattr("construction.endpoints.AHEAD", 10)
    read = []

    def many():
        for question in questions(60):
            read.append(question)
            yield question

    with ModelServer() as server:
        for number, _ in enumerate(ask(many(), models_of(server), store), 1):
            assert len(read) <= number + 10
    assert len(read) == 60


def test_a_caller_that_stops_keeps_what_has_arrived_and_ends_the_requests(store):
    with ModelServer(delay=0.02) as server:
        asking = ask(questions(100), models_of(server), store)
        got = [next(asking) for _ in range(8)]
        asking.close()
        kept = usage(store)["tiny"].answers
        assert len(got) <= kept <= sum(server.requests.values()) < 100


def test_what_arrives_while_others_are_written_is_kept_when_the_caller_stops(store, monkeypatch):
    put, keep, arrived = store.put, _Asker._keep, []

    def slow_put(kind, values):
        time.sleep(0.3)
        put(kind, values)

    async def counted_keep(asker):
        arrived.append(None)
        await keep(asker)

    monkeypatch.setattr(store, "put", slow_put)
    monkeypatch.setattr(_Asker, "_keep", counted_keep)
    with ModelServer() as server:
        asking = ask(questions(5), models_of(server), store)
        next(asking)  # the first has been written, the next three are, and the fifth arrives
        while len(arrived) < 5:
            time.sleep(0.005)
        asking.close()
    assert usage(store)["tiny"].answers == 5


def ask_60(url, folder):
    """What a command does."""

    def main():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever tests before this one have set
        exit_on_signals()
        with Store(folder) as store:
            list(ask(questions(60), models_of(url), store))

    run_main(main)


@pytest.mark.parametrize(("name", "status"), [("SIGKILL", -9), ("SIGTERM", 75), ("SIGINT", 130)])
def test_after_a_signal_in_the_middle_nothing_that_was_kept_is_asked_again(
    name, status, tmp_path, capfd
):
    with ModelServer(delay=0.02) as server:
        # A forked process has imported everything.
        process = get_context("fork").Process(target=ask_60, args=(server.url, tmp_path))
        process.start()
        while sum(server.answered.values()) < 20 and process.is_alive():
            time.sleep(0.005)
        os.kill(process.pid, getattr(signal, name))
        process.join()
        assert process.exitcode == status and "Traceback" not in capfd.readouterr().err
        time.sleep(0.1)  # the last requests reach their end at the server
        before = Counter(server.requests)
        with Store(tmp_path) as store:
            models = models_of(server)
            kept = [q for q in questions(60) if kept_answer(q, models, store)]
            assert 20 - 8 <= len(kept) < 60
            assert texts(answers(questions(60), models, store)) == expected(questions(60))
        assert all(server.requests[q.prompt] == before[q.prompt] == 1 for q in kept)
