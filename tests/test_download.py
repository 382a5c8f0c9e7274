"""The downloader against a server on this machine that fails in every way that is known."""
import contextlib
import hashlib
import http.server
import io
import re
import tarfile
import threading
import types

import pytest
from conftest import dld

BODY = bytes(range(256)) * 1200  # 307,200 bytes
SIZE = len(BODY)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        way = self.path.split("/")[1]
        self.server.asked.append((way, self.headers.get("Range")))
        with contextlib.suppress(OSError):  # the client has gone
            WAYS[way](self) if way in WAYS else self.answer(int(way))
        self.close_connection = True

    def answer(self, status=200, body=b"", length=None, **headers):
        self.send_response(status)
        headers = {"Content_Length": len(body) if length is None else length} | headers
        for name, value in headers.items():
            if value != -1:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def rest(self, most=SIZE, pause=0.0):
        """What was asked for, from where it was."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if start >= SIZE:
            return self.answer(416)
        where = {"Content_Range": f"bytes {start}-{SIZE - 1}/{SIZE}"} if asked else {}
        self.answer(206 if asked else 200, length=SIZE - start, **where)
        for i in range(start, min(start + most, SIZE), 1000):
            self.wfile.write(BODY[i:i + 1000])
            if pause and self.server.until.wait(pause):
                break

    def log_message(self, *_):
        pass


WAYS = {
    "good": Handler.rest,
    "drops": lambda self: self.rest(200_000),
    "crawls": lambda self: self.rest(pause=0.004),
    "elsewhere": lambda self: self.answer(302, Location="/good/file.bin"),
    "ignores-range": lambda self: self.answer(200, BODY),
    "stalls": lambda self: (self.answer(200, BODY[:1000], SIZE), self.server.until.wait(60)),
    "endless": lambda self: self.answer(200, bytes(50 * SIZE), -1),
    "wrong": lambda self: self.answer(200, bytes(SIZE)),
    "too-short": lambda self: self.answer(200, BODY[:1000]),
    "to-a-file": lambda self: self.answer(302, Location="file:///etc/hostname"),
    "web-page": lambda self: self.answer(200, b"<html>".ljust(SIZE), Content_Type="text/html"),
    "closes": lambda self: None}


@pytest.fixture
def server(monkeypatch):
    """Its address, and what it was asked for; times are short, so that the tests are."""
    monkeypatch.setattr(dld, "SECONDS_WITHOUT_A_BYTE", 1.0)
    monkeypatch.setattr(dld, "MIN_DOWNLOAD_BYTES_PER_SECOND", 1000)
    monkeypatch.setattr(dld, "SPEED_WINDOW_SECONDS", 0.3)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.asked, httpd.until = [], threading.Event()
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", httpd.asked
    httpd.until.set()
    httpd.shutdown()
    httpd.server_close()


def fetch(folder, host, *ways, **settings):
    mirrors = tuple(f"{host}/{way}/file.bin" for way in ways)
    source = dld.Archive("file.bin", hashlib.md5(BODY).hexdigest(), SIZE, mirrors)
    return dld.fetch(source, folder, dld.Config(**settings)).read_bytes()


def left(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("way", ["good", "drops", "crawls", "elsewhere"])
def test_one_mirror_is_enough_if_its_bytes_come_in_the_end(way, tmp_path, server):
    assert fetch(tmp_path, server[0], way) == BODY and left(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("way, why", {
    "stalls": "timed out", "endless": "more than the file", "wrong": "md5 differs",
    "too-short": "stopped after 1,000 of 307,200 bytes", "to-a-file": "not allowed",
    "web-page": "a web page instead", "404": "404", "500": "500", "closes": "closed"}.items())
def test_a_mirror_that_fails_is_named_and_the_next_one_is_asked(way, why, tmp_path, server):
    host, asked = server
    with pytest.raises(dld.DataMissing, match=why) as caught:
        fetch(tmp_path / "alone", host, way)
    said = str(caught.value)
    assert host.split("/")[2] in said and str(tmp_path / "alone") in said and "\n" not in said
    assert "file.bin" not in left(tmp_path / "alone")
    assert fetch(tmp_path / "both", host, way, "good") == BODY
    assert left(tmp_path / "both") == ["file.bin"] and asked[-1][0] == "good"
    fetch(tmp_path / "both", host, way)
    assert asked[-1][0] == "good", "what is there is not fetched again"


def test_mirrors_are_asked_in_order_ones_own_first_and_go_on_where_the_last_one_stopped(
        tmp_path, server):
    host, asked = server
    assert fetch(tmp_path, host, "drops", "good", mirror=f"{host}/404/") == BODY
    assert asked == [("404", None), ("drops", None), ("good", "bytes=200000-")]


def test_of_slow_mirrors_one_is_used_in_the_end(tmp_path, server, monkeypatch):
    monkeypatch.setattr(dld, "MIN_DOWNLOAD_BYTES_PER_SECOND", 10**9)  # nobody is as fast as that
    host, asked = server
    assert fetch(tmp_path, host, "404", "crawls") == BODY
    assert [way for way, _ in asked] == ["404", "crawls"] * 2 and asked[3][1], "where it was"


@pytest.mark.parametrize("part, way", [
    (BODY[:5000], "good"), (BODY[:5000], "ignores-range"), (BODY, "404"), (bytes(5000), "good"),
    (BODY + b"1234567", "good")],
    ids=["begun", "begun, range ignored", "whole", "wrong", "too long"])
def test_a_partial_file_is_resumed_or_started_anew(part, way, tmp_path, server):
    host, asked = server
    (tmp_path / ".file.bin.part").write_bytes(part)
    assert fetch(tmp_path, host, way) == BODY and left(tmp_path) == ["file.bin"]
    assert len(part) >= SIZE or asked[0] == (way, "bytes=5000-")


def test_what_is_there_of_a_file_needs_no_room_once_more(tmp_path, server, monkeypatch):
    room = types.SimpleNamespace(free=SIZE - 5000)
    monkeypatch.setattr(dld.shutil, "disk_usage", lambda _: room)
    with pytest.raises(dld.DataMissing, match="no room for file"):
        fetch(tmp_path, server[0], "good")
    (tmp_path / ".file.bin.part").write_bytes(BODY[:5000])
    assert fetch(tmp_path, server[0], "good") == BODY


def test_a_file_that_is_there_but_wrong_is_never_replaced(tmp_path, server):
    (tmp_path / "file.bin").write_bytes(b"put here by hand")
    with pytest.raises(dld.DataError, match=r"damaged.*delete it"):
        fetch(tmp_path, server[0], "good")
    assert (tmp_path / "file.bin").read_bytes() == b"put here by hand" and not server[1]
    with pytest.raises(dld.DataMissing, match="is not there"):
        fetch(tmp_path / "dry", server[0], "good", dry_run=True)
    assert not (tmp_path / "dry").exists() and not server[1]


@pytest.mark.parametrize("filtered", [True, False], ids=["", "an old Python"])
@pytest.mark.parametrize("member", ["../evil", "inside/../../evil", "/tmp/evil", "link"])
def test_an_archive_cannot_write_elsewhere(member, filtered, tmp_path, monkeypatch):
    if not filtered:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        entry = tarfile.TarInfo(member)
        if member == "link":
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(entry, io.BytesIO(b""))
    with pytest.raises(dld.DataError, match="cannot unpack"):
        dld.unpack(tmp_path / "a.tar.gz", "inside")
    assert left(tmp_path) == ["a.tar.gz"] and not (tmp_path.parent / "evil").exists()
