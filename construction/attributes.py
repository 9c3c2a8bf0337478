"""Labels of pictures: from annotations, view, brightness, a vision model, CLIP, or a default.

    labeller = Labeller(recipe, attributes, store, prompt, encoder)
    labeller.prepare(candidates)           # asks models for what the store does not have
    labels = labeller.label(of_one_identity)  # by the candidate's number and the attribute

The recipe has, for every attribute, the origins in their order: the first that has a label wins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from construction.clip import Encoder, ZeroShot
from construction.endpoints import Question, ask, kept_answer
from construction.recipe import Attribute, Recipe
from construction.records import Candidate, Label, View
from construction.store import Store
from datasets.tbagpr import ATTRIBUTES, VOTED
from utils.attributes import Attribute as Classes
from utils.attributes import check_labels
from utils.errors import UserError, suggest

OF_VIEW: dict[View, str] = {"ground": "level", "aerial": "above"}
OF_PERSON = ("gender", "age", "weight", "height")  # the same in all pictures of an identity
BRIGHT, DIM = "bright", "dim"
UNKNOWN = "unknown"  # a vision model's word for what it cannot see
JSON_OBJECT = re.compile(r"\{.*\}", re.DOTALL)


def check_recipe(recipe: Recipe, attributes: Sequence[Classes]) -> None:
    """Raise UserError for a name in the recipe's attributes that `--attributes_file` lacks."""
    by_name = {attribute.name: attribute for attribute in attributes}
    if recipe.output.layout == "TBAGPR":
        check_labels(attributes, ATTRIBUTES, "the layout TBAGPR", recipe.attributes_file)
        if missing := [name for name in ATTRIBUTES if name not in recipe.attributes]:
            raise UserError(
                f"attributes: {missing[0]} is missing in the recipe; the layout TBAGPR has the "
                f"attributes {', '.join(ATTRIBUTES)}"
            )
    for name, rule in recipe.attributes.items():
        if name not in by_name:
            raise UserError(
                f"attributes.{name}: {recipe.attributes_file} has no such attribute."
                f"{suggest(name, by_name)} It has {', '.join(by_name)}"
            )
        classes = by_name[name].classes
        used = {"default": [rule.default] if rule.default is not None else []}
        used |= {f"columns.{c}": list(values.values()) for c, values in rule.columns.items()}
        used |= {"origins (view)": list(OF_VIEW.values()) if "view" in rule.origins else []}
        used |= {"origins (brightness)": [BRIGHT, DIM] if "brightness" in rule.origins else []}
        for key, values in used.items():
            for value in values:
                if value not in classes:
                    raise UserError(
                        f"attributes.{name}.{key}: {name} has no class '{value}'."
                        f"{suggest(value, classes)} {recipe.attributes_file} has "
                        f"{', '.join(classes)}"
                    )
        if not rule.origins and rule.default is None:
            raise UserError(f"attributes.{name}: neither origins nor a default")
    if recipe.attributes and (missing := [n for n in by_name if n not in recipe.attributes]):
        raise UserError(
            f"attributes: {missing[0]} is missing in the recipe; {recipe.attributes_file} has it, "
            "and a data set has all of its attributes or none: give it a default, or name another "
            "attributes_file"
        )
    if recipe.captions.by != "vision" and not recipe.attributes:
        raise UserError(
            f"captions.by {recipe.captions.by}: captions are written from labels, but the recipe "
            "has no attributes; add some, or take captions.by vision"
        )


class Labeller:
    """Labels of the pictures.

    Args:
        attributes: of `--attributes_file`.
        prompt: for the vision model; `{classes}` in it becomes the attributes with their classes.
        encoder: for the origin "clip".
    """

    def __init__(
        self,
        recipe: Recipe,
        attributes: Sequence[Classes],
        store: Store,
        prompt: str = "",
        encoder: Encoder | None = None,
    ) -> None:
        self.recipe, self.store, self.prompt = recipe, store, prompt
        self.rules = recipe.attributes
        self.classes = {a.name: a.classes for a in attributes if a.name in self.rules}
        by_clip = [a for a in attributes if self._has(a.name, "clip")]
        self.zero_shot: ZeroShot | None = None
        if by_clip:
            assert encoder is not None, "the origin clip needs an encoder"
            self.zero_shot = ZeroShot(by_clip, encoder, store)
        tbagpr = recipe.output.layout == "TBAGPR"
        self.voted = tuple(ATTRIBUTES)[:VOTED] if tbagpr else OF_PERSON

    def prepare(
        self, candidates: Callable[[], Iterable[Candidate]], total: int | None = None
    ) -> None:
        """Ask the vision model and CLIP for what `label` will need. Raises UserError as `ask`."""
        if any("model" in rule.origins for rule in self.rules.values()):
            for number in range(self.recipe.captions.tries):
                questions = self._questions(candidates(), number)
                what = f"attributes, try {number + 1}"
                with closing(ask(questions, self.recipe.models, self.store, what=what)) as asking:
                    for _ in asking:
                        pass
        if self.zero_shot:
            pictures = ((c.measure.sha256, c.measure.file) for c in candidates())
            self.zero_shot.prepare(pictures, total)

    def label(self, candidates: Iterable[Candidate]) -> dict[int, dict[str, Label]]:
        """The labels of one identity's pictures, by number and attribute.

        Labels of the person are voted: all pictures get the same. Raises UserError for an attribute
        without a label.
        """
        labels = {c.number: self._labels(c) for c in candidates}
        for name in self.voted:
            if labels and name in self.rules:
                winner = vote([of_one[name] for of_one in labels.values()])
                for of_one in labels.values():
                    of_one[name] = winner
        return labels

    def _labels(self, candidate: Candidate) -> dict[str, Label]:
        by_model: dict[str, Label] | None = None
        labels = {}
        for name, rule in self.rules.items():
            label = None
            for origin in rule.origins:
                if origin == "model":
                    if by_model is None:
                        by_model = self._by_model(candidate) or {}
                    label = by_model.get(name)
                elif origin == "clip" and self.zero_shot:
                    value = self.zero_shot.label(candidate.measure.sha256, name)
                    label = Label(*value, "clip")
                else:
                    label = free_label(origin, rule, candidate)
                if label:
                    break
            if not label and rule.default is not None:
                label = Label(rule.default, 0.0, "default")
            if not label:
                notes = candidate.picture.notes
                found = ", ".join(f"{c} is {notes.get(c)!r}" for c in rule.columns)
                raise UserError(
                    f"{candidate.picture.file}: no label for {name} from "
                    f"{', '.join(rule.origins)}{f' ({found})' if found else ''}; give "
                    f"attributes.{name} a default or one more of its origins in the recipe"
                )
            labels[name] = label
        return labels

    def _questions(self, candidates: Iterable[Candidate], number: int) -> Iterator[Question]:
        """The questions of the try with this number, for pictures without a good answer."""
        for candidate in candidates:
            names = self._asked(candidate)
            if names and (not number or self._by_model(candidate, tries=number) is None):
                yield self._question(candidate, names, number)

    def _asked(self, candidate: Candidate) -> list[str]:
        """The attributes that the vision model is asked for: no origin before it has a label."""
        names = []
        for name, rule in self.rules.items():
            if self._has(name, "model"):
                before = rule.origins[: rule.origins.index("model")]
                free = any(free_label(origin, rule, candidate) for origin in before)
                if "clip" not in before and not free:
                    names.append(name)
        return names

    def _question(self, candidate: Candidate, names: Sequence[str], number: int) -> Question:
        classes = {name: [*self.classes[name], UNKNOWN] for name in names}
        listed = "\n".join(f"{name}: {', '.join(values)}" for name, values in classes.items())
        prompt = self.prompt.replace("{classes}", listed)
        picture = (candidate.measure.sha256, candidate.measure.file)
        return Question(prompt, (picture,), answer_schema(classes), number)

    def _by_model(self, candidate: Candidate, tries: int | None = None) -> dict[str, Label] | None:
        """The labels in the first good answer; None if all tries were malformed."""
        names = self._asked(candidate)
        classes = {name: self.classes[name] for name in names}
        for number in range(tries or self.recipe.captions.tries) if names else ():
            question = self._question(candidate, names, number)
            answer = kept_answer(question, self.recipe.models, self.store)
            labels = parse_answer(answer.said, classes) if answer else None
            if labels is not None:
                return labels
        return None

    def _has(self, name: str, origin: str) -> bool:
        return name in self.rules and origin in self.rules[name].origins


def free_label(origin: str, rule: Attribute, candidate: Candidate) -> Label | None:
    """The label of an origin that needs no model, or None."""
    picture = candidate.picture
    if origin == "annotation":
        for column, values in rule.columns.items():
            note = picture.notes.get(column)
            note = int(note) if isinstance(note, float) and note.is_integer() else note
            for key, value in values.items():
                if str(key) == str(note):
                    return Label(value, 1.0, origin)
        return None
    if origin == "view":
        return Label(OF_VIEW[picture.view], 1.0, origin)
    if origin == "brightness":
        dim = candidate.measure.brightness < rule.dim_below
        return Label(DIM if dim else BRIGHT, 1.0, origin)
    return None


def answer_schema(classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """JSON schema: for every attribute its class and the model's confidence."""
    properties = {
        name: {
            "type": "object",
            "properties": {
                "value": {"type": "string", "enum": list(values)},
                "confidence": {"type": "number"},
            },
            "required": ["value", "confidence"],
            "additionalProperties": False,
        }
        for name, values in classes.items()
    }
    return {
        "type": "object",
        "properties": properties,
        "required": list(classes),
        "additionalProperties": False,
    }


def parse_answer(text: str, classes: Mapping[str, Sequence[str]]) -> dict[str, Label] | None:
    """The labels in a vision model's answer; None if it is malformed.

    Every attribute must have one of its classes, or "unknown", which is no label. Text around the
    JSON is ignored. A class without a confidence has confidence 1.
    """
    match = JSON_OBJECT.search(text)
    try:
        answer = json.loads(match[0]) if match else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict):
        return None
    labels = {}
    for name, values in classes.items():
        entry, confidence = answer.get(name), 1.0
        if isinstance(entry, dict):
            confidence, entry = entry.get("confidence", 1.0), entry.get("value")
        if not isinstance(entry, str) or not isinstance(confidence, (int, float)):
            return None
        known = {value.lower(): value for value in (UNKNOWN, *values)}
        value = known.get(entry.strip().lower())
        if value is None or not 0 <= confidence <= 1:
            return None
        if value != UNKNOWN or UNKNOWN in values:
            labels[name] = Label(value, float(confidence), "model")
    return labels


def vote(labels: Sequence[Label]) -> Label:
    """The class with the largest sum of confidences; of equal ones, the one that is met first.

    Its confidence is its share of the sum, and its origin that of its most confident label.
    """
    sums: dict[str, float] = {}
    for label in labels:
        sums[label.value] = sums.get(label.value, 0.0) + label.confidence
    value = max(sums, key=sums.__getitem__)  # of equal ones the first
    total = sum(sums.values())
    best = max((x for x in labels if x.value == value), key=lambda label: label.confidence)
    return Label(value, round(sums[value] / total, 4) if total else 0.0, best.origin)
