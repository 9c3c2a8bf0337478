"""Rendering the raw sources of TBAGPR, AG-ReID and G2APS as they are published, with known faults.

TBAGPR was built from these two data sets. What builds a data set of that kind is tested on them:
every picture's person, attributes and fault are known, and written to TRUTH in the same folder.

AG-ReID (v1): flat folders of pictures, named P<person>T<month, day, 0 morning or 1 afternoon>
A<altitude>C<camera>F<frame>.jpg, and qut_attribute_v4_88_attributes.mat. An identity is a person in
a session at an altitude; its number is the digits of P, T and A joined. With
`m = scipy.io.loadmat(file)["qut_attribute"]`:

    m["train"][0, 0]["image_index"][0, 0]    [1, N]: the identities; "test" likewise
    m["train"][0, 0][column][0, 0]           [1, N]: 1 no, 2 yes; 88 columns, such as "gendermale"

G2APS: frames with several people, in the form of CUHK-SYSU. With the array that `loadmat(file)`
has under the name of the variable:

    Images.mat    Img[0, i]: imname, nAppear, box; box[0, j]["idlocate"] is [[x, y, w, h]]
    Person.mat    Person[0, i]: idname, nAppear, scene; scene[0, j]: imname, idlocate, ishard
    pool.mat      pool[i, 0]: ["name"], the frames of the test split
    Train.mat     Train[i, 0][0, 0]: as a row of Person; the training identities
    TestG50.mat   TestG50[0, i]: Query[0, 0]: imname, idlocate, ishard, idname;
                  Gallery[0, j]: imname, idlocate, ishard; idlocate is empty where the person is not

A field of a row can also be read by its position, in this order. Names are [text], numbers [[n]].
As MATLAB does, `idlocate` has the smallest unsigned type that its values fit in, so that adding
width to x can overflow. A box belongs to the person whose `idlocate` in that frame is the same, and
to nobody if there is none.
"""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from utils.attributes import Attribute, read_attributes
from utils.errors import UserError

from .build import (
    QUALITY,
    fill_folder,
    labels,
    run_jobs,
    sample_people,
    write_json,
)
from .captions import caption
from .faults import Picture, draw, jpeg, sample_pictures
from .layouts import SPLITS, class_names
from .people import Person, sample_person
from .view import View, paint, sample_view

VERSION = 1  # increase it when the same parameters give other files
RAW_LAYOUTS = ("AG-ReID-raw", "G2APS-raw")
TRUTH = "mini-raw.json"
TRAIN, TEST = 0, 2  # indices into SPLITS
FOLDERS = (
    "bounding_box_train",
    "bounding_box_test_all_c0",
    "bounding_box_test_all_c3",
    "query_all_c0",
    "query_all_c3",
)
ATTRIBUTES_FILE = "qut_attribute_v4_88_attributes.mat"
# The 88 columns of that file. The last word of a group is for what cannot be seen.
COLUMNS = {
    "gender": "male female unknown",
    "age": "young middle old unknown",
    "height": "child short medium tall unknown",
    "weight": "thin medium fat unknown",
    "ethnic": "white black asian india unknown",
    "haircolor": "black brown white red gray occluded unknown",
    "hairstyle": "bald short medium long horsetail unknown",
    "beard": "on off unknown",
    "moustache": "on off unknown",
    "glasses": "normal sun off unknown",
    "head": "hat scarf neckless occluded unknown",
    "upper": "tshirt blouse sweater coat bikini naked dress uniform shirt suit hoodie cardiga "
    "unknown",
    "lower": "jeans leggins pants shorts skirt bikini dress uniform suit unknown",
    "feet": "sportshoe classicshoe highheels boots sandals nothing unknown",
    "bag": "normal backpack handbag rolling umbrella sportif market nothing unknown",
}
_WORDS = {  # of COLUMNS, where they differ from those of a Person
    "haircolor": {"grey": "gray"},
    "hairstyle": {"bob": "medium", "bun": "medium", "ponytail": "horsetail"},
    "head": {"cap": "hat"},
    "upper": {
        "t-shirt": "tshirt",
        "polo shirt": "tshirt",
        "tank top": "tshirt",
        "jacket": "coat",
        "down jacket": "coat",
        "blazer": "suit",
    },
    "lower": {"leggings": "leggins", "trousers": "pants"},
    "feet": {"sneakers": "sportshoe", "leather shoes": "classicshoe"},
    "bag": {"none": "nothing", "shoulder bag": "normal"},
}
_QUERIES = 4  # every fourth good picture of AG-ReID's test is a query
_SHARED = 10  # every tenth person of AG-ReID's test is in training too
_FRAME = (640, 480)  # pixels
_FRAME_QUALITY = (94, 97)  # of the JPEG; blocks would make blurry people look sharp
_PLACES = 5  # for people, side by side in a frame
_SCENES, _TOGETHER = 9, 6  # scenes of G2APS, and how many identities in a row are in one of them
_GALLERY = 50  # frames in the gallery of a query of G2APS
# Fields of MATLAB's structs, in their order.
_BOX = ("idlocate", "ishard")
_IMAGE = ("imname", "nAppear", "box")
_SCENE = ("imname", "idlocate", "ishard")
_PERSON = ("idname", "nAppear", "scene")
_QUERY = ("imname", "idlocate", "ishard", "idname")
_MAT_HEADER = b"MATLAB 5.0 MAT-file, rendered by datasets.mini"


@dataclass(frozen=True)
class _Identity:
    """An identity of a raw data set, with the number that its annotations give it."""

    number: int
    split: int  # TRAIN or TEST
    person_number: int  # of the person, who may have several identities
    person: Person
    pictures: list[Picture]


@dataclass(frozen=True)
class _Box:
    """A picture in a frame: `identity.pictures[position]`, or that of somebody without identity."""

    bounds: tuple[int, int, int, int]  # x, y, width, height; pixels
    picture: Picture
    identity: _Identity | None = None
    position: int = 0


@dataclass(frozen=True)
class _Frame:
    """A frame of G2APS, before it is rendered."""

    name: str
    split: int
    background: View
    boxes: list[_Box]
    quality: int  # of the JPEG
    truncated: bool


def render_raw(
    root: str | Path,
    layout: str,
    seed: int = 0,
    train_ids: int = 200,
    test_ids: int = 60,
    pairs: int = 8,
    workers: int = 2,
    force: bool = False,
    progress: bool = False,
) -> bool:
    """Render a raw source of TBAGPR into `root`, with planted faults, and the truth about it.

    `pairs` is the number of good pictures of each view that most identities have; see
    `faults.sample_pictures`. TRUTH lists every picture: its file and, in a frame, the number of its
    box, split, person, identity, view, classes of attributes, captions, and its fault, if any. For
    a duplicate, `of` names the picture that it repeats.

    As with `render`, the files depend only on the parameters, and `root` appears when the set is
    complete. Returns and raises what `render` does; UserError also if SciPy is not installed.
    """
    if layout not in RAW_LAYOUTS:
        raise ValueError(f"layout {layout} is none of {', '.join(RAW_LAYOUTS)}")
    if min(pairs, train_ids, test_ids) < 1:
        raise ValueError("pairs and every number of identities must be at least 1")
    parameters = {
        "version": VERSION,
        "seed": seed,
        "train_ids": train_ids,
        "test_ids": test_ids,
        "pairs": pairs,
        "layout": layout,
    }
    fill = _render_ag_reid if layout == RAW_LAYOUTS[0] else _render_g2aps
    return fill_folder(
        Path(root), parameters, force, partial(fill, workers=workers, progress=progress)
    )


# AG-ReID


def _render_ag_reid(root: Path, parameters: dict[str, Any], workers: int, progress: bool) -> None:
    savemat = _savemat()
    for folder in FOLDERS:
        (root / folder).mkdir()
    rng = np.random.default_rng([parameters["seed"], 0])
    identities = _ag_reid_identities(rng, parameters)
    jobs, truth = [], []
    for identity in identities:
        files = _ag_reid_files(rng, identity)
        for picture, file in zip(identity.pictures, files, strict=True):
            of = None if picture.of is None else {"file": files[picture.of]}
            truth.append({"file": file, **_known(rng, picture, identity.split, identity), "of": of})
            jobs.append((file, picture, int(rng.integers(*QUALITY, endpoint=True))))
    run_jobs(partial(_write_picture, root), jobs, workers, progress, "picture")
    tables = {
        name: _attribute_table([x for x in identities if x.split == split])
        for name, split in (("train", TRAIN), ("test", TEST))
    }
    _write_mat(savemat, root / ATTRIBUTES_FILE, "qut_attribute", tables)
    write_json(root / TRUTH, truth)


def _ag_reid_identities(rng: np.random.Generator, parameters: dict[str, Any]) -> list[_Identity]:
    """Of three people the first has two sessions, the second one, and the third is seen at two
    altitudes. Every tenth person of the test is one of training, in another session. A session has
    its own clothes."""
    identities: list[_Identity] = []
    people: list[Person] = []  # by their number, from 1
    for split, name, month in ((TRAIN, "train_ids", 4), (TEST, "test_ids", 7)):
        size, trained, turn = parameters[name] + len(identities), len(people), 0
        fresh = iter(sample_people(parameters["seed"], split, parameters[name]))
        while len(identities) < size:
            number = turn // _SHARED + 1
            if turn % _SHARED or number > trained:
                people.append(next(fresh)[2])
                number, person = len(people), people[-1]
            else:
                person = _changed(rng, people[number - 1])
            day, noon = int(rng.integers(1, 15)), int(rng.integers(2))
            visits = [(day, 0, person)]
            if turn % 3 == 0:
                visits.append((day + 14, 0, _changed(rng, person)))
            elif turn % 3 == 2:
                visits.append((day, 1, person))
            for day, altitude, dressed in visits[: size - len(identities)]:
                index = int(f"{number:04}{month:02}{day:02}{noon}{altitude}")
                order = len(identities)
                pictures = sample_pictures(rng, dressed, 0, order, parameters["pairs"])
                identities.append(_Identity(index, split, number, dressed, pictures))
            turn += 1
    return identities


def _changed(rng: np.random.Generator, person: Person) -> Person:
    """The person in other clothes."""
    while True:
        other = sample_person(rng)
        if (other.gender, other.age) == (person.gender, person.age) and other.look != person.look:
            same = ("light", "weight", "height", "skin", "hair", "hair_colour")
            return replace(other, **{name: getattr(person, name) for name in same})


def _ag_reid_files(rng: np.random.Generator, identity: _Identity) -> list[str]:
    """The file of each picture of an identity. A duplicate is a frame right after its original."""
    digits = f"{identity.number:010}"
    frames, folders = {}, {}
    for aerial, camera in ((True, 0), (False, 3)):
        own = [i for i, p in enumerate(identity.pictures) if p.view.aerial == aerial]
        originals = [i for i in own if identity.pictures[i].of is None]
        slots = rng.permutation(len(originals))
        for k, (i, slot) in enumerate(zip(originals, slots, strict=True)):
            frames[i] = 1 + 30 * int(slot)
            query = k % _QUERIES == 0 and identity.pictures[i].fault is None
            kind = f"{'query' if query else 'bounding_box_test'}_all_c{camera}"
            folders[i] = "bounding_box_train" if identity.split == TRAIN else kind
    repeats: Counter[int] = Counter()
    files = []
    for i, picture in enumerate(identity.pictures):
        original = i if picture.of is None else picture.of
        frame = frames[original] + repeats[original]
        repeats[original] += 1
        camera = 0 if picture.view.aerial else 3
        name = f"P{digits[:4]}T{digits[4:9]}A{digits[9]}C{camera}F{frame}.jpg"
        files.append(f"{folders[original]}/{name}")
    return files


def _write_picture(root: Path, job: tuple[str, Picture, int]) -> None:
    file, picture, quality = job
    data = jpeg(draw(picture), quality, truncated=picture.fault == "truncated")
    (root / file).write_bytes(data)


def _attribute_table(identities: list[_Identity]) -> dict[str, np.ndarray]:
    """The columns of the attribute file, [1, N] each."""
    shown = [_shown(identity.person) for identity in identities]
    table = {
        group + word: np.array([[1 + (row[group] == word) for row in shown]], np.uint8)
        for group, words in COLUMNS.items()
        for word in words.split()
    }
    return table | {"image_index": np.array([[x.number for x in identities]], np.uint32)}


def _shown(person: Person) -> dict[str, str]:
    """For each group of COLUMNS the word that applies to a person."""
    known = {
        "gender": ("male", "female")[person.gender],
        "age": ("middle", "young", "old")[person.age],
        "height": ("medium", "tall", "short")[person.height],
        "weight": ("medium", "thin", "fat")[person.weight],
        "haircolor": person.hair_colour,
        "hairstyle": person.hair,
        "glasses": "normal" if person.glasses else "off",
        "head": person.hat,
        "upper": person.upper,
        "lower": person.lower,
        "feet": person.shoes,
        "bag": person.bag,
    }
    shown = {}
    for group, words in COLUMNS.items():
        word = known.get(group, "unknown")
        word = _WORDS.get(group, {}).get(word, word)
        shown[group] = word if word in words.split() else "unknown"
    return shown


# G2APS


def _render_g2aps(root: Path, parameters: dict[str, Any], workers: int, progress: bool) -> None:
    savemat = _savemat()
    images, protocol = root / "Image/SSM", root / "annotation/test/train_test"
    images.mkdir(parents=True)
    protocol.mkdir(parents=True)
    rng = np.random.default_rng([parameters["seed"], 1])
    identities = _g2aps_identities(rng, parameters)
    frames = sorted(_frames(rng, identities), key=lambda frame: frame.name)
    run_jobs(partial(_write_frame, images), frames, workers, progress, "frame")
    scenes: dict[int, list[tuple[Any, ...]]] = {x.number: [] for x in identities}
    places: dict[tuple[int, int], dict[str, Any]] = {}
    for frame in frames:
        for i, box in enumerate(frame.boxes):
            if box.identity:
                hard = int(rng.random() < 0.1)
                scenes[box.identity.number].append((frame.name, _located(box.bounds), hard))
                places[box.identity.number, box.position] = {
                    "file": f"Image/SSM/{frame.name}",
                    "box": i,
                }
    people = [(f"p{n}", len(rows), _structs(_SCENE, rows)) for n, rows in scenes.items()]
    boxes = [
        (f.name, len(f.boxes), _structs(_BOX, [(_located(box.bounds), 0) for box in f.boxes]))
        for f in frames
    ]
    pool = [frame.name for frame in frames if frame.split == TEST]
    train = [person for person, x in zip(people, identities, strict=True) if x.split == TRAIN]
    test = [_protocol(rng, x.number, scenes[x.number], pool) for x in identities if x.split == TEST]
    for path, name, value in (
        (root / "annotation/Images.mat", "Img", _structs(_IMAGE, boxes)),
        (root / "annotation/Person.mat", "Person", _structs(_PERSON, people)),
        (root / "annotation/pool.mat", "pool", _cells(pool)),
        (protocol / "Train.mat", "Train", _cells([_structs(_PERSON, [row]) for row in train])),
        (protocol / "TestG50.mat", "TestG50", _structs(("Query", "Gallery"), test)),
    ):
        _write_mat(savemat, path, name, value)
    truth = []
    for frame in frames:
        for i, box in enumerate(frame.boxes):
            place = {"file": f"Image/SSM/{frame.name}", "box": i, "bounds": box.bounds}
            of = None
            if box.identity and box.picture.of is not None:
                of = places[box.identity.number, box.picture.of]
            truth.append({**place, **_known(rng, box.picture, frame.split, box.identity), "of": of})
    write_json(root / TRUTH, truth)


def _g2aps_identities(rng: np.random.Generator, parameters: dict[str, Any]) -> list[_Identity]:
    """The identities of training, then those of the test, numbered from 1."""
    identities: list[_Identity] = []
    for split, name in ((TRAIN, "train_ids"), (TEST, "test_ids")):
        for _, _, person in sample_people(parameters["seed"] + 1, split, parameters[name]):
            order = len(identities)
            pictures = sample_pictures(rng, person, 1, order, parameters["pairs"])
            identities.append(_Identity(order + 1, split, order + 1, person, pictures))
    return identities


def _frames(rng: np.random.Generator, identities: list[_Identity]) -> list[_Frame]:
    """Frames with two to five people, nobody twice in one. Each shows one scene from one camera."""
    frames = []
    groups: dict[tuple[int, bool, int], list[_Identity]] = {}
    for identity in identities:
        scene = (identity.number - 1) // _TOGETHER % _SCENES + 1
        for aerial in (True, False):
            groups.setdefault((scene, aerial, identity.split), []).append(identity)
    numbers: Counter[str] = Counter()  # of frames, by the beginning of their name
    for (scene, aerial, split), group in groups.items():
        camera = f"{'D' if aerial else 'S'}{scene}_{20 + 10 * (scene % 4)}"
        background = _background_view(scene, aerial)
        for truncated in (False, True):
            waiting = {}
            for identity in group:
                waiting[identity.number] = [
                    _Box((0, 0, 0, 0), picture, identity, i)
                    for i, picture in enumerate(identity.pictures)
                    if picture.view.aerial == aerial
                    and picture.of is None
                    and (picture.fault == "truncated") == truncated
                ]
            while any(waiting.values()):
                fullest = sorted(waiting.values(), key=len, reverse=True)
                chosen = [boxes.pop() for boxes in fullest[: rng.integers(2, _PLACES)] if boxes]
                strangers = max(2 - len(chosen), int(rng.integers(1, 3)))
                for _ in range(min(strangers, _PLACES - len(chosen))):
                    chosen.append(_stranger(rng, aerial, "truncated" if truncated else None))
                boxes = _arranged(rng, chosen)
                number = 20 * numbers[camera]
                numbers[camera] += 1
                quality = int(rng.integers(*_FRAME_QUALITY, endpoint=True))
                shots = [boxes, *_repeated(rng, boxes)]
                for later, shot in enumerate(shots):
                    name = f"{camera}_{number + later:06}.jpg"
                    frames.append(_Frame(name, split, background, shot, quality, truncated))
    return frames


def _background_view(scene: int, aerial: bool) -> View:
    """How a scene looks without people; its cameras do not move."""
    rng = np.random.default_rng([scene, aerial])
    view = sample_view(rng, sample_person(rng), 1, aerial)
    return replace(view, size=_FRAME, span=3.0, dim=0, roll=0.0, occluder="none")


def _stranger(rng: np.random.Generator, aerial: bool, fault: str | None) -> _Box:
    """Somebody without identity."""
    person = sample_person(rng)
    return _Box((0, 0, 0, 0), Picture(person, sample_view(rng, person, 1, aerial), fault))


def _arranged(rng: np.random.Generator, boxes: list[_Box]) -> list[_Box]:
    """The boxes at random places of a frame, side by side, in random order."""
    width, arranged = _FRAME[0] // _PLACES, []
    for box, place in zip(boxes, rng.permutation(_PLACES), strict=False):
        w, h = box.picture.view.size
        x = int(place * width + rng.integers(width - w, endpoint=True))
        y = int(rng.integers(_FRAME[1] - h, endpoint=True))
        arranged.append(replace(box, bounds=(x, y, w, h)))
    return [arranged[i] for i in rng.permutation(len(arranged))]


def _repeated(rng: np.random.Generator, boxes: list[_Box]) -> list[list[_Box]]:
    """The boxes of the frames right after one: the duplicates of its pictures, with the people who
    have no identity."""
    after: list[list[_Box]] = []
    for box in boxes:
        pictures = box.identity.pictures if box.identity else []
        again = [i for i, picture in enumerate(pictures) if picture.of == box.position]
        for later, i in enumerate(again):
            x, y, w, h = box.bounds
            y = int(np.clip(y + rng.integers(-3, 4), 0, _FRAME[1] - h))
            if later == len(after):
                after.append([other for other in boxes if not other.identity])
            after[later].append(_Box((x, y, w, h), pictures[i], box.identity, i))
    return after


@cache
def _background(view: View) -> Image.Image:
    # Blurred, because otherwise its noise makes up most of a file.
    return paint(None, view).filter(ImageFilter.GaussianBlur(1))


def _write_frame(images: Path, frame: _Frame) -> None:
    image = _background(frame.background).copy()
    for box in frame.boxes:
        image.paste(draw(box.picture), box.bounds[:2])
    (images / frame.name).write_bytes(jpeg(image, frame.quality, frame.truncated))


def _protocol(
    rng: np.random.Generator, number: int, scenes: list[tuple[Any, ...]], pool: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Query and Gallery of a test identity: one of its boxes, and frames, first those that show
    it."""
    query = int(rng.integers(len(scenes)))
    gallery = [row for i, row in enumerate(scenes) if i != query]
    others = [name for name in pool if name not in {row[0] for row in scenes}]
    rng.shuffle(others)
    missing = max(0, _GALLERY - len(gallery))
    gallery += [(name, np.zeros((0, 0), np.uint8), 0) for name in others[:missing]]
    return _structs(_QUERY, [(*scenes[query], f"p{number}")]), _structs(_SCENE, gallery)


def _located(bounds: Sequence[int]) -> np.ndarray:
    """A box as MATLAB stores it: [1, 4], of the smallest unsigned type."""
    return np.array([bounds], np.min_scalar_type(max(bounds)))


# MATLAB's files, and the truth


def _structs(fields: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> np.ndarray:
    """A 1 x N array of MATLAB structs. A number gets the smallest unsigned type, as `_located`."""
    array = np.empty((1, len(rows)), [(field, object) for field in fields])
    for i, row in enumerate(rows):
        array[0, i] = tuple(
            np.array(x, np.min_scalar_type(x)) if isinstance(x, int) else x for x in row
        )
    return array


def _cells(values: Sequence[object]) -> np.ndarray:
    """An N x 1 cell array of MATLAB."""
    array = np.empty((len(values), 1), object)
    array[:, 0] = values
    return array


def _savemat() -> Callable[..., None]:
    """SciPy's function. Raises UserError if SciPy is not installed."""
    try:
        from scipy.io import savemat
    except ImportError:
        raise UserError(
            "scipy is not installed, and raw layouts have MATLAB files; "
            "pip install -r requirements-construction.txt"
        ) from None
    return savemat


def _write_mat(savemat: Callable[..., None], path: Path, name: str, value: object) -> None:
    """Write a variable to a MATLAB file, with a header that does not contain the time."""
    file = io.BytesIO()
    savemat(file, {name: value})
    data = file.getvalue()
    path.write_bytes(_MAT_HEADER.ljust(116) + data[116:])


def _known(
    rng: np.random.Generator, picture: Picture, split: int, identity: _Identity | None
) -> dict[str, Any]:
    """What TRUTH tells of a picture besides its place."""
    person, view = picture.person, picture.view
    (attributes,) = class_names(_attributes(), [labels(person, view)])
    return {
        "split": SPLITS[split],
        "person": identity and identity.person_number,
        "identity": identity and identity.number,
        "view": "aerial" if view.aerial else "ground",
        "attributes": attributes,
        "captions": [caption(person, (view,), rng) for _ in range(2)],
        "fault": picture.fault,
    }


@cache
def _attributes() -> list[Attribute]:
    return read_attributes("configs/attributes.yaml")
