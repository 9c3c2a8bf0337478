"""Labels come from the first origin that has one; those of a person are voted."""

import json
from collections import Counter

import pytest

from construction.attributes import Labeller, check_recipe, parse_answer, vote
from construction.captions import read_prompt
from construction.clip import load_encoder
from construction.recipe import Clip
from construction.records import Label
from construction.store import Store
from datasets import tbagpr
from tests.construction.helpers import candidate, recipe
from tests.construction.server import ModelServer
from tests.helpers import ROOT
from utils.attributes import read_attributes
from utils.errors import UserError

ATTRIBUTES = read_attributes(ROOT / "configs/attributes.yaml")
ALL = {name: {"default": classes[0]} for name, classes in ((a.name, a.classes) for a in ATTRIBUTES)}
PROMPT = read_prompt("attributes", ROOT)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store") as store:
        yield store


def labels_of(rules, candidates, store, **parts):
    labeller = Labeller(recipe(attributes=rules, **parts), ATTRIBUTES, store, PROMPT)
    labeller.prepare(lambda: candidates)
    return labeller.label(candidates)


def endpoints(server):
    return {"models": {"endpoints": [{"url": server.url, "model": "tiny"}], "retries": 0}}


def test_the_first_origin_that_has_a_label_wins(tmp_path, store):
    columns = {"young": {2: "young"}, "old": {"2": "old"}}
    rules = {
        "age": {"origins": ["annotation"], "columns": columns, "default": "adult"},
        "light": {"origins": ["brightness"], "dim_below": 80},
        "altitude": {"origins": ["view"], "default": "level"},
    }
    many = [
        candidate(tmp_path, 0, "aerial", notes={"young": 1, "old": 2.0}, brightness=79),
        candidate(tmp_path, 1, "ground", notes={"young": "2", "old": 1}, brightness=80),
        candidate(tmp_path, 2, "ground", notes={"young": 1}, brightness=200),
    ]
    for one, age, light, altitude in zip(
        many, ("old", "young", "adult"), ("dim", "bright", "bright"), ("above", "level", "level"),
        strict=True,
    ):  # fmt: skip
        origin = "default" if age == "adult" else "annotation"
        assert labels_of(rules, [one], store)[one.number] == {
            "age": Label(age, 1.0 if origin == "annotation" else 0.0, origin),
            "light": Label(light, 1.0, "brightness"),
            "altitude": Label(altitude, 1.0, "view"),
        }


def test_labels_of_the_person_are_voted_and_the_others_stay_the_pictures_own(tmp_path, store):
    rules = {
        "gender": {
            "origins": ["annotation"],
            "columns": {"sex": {"m": "male", "f": "female"}},
            "default": "male",
        },
        "light": {"origins": ["brightness"]},
    }
    notes = [{}, {"sex": "f"}, {"sex": "f"}, {"sex": "m"}, {}, {}]
    many = [
        candidate(tmp_path, n, notes=note, brightness=60 + 5 * n) for n, note in enumerate(notes)
    ]
    labels = labels_of(rules, many, store)
    # Defaults do not vote against annotations.
    assert {of["gender"] for of in labels.values()} == {Label("female", 0.6667, "annotation")}
    assert [of["light"].value for of in labels.values()] == ["dim"] * 2 + ["bright"] * 4


def test_light_is_voted_in_the_layout_of_tbagpr(tmp_path, store):
    rules = ALL | {"light": {"origins": ["brightness"]}}
    many = [candidate(tmp_path, n, brightness=60 + 5 * n) for n in range(6)]
    labels = labels_of(rules, many, store, output={"layout": "TBAGPR"})
    assert {of["light"].value for of in labels.values()} == {"bright"}


def test_a_vote_sums_confidences_and_ties_go_to_the_first_met():
    a, b, c = (
        Label(value, 0.5, origin)
        for value, origin in (("x", "clip"), ("y", "model"), ("x", "model"))
    )
    assert vote([a, b]) == Label("x", 0.5, "clip") and vote([b, a]) == Label("y", 0.5, "model")
    assert vote([b, a, c]) == Label("x", 0.6667, "clip")
    assert vote([a, b._replace(confidence=0.6)]).value == "y"
    assert vote([Label("x", 0.0, "default")] * 2) == Label("x", 0.0, "default")


def test_the_readers_vote_gives_the_same_when_every_picture_carries_the_voted_value():
    met = [Label("male", 0.2, "clip"), Label("female", 0.9, "model"), Label("male", 0.3, "clip")]
    voted = vote(met).value
    number = ATTRIBUTES[0].classes.index(voted)
    by_reader = tbagpr.vote([(0, (number, 0, 0, 0, 0, 0, 0)) for _ in met])
    assert ATTRIBUTES[0].classes[by_reader[0][0]] == voted == "female"


def test_a_vision_model_is_asked_once_for_what_no_origin_before_it_has(tmp_path, store):
    columns = {"sex": {"m": "male"}}
    rules = {
        "gender": {"origins": ["annotation", "model"], "columns": columns},
        "angle": {"origins": ["model"], "default": "side"},
        "altitude": {"origins": ["view"]},
    }
    many = [candidate(tmp_path, 0, notes={"sex": "m"}), candidate(tmp_path, 1, person="p1")]

    def reply(prompt, pictures, nth):
        answer = {"angle": {"value": "back", "confidence": 0.8}}
        if "gender: male, female, unknown" in prompt:
            answer["gender"] = "Female"
        return f"```json\n{json.dumps(answer)}\n```"

    with ModelServer(reply) as server:
        first = labels_of(rules, many[:1], store, **endpoints(server))
        assert first[0]["gender"].origin == "annotation"
        assert first[0]["angle"] == Label("back", 0.8, "model")
        schema = server.last["response_format"]["json_schema"]["schema"]
        assert schema["required"] == ["angle"]
        assert labels_of(rules, many[1:], store, **endpoints(server))[1] == {
            "gender": Label("female", 1.0, "model"),
            "angle": Label("back", 0.8, "model"),
            "altitude": Label("level", 1.0, "view"),
        }
        assert sum(server.requests.values()) == 2
        schema = server.last["response_format"]["json_schema"]["schema"]
        assert schema["properties"]["gender"]["properties"]["value"]["enum"] == [
            "male",
            "female",
            "unknown",
        ]
        labels_of(rules, many[1:], store, **endpoints(server))
        assert sum(server.requests.values()) == 2


def test_a_malformed_answer_is_asked_for_again_and_then_the_default_is_taken(tmp_path, store):
    rules = {"angle": {"origins": ["model"], "default": "side"}}
    many = [candidate(tmp_path, n) for n in range(4)]
    pictures = []

    def reply(prompt, urls, nth):
        if urls[0] not in pictures:
            pictures.append(urls[0])
        tries[urls[0]] += 1
        fate = pictures.index(urls[0])
        good = fate == 0 or (fate == 1 and tries[urls[0]] == 3)
        return '{"angle": "front"}' if good else '{"angle": "diagonal"}'

    tries = Counter()
    with ModelServer(reply) as server:
        labels = labels_of(rules, many, store, **endpoints(server), captions={"tries": 3})
    assert sorted(tries.values()) == [1, 3, 3, 3]
    origins = Counter((of["angle"].value, of["angle"].origin) for of in labels.values())
    assert origins == {("front", "model"): 2, ("side", "default"): 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"age": "old", "angle": "back"}', {"age": ("old", 1.0), "angle": ("back", 1.0)}),
        ('Here it is: {"age": {"value": " OLD ", "confidence": 0.5}, "angle": "unknown"} Done.', {"age": ("old", 0.5)}),
        ('{"age": {"value": "old"}, "angle": "back", "hat": "red"}', {"age": ("old", 1.0), "angle": ("back", 1.0)}),
        ('{"age": "old"}', None),
        ('{"age": "old", "angle": "above"}', None),
        ('{"age": "old", "angle": 2}', None),
        ('{"age": "old", "angle": {"value": "back", "confidence": 3}}', None),
        ('{"age": "old", "angle": {"value": "back", "confidence": "high"}}', None),
        ('{"age": "old", "angle": "back"', None),
        ('["old", "back"]', None),
        ("The person is old and seen from behind.", None),
        ("[" * 100_000 + "{}", None),
        ("", None),
    ],
)  # fmt: skip
def test_answers_of_a_vision_model_are_checked(text, expected):
    classes = {"age": ("adult", "young", "old"), "angle": ("side", "front", "back")}
    found = parse_answer(text, classes)
    assert found == (
        expected and {name: Label(*value, "model") for name, value in expected.items()}
    )


def test_zero_shot_labels_where_the_model_has_none(tmp_path, store, clip_file):
    encoder = load_encoder(Clip(pretrain_choice=str(clip_file), img_size=(96, 32)), "cpu")
    rules = {"age": {"origins": ["model", "clip"]}, "weight": {"origins": ["clip"]}}
    with ModelServer(lambda *_: '{"age": "unknown"}') as server:
        labeller = Labeller(
            recipe(attributes=rules, **endpoints(server)), ATTRIBUTES, store, PROMPT, encoder
        )
        many = [candidate(tmp_path, n) for n in range(3)]
        labeller.prepare(lambda: many)
        for of in labeller.label(many).values():
            assert of["age"].origin == of["weight"].origin == "clip"
            assert (
                of["age"].value in ("adult", "young", "old") and 1 / 3 <= of["age"].confidence <= 1
            )
        assert sum(server.requests.values()) == 3  # "unknown" is an answer


def test_an_attribute_without_a_label_is_an_error_that_names_picture_and_mend(tmp_path, store):
    rules = {"age": {"origins": ["annotation"], "columns": {"old": {2: "old"}}}}
    with pytest.raises(
        UserError, match=r"7.png: no label for age from annotation .old is None.; give attributes.a"
    ):
        labels_of(rules, [candidate(tmp_path, 7)], store)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"agee": {"default": "old"}}, "attributes.agee: .* no such attribute. Did you mean 'age'"),
        ({"age": {"default": "olden"}}, "attributes.age.default: age has no class 'olden'. Did you mean 'old'"),
        ({"age": {"origins": ["annotation"], "columns": {"a": {1: "elder"}}}}, "attributes.age.columns.a: age has no class 'elder'"),
        ({"age": {"origins": ["view"]}}, r"attributes.age.origins \(view\): age has no class 'level'"),
        ({"age": {"origins": ["brightness"]}}, "attributes.age.origins .brightness.: age has no class 'bright'"),
        ({"age": {}}, "attributes.age: neither origins nor a default"),
        ({}, "captions.by grammar: captions are written from labels"),
    ],
)  # fmt: skip
def test_a_wrong_name_in_the_recipe_is_refused_before_anything_is_asked(rules, message):
    with pytest.raises(UserError, match=message):
        check_recipe(recipe(attributes=rules), ATTRIBUTES)


def test_the_layout_of_tbagpr_needs_its_seven_attributes():
    check_recipe(recipe(attributes=ALL, output={"layout": "TBAGPR"}), ATTRIBUTES)
    rules = {name: rule for name, rule in ALL.items() if name != "height"}
    with pytest.raises(UserError, match="attributes: height is missing in the recipe"):
        check_recipe(recipe(attributes=rules, output={"layout": "TBAGPR"}), ATTRIBUTES)
    with pytest.raises(UserError, match="the labels of the layout TBAGPR are gender"):
        check_recipe(recipe(attributes=ALL, output={"layout": "TBAGPR"}), ATTRIBUTES[:3])
