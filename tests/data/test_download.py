"""Downloads, from a local server."""

import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dfad.data import DataConfig, open_dataset
from dfad.data.download import Remote, fetch
from dfad.data.formats import idx
from dfad.errors import DataError

from .conftest import mnist_files, write


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        self.server.requests.append(self.path)


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder)) as server:
        server.folder, server.requests = folder, []
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def publish(server, files):
    write(server.folder, files)
    return tuple(Remote(f"{server.url}/{name}", hashlib.md5(content).hexdigest()) for name, content in files.items())


def test_downloads_a_data_set_once_and_only_when_asked(server, tmp_path, monkeypatch):
    monkeypatch.setitem(idx.REMOTES, "mnist", publish(server, mnist_files()))
    root = tmp_path / "new" / "mnist"
    with pytest.raises(DataError, match=r"--data\.download"):
        open_dataset(DataConfig(name="mnist", root=root))
    assert not server.requests
    for _ in range(2):
        assert len(open_dataset(DataConfig(name="mnist", root=root, download=True)).train) == 20
    assert len(server.requests) == 4


def test_another_file_than_the_published_is_not_kept(server, tmp_path):
    (remote,) = publish(server, {"file.gz": b"right"})
    write(server.folder, {"file.gz": b"wrong"})
    with pytest.raises(DataError, match=rf"file\.gz is not the published file: .* not {remote.md5}"):
        fetch(remote, tmp_path / "root")
    assert not any((tmp_path / "root").iterdir())


def test_a_failing_server_leaves_nothing(server, tmp_path):
    with pytest.raises(DataError, match=r"missing\.gz cannot be downloaded: HTTP Error 404"):
        fetch(Remote(f"{server.url}/missing.gz", ""), tmp_path / "root")
    assert not any((tmp_path / "root").iterdir())
