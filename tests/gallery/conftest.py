"""A small gallery to be searched, mini-TBAGPR's test pictures and a picture with people in boxes; and
servers of its page."""

import shutil
import threading
from contextlib import contextmanager

import pytest
from PIL import Image as PILImage

import search
from gallery import commands_serve, page_server
from gallery.page import build
from tests.helpers import run
from tests.reliability.runs import train_small_run

NASTY = "<img src=x onerror=document.title='hacked'>{{value}}${1}.jpg"


@pytest.fixture(scope="session")
def searched(mini_root, tmp_path_factory):
    """The folder of a gallery of 26 people. Tests that change it use `searched_copy`."""
    folder = tmp_path_factory.mktemp("searched")
    shutil.copytree(mini_root, folder / "mini")
    trained = train_small_run(mini_root, folder / "logs", img_size=(96, 32))
    gradient = PILImage.linear_gradient("L").resize((120, 160)).convert("RGB")
    gradient.save(folder / NASTY, "JPEG")
    (folder / "boxes.csv").write_text(
        f'path,left,top,width,height,view,camera\n"{NASTY}",0,0,60,160,,<b>gate</b>\n"{NASTY}",60,40,60,80,,\n'
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(search.main, monkeypatch, "index", "--gallery", folder / "gallery", "--config_file", trained / "configs.yaml", "--num_workers", 0, "--dataset_name", "AGDataAttr", "--root_dir", folder / "mini", "--split", "test", "--boxes", folder / "boxes.csv")  # fmt: skip
    return folder / "gallery"


@pytest.fixture
def searched_copy(searched, tmp_path):
    return shutil.copytree(searched, tmp_path / "gallery")


@contextmanager
def serving(service, password="", names=("127.0.0.1",)):
    """The address of a server of the page, in a thread."""
    listening = commands_serve.listen("127.0.0.1", 0)
    server = page_server.server_of(page_server.app_of(build(service), password, names))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
