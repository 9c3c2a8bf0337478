"""The recipe: strict, with messages that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from construction.recipe import read_recipe
from utils.errors import UserError

SOURCE = "sources: [{name: AG-ReID, reader: ag_reid}]\n"
RECIPES = sorted(Path("configs/construction").glob("*.yaml"))


def read(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return read_recipe(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_recipes_of_the_project_are_valid(path):
    assert read_recipe(path).sources


def test_there_are_recipes_for_tbagpr_and_for_own_pictures():
    assert {"tbagpr", "own"} <= {path.stem for path in RECIPES}


def test_a_short_recipe_has_sensible_defaults(tmp_path):
    recipe = read(tmp_path, SOURCE)
    assert (recipe.splits.by, recipe.captions.by, recipe.balance.ratio) == ("person", "grammar", 1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "r.yaml: Input should be a valid dictionary"),
        ("seed: 0\n", "r.yaml: sources: Field required"),
        (SOURCE + "qualty: {}\n", r"r.yaml: qualty: unknown key. Did you mean 'quality'\?"),
        (
            SOURCE + "quality: {sharpness: {aerial: {atleast: 3}}}\n",
            r"quality.sharpness.aerial.atleast: unknown key. Did you mean 'at_least'\?",
        ),
        (
            SOURCE + "quality: {sharpness: {aerial: {at_least: 3, quantile: 0.1}}}\n",
            "quality.sharpness.aerial: give at_least or quantile, one of them",
        ),
        (
            SOURCE + "attributes: {age: {orgins: [clip]}}\n",
            r"attributes.age.orgins: unknown key. Did you mean 'origins'\?",
        ),
        (SOURCE + "balance: {ratio: 0.5}\n", "balance.ratio: .*greater than or equal to 1"),
        (SOURCE + "splits: {val: 0.5, test: 0.6}\n", "splits: val and test leave nobody"),
        (SOURCE + "splits: {val: 0}\n", "splits: the layout TBAGPR has val and test"),
        (SOURCE + "captions: {by: vision}\n", "models.endpoints: none, but captions"),
        (
            "sources: [{name: mine, reader: table}]\n",
            "the layout TBAGPR has the sources AG-ReID and G2APS-AG, not mine",
        ),
        ("sources: [{name: ../x, reader: table}]\n", "sources.0.name: .*pattern"),
        (SOURCE + "attributes: {age: {origins: [annotation]}}\n", "annotation needs columns"),
        (
            "sources: [{name: AG-ReID, reader: table}, {name: G2APS-AG, reader: table}]\n",
            "two have the same reader",
        ),
        (
            "sources: [{name: a, reader: table}]\noutput: {layout: custom}\nsplits: {test: 0}\n",
            "splits.test: a data set needs a test split",
        ),
        ("sources: [{name: construction, reader: table}]\n", "is a file or folder of the data set"),
        (SOURCE + "quality: {brightness: [230, 25]}\n", "brightness: 230.* is over 25"),
        (SOURCE + "captions: {words: [50, 10]}\n", "captions.words: 50 is over 10"),
        (
            SOURCE + "attributes: {gender: {origins: [annotation], columns: {sex: {yes: male}}}}\n",
            "sex: YAML reads yes, no, true and false as booleans; quote",
        ),
        (SOURCE + "seed: [\n", "r.yaml: not readable as YAML"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no\.yaml: No such file"):
        read_recipe(tmp_path / "no.yaml")
