"""People are found by a detector, here with random weights."""

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torchvision.models import detection

from datasets.transforms import convert_image
from gallery.detect import Detector, detected, load_detector
from gallery.engine_torch import chunk_loader
from gallery.frames import Job
from gallery.ingest import Person
from gallery.records import id_of
from tests.gallery.test_frames import make_video, picture
from utils.errors import UserError

NAME = "fasterrcnn_mobilenet_v3_large_320_fpn"
SIZE, CPU = (32, 16), torch.device("cpu")


class Fixed(torch.nn.Module):
    """Finds the same boxes in every frame, one of them sure, one of another class."""

    def forward(self, images):
        assert all(image.dtype == torch.float32 and image.max() <= 1 for image in images)
        found = {
            "boxes": torch.tensor(
                [[-2.0, 3, 20.4, 33], [5, 6, 25, 36], [0, 0, 9, 9], [1, 1, 2, 2]]
            ),
            "labels": torch.tensor([1, 1, 3, 1]),
            "scores": torch.tensor([0.9, 0.4, 0.9, 0.9]),
        }
        return [found for _ in images]


def found_in(jobs, min_score=0.5, batch_size=2):
    frames = chunk_loader(jobs, SIZE, batch_size, 1.0, True, 0, CPU)
    return list(detected(frames, Detector(Fixed(), CPU, min_score), SIZE, batch_size))


def job(path, is_video=False):
    return Job(path.name, str(path), (Person(view="ground"),), is_video, 1, 2, "", "")


def test_sure_boxes_of_people_become_rows_and_crops(tmp_path):
    image = picture(tmp_path / "1.png")
    (chunk,) = found_in([job(tmp_path / "1.png")])
    (row,) = chunk.rows
    box = tuple(row[name] for name in ("left", "top", "width", "height"))
    assert box == (0, 3, 20, 30) and row["view"] == "ground"
    assert row["id"] == id_of("1.png", None, box)
    assert np.array_equal(chunk.images[0], convert_image(image.crop((0, 3, 20, 33)), SIZE))
    assert [len(c.rows) for c in found_in([job(tmp_path / "1.png")], min_score=0.3)] == [2]


def test_frames_of_videos_are_searched_and_chunks_are_filled(tmp_path):
    make_video(tmp_path / "v.mp4")
    picture(tmp_path / "1.png")
    found = found_in([job(tmp_path / "v.mp4", is_video=True), job(tmp_path / "1.png")])
    assert [len(chunk.rows) for chunk in found] == [2, 2]
    rows = [row for chunk in found for row in chunk.rows]
    assert [row["frame_time"] for row in rows] == [0, 1, 2, None]
    assert [d.job.path for chunk in found for d in chunk.done] == ["v.mp4", "1.png"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights that are sure to see people everywhere."""
    torch.manual_seed(0)
    model = getattr(detection, NAME)(weights=None, weights_backbone=None, num_classes=2)
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias += torch.tensor([-5.0, 5.0])
    path = tmp_path_factory.mktemp("weights") / f"{NAME}-random.pth"
    torch.save(model.state_dict(), path)
    return path


def test_weights_in_a_file_are_loaded_by_its_name_or_by_one_that_is_given(weights, tmp_path):
    frame = np.asarray(PILImage.new("RGB", (120, 90), "grey"))
    (boxes,) = load_detector(str(weights), CPU, 0.5)([frame])
    assert boxes and all(x >= 0 and y >= 0 and x + w <= 120 and y + h <= 90 for x, y, w, h in boxes)
    renamed = weights.rename(tmp_path / "x.pth")
    assert load_detector(f"{NAME}@{renamed}", CPU, 0.5)([frame]) == [boxes]
    with pytest.raises(UserError, match="x.pth: neither a detector of torchvision, nor a file"):
        load_detector(str(renamed), CPU, 0.5)
    with pytest.raises(UserError, match="x.pth: not the weights of a ssd300_vgg16"):
        load_detector(f"ssd300_vgg16@{renamed}", CPU, 0.5)


def test_an_unknown_detector_gets_a_suggestion():
    with pytest.raises(UserError, match="Did you mean 'fasterrcnn_resnet50_fpn'"):
        load_detector("fasterrcnn_resnet50", CPU, 0.5)
