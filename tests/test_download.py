"""The downloader against a server on this machine that fails in every way we know of."""
import contextlib
import dataclasses
import hashlib
import http.server
import io
import os
import re
import resource
import socket
import tarfile
import threading
import time

import pytest
from conftest import dld

BODY = bytes(range(256)) * 1200  # 307,200 bytes
SIZE = len(BODY)
RIGHT = hashlib.md5(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """One path, one way to serve; /good is right and knows Range and If-Range."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        way = self.path.strip("/").split("/")[0].replace("-", "_")
        with contextlib.suppress(OSError):  # the client has gone
            getattr(self, f"serve_{way}")()
        self.close_connection = True

    def begin(self, status=200, length=SIZE, **headers):
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def serve_good(self, body=BODY, tag='"v1"', ranges=True):
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if ranges and asked and self.headers.get("If-Range", tag) == tag:
            start = int(asked[1])
            self.begin(206, len(body) - start, ETag=tag,
                       Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.wfile.write(body[start:])
        else:
            self.begin(length=len(body), ETag=tag)
            self.wfile.write(body)

    def serve_ignores_range(self):
        self.serve_good(ranges=False)

    def serve_changed(self):
        """Another version than the one that a part was left of."""
        self.serve_good(tag='"v2"')

    def serve_drops(self, after=100_000):
        """Breaks off after some bytes of what was asked for, and goes on where it is asked to."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.begin(206 if start else 200, len(BODY) - start, ETag='"v1"',
                   **({"Content_Range": f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"} if start else {}))
        self.wfile.write(BODY[start:start + after])

    def serve_stalls(self):
        self.begin()
        self.wfile.write(BODY[:1000])
        self.server.until.wait(20)

    def serve_crawls(self, pause=0.004):
        """Some 200 kB/s."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.begin(206 if start else 200, len(BODY) - start,
                   **({"Content_Range": f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"} if start else {}))
        for i in range(start, len(BODY), 1000):
            self.wfile.write(BODY[i:i + 1000])
            if self.server.until.wait(pause):
                return

    def serve_creeps(self):
        """Some 20 kB/s."""
        self.serve_crawls(pause=0.05)

    def serve_trickles(self):
        """Headers without an end, a byte at a time: every single read is in time."""
        while not self.server.until.wait(0.1):
            self.wfile.write(b"X")

    def serve_too_long(self):
        self.begin(length=len(BODY) + 5)
        self.wfile.write(BODY + b"extra")

    def serve_endless(self):
        self.begin(length=None)
        for _ in range(50):
            self.wfile.write(b"\0" * SIZE)

    def serve_too_short(self):
        self.begin(length=1000)
        self.wfile.write(BODY[:1000])

    def serve_no_length(self):
        self.begin(length=None)
        self.wfile.write(BODY)

    def serve_wrong(self):
        self.begin()
        self.wfile.write(b"\0" * len(BODY))

    def serve_wrong_part(self):
        self.begin(206, 10, Content_Range=f"bytes 5-14/{len(BODY)}")
        self.wfile.write(BODY[5:15])

    def serve_circle(self):
        self.begin(302, 0, Location="/circle")

    def serve_elsewhere(self):
        self.begin(302, 0, Location="/good/file.bin")

    def serve_to_a_file(self):
        self.begin(302, 0, Location="file:///etc/hostname")

    def serve_web_page(self):
        page = b"<html>Please accept our terms" + b" " * (len(BODY) - 29)
        self.begin(Content_Type="text/html")
        self.wfile.write(page)

    def serve_403(self):
        self.begin(403, 0)

    def serve_404(self):
        self.begin(404, 0)

    def serve_416(self):
        self.begin(416, 0)

    def serve_500(self):
        self.begin(500, 0)

    def serve_nonsense(self):
        self.wfile.write(b"\x16\x03\x01 this is no HTTP\r\n\r\n")

    def serve_closes(self):
        pass

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """Yields its address, and what was asked for; times are short, so that the tests are."""
    for name, value in (("ANSWER", 3.0), ("STALL", 1.0), ("CRAWL", 60_000), ("WATCH", 0.3)):
        monkeypatch.setattr(dld, name, value)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.asked, httpd.until = [], threading.Event()
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", httpd.asked
    httpd.until.set()
    httpd.shutdown()
    httpd.server_close()


def archive(host, *ways):
    return dld.Archive("file.bin", RIGHT, len(BODY), tuple(f"{host}/{way}/file.bin" for way in ways))


def fetch(folder, host, *ways, mirror=""):
    """Within ten seconds, whatever the server does."""
    started = time.monotonic()
    try:
        return dld.fetch(archive(host, *ways), folder, dld.Downloads(True, mirror)).read_bytes()
    finally:
        assert time.monotonic() - started < 10


def left(folder):
    return sorted(path.name for path in folder.iterdir())


RECOVERS = ["drops", "elsewhere", "no-length", "ignores-range", "good"]
FAILS = {"stalls": "timed out", "trickles": "no answer", "too-long": "would send 307,205 bytes", "wrong": "md5 differs",
         "endless": "more than the file|md5 differs",
         "too-short": "would send 1,000 bytes", "wrong-part": "another part",
         "circle": "infinite loop|redirect", "to-a-file": "not allowed", "web-page": "a web page instead", "403": "403",
         "404": "404", "416": "416", "500": "500", "nonsense": "BadStatusLine|this is no HTTP", "closes": "closed"}


@pytest.mark.parametrize("way", RECOVERS)
def test_one_mirror_is_enough_if_its_bytes_come_in_the_end(way, tmp_path, server):
    assert fetch(tmp_path, server[0], way) == BODY and left(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("way", FAILS)
def test_a_mirror_that_fails_is_named_and_the_next_one_is_asked(way, tmp_path, server):
    host, asked = server
    with pytest.raises(dld.DataMissing, match=FAILS[way]) as caught:
        fetch(tmp_path / "alone", host, way)
    said = str(caught.value)
    assert "file.bin" in said and "307,200 bytes" in said and str(tmp_path / "alone") in said and "\n" not in said
    assert not (tmp_path / "alone" / "file.bin").exists() and ".file.bin.lock" not in left(tmp_path / "alone")
    asked.clear()
    assert fetch(tmp_path / "both", host, way, "good") == BODY and left(tmp_path / "both") == ["file.bin"]
    assert asked[-1][0] == "/good/file.bin"
    fetch(tmp_path / "both", host, way)  # what is there is not fetched again
    assert asked[-1][0] == "/good/file.bin"


def test_a_mirror_that_hangs_on_connecting_is_left(tmp_path, server):
    with socket.socket() as deaf:  # its queue is full and it never accepts
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        full = [socket.socket() for _ in range(4)]
        for one in full:
            one.setblocking(False)
            one.connect_ex(deaf.getsockname())
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}/file.bin"
        source = dataclasses.replace(archive(server[0], "good"), mirrors=(address, f"{server[0]}/good/file.bin"))
        assert dld.fetch(source, tmp_path, dld.Downloads()).read_bytes() == BODY
        for one in full:
            one.close()


def test_what_came_from_one_mirror_is_kept_for_the_next(tmp_path, server):
    host, asked = server
    assert fetch(tmp_path, host, "drops", "good") == BODY
    assert [(path, ranges) for path, ranges, _ in asked] == [
        ("/drops/file.bin", None), ("/good/file.bin", "bytes=100000-")]


def test_a_partial_file_is_resumed_by_the_next_run_if_it_is_still_the_same_file(tmp_path, server):
    host, asked = server
    (tmp_path / ".file.bin.part").write_bytes(BODY[:5000])
    dld.write_json(tmp_path / ".file.bin.part.json", {"url": f"{host}/changed/file.bin", "version": '"v1"'})
    assert fetch(tmp_path, host, "changed") == BODY, "the server says with 200 that its file is another one"
    assert asked == [("/changed/file.bin", "bytes=5000-", '"v1"')] and left(tmp_path) == ["file.bin"]


def test_a_partial_file_with_wrong_bytes_is_started_anew(tmp_path, server):
    host, asked = server
    (tmp_path / ".file.bin.part").write_bytes(b"\0" * 5000)
    assert fetch(tmp_path, host, "good") == BODY
    assert [ranges for _, ranges, _ in asked] == ["bytes=5000-", None]


@pytest.mark.parametrize("size", [len(BODY), len(BODY) + 7])
def test_a_partial_file_that_is_already_long_enough(size, tmp_path, server):
    (tmp_path / ".file.bin.part").write_bytes((BODY + b"1234567")[:size])
    assert fetch(tmp_path, server[0], "good") == BODY


def test_of_slow_mirrors_the_fastest_goes_on(tmp_path, server, monkeypatch):
    host, asked = server
    monkeypatch.setattr(dld, "CRAWL", 10 * len(BODY))  # nobody is as fast as that
    assert fetch(tmp_path, host, "creeps", "crawls") == BODY
    paths = [path.split("/")[1] for path, _, _ in asked]
    assert paths == ["creeps", "crawls", "crawls"] and asked[2][1], "the faster one goes on where it was"


def test_ones_own_mirror_comes_first(tmp_path, server):
    host, asked = server
    assert fetch(tmp_path, host, "404", mirror=f"{host}/good/") == BODY
    assert [path for path, _, _ in asked] == ["/good/file.bin"]


def test_two_at_once_fetch_a_file_once(tmp_path, server, monkeypatch):
    host, asked = server
    monkeypatch.setattr(dld, "CRAWL", 0)
    said, got = [], []

    def one():
        got.append(dld.fetch(archive(host, "crawls"), tmp_path, dld.Downloads(say=said.append)).read_bytes())

    other = threading.Thread(target=one)  # the lock is one of open files, so that threads are like processes to it
    other.start()
    while not asked:
        time.sleep(0.01)
    one()
    other.join()
    assert got == [BODY, BODY] and len(asked) == 1, asked
    assert said == [f"Waiting for process {os.getpid()} on {socket.gethostname()}, which is getting file.bin"]


def test_a_full_disk_is_told_from_a_bad_mirror(tmp_path, server, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(dld.DataMissing, match=r"cannot write .*file.bin.part: File too large"):
            fetch(tmp_path, server[0], "good")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.setattr(dld.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(dld.DataMissing, match=r"no room for file.bin in .*: 1,000 bytes left"):
        fetch(tmp_path / "new", server[0], "good")


def test_a_file_that_is_there_but_wrong_is_never_replaced(tmp_path, server):
    (tmp_path / "file.bin").write_bytes(b"put here by hand")
    with pytest.raises(dld.DataError, match=r"damaged.*delete it"):
        fetch(tmp_path, server[0], "good")
    assert (tmp_path / "file.bin").read_bytes() == b"put here by hand" and not server[1]
    with pytest.raises(dld.DataMissing, match="is not there"):
        dld.fetch(archive(server[0], "good"), tmp_path / "dry", dld.Downloads(allowed=False))
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize("member", ["../evil", "/tmp/evil", "inside/../../evil", "link"])
def test_an_archive_cannot_write_elsewhere(member, tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        entry = tarfile.TarInfo(member)
        if member == "link":
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(entry, io.BytesIO(b""))
    with pytest.raises(dld.DataError, match=r"cannot unpack .*does not belong there"):
        dld.unpack(tmp_path / "a.tar.gz", "inside", dld.Downloads())
    assert left(tmp_path) == ["a.tar.gz"] and not (tmp_path.parent / "evil").exists()
